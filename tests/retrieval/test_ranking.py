"""Candidates ranked by the memory heads: equal to a slow loop, in any company, checked."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from data.data_workdir import tiny_config
from memory.memory_tiny import tiny_params
from model.oracle import Oracle
from tolerance import close

from m3jax.checkpoint import seal
from m3jax.config import PREFIX_TOKENS, to_json
from m3jax.errors import RetrievalError
from m3jax.evaluation.answer_recall import hit_rates
from m3jax.knowledge.edit import edit
from m3jax.knowledge.versions import open_bank, open_references, open_retriever, open_version
from m3jax.make_model import make_model
from m3jax.memory.write import write_bank
from m3jax.retrieval.build import build_index
from m3jax.retrieval.embed import make_embedder
from m3jax.retrieval.ranking import Ranking
from m3jax.text.documents import Document
from m3jax.text.references import References, write_references
from m3jax.text.tokenizer import Tokenizer

LENGTH = 16  # all texts have one shape, which saves compiling
IDS = np.array([[3, 9, -1, 0], *[[i, 5, 20, 11] for i in range(4)]])


def config_of(**fields: Any) -> Any:
    """Two layers with memory of two key-value heads, each with two query heads."""
    return tiny_config(
        model__query_heads=4,
        model__layers=3,
        memory__layers=2,
        memory__reference_length=LENGTH,
        memory__source="none",
        **fields,
    )


def write_checkpoint(workdir: Path, name: str, config: Any, seed: int) -> Path:
    """A stage folder with one checkpoint of random weights."""
    folder = workdir / name / "checkpoints" / "7"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        params = {"params": tiny_params(config, seed)}
        writer.save(folder / "state", args=ocp.args.PyTreeSave(params))
    meta = {"config": json.loads(to_json(config)), "step": 7, "writer": None}
    meta["tokenizer"] = Tokenizer.load(workdir / "tokenizer").fingerprint
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(folder / "meta", args=ocp.args.JsonSave(meta))
    seal(folder)
    return workdir / name


def write(config: Any, references: References, folder: Path, base: Any = None) -> None:
    model = make_model(config, PREFIX_TOKENS)
    params = tiny_params(config, 0)
    write_bank(config, model, params, references, folder, progress=False, base=base)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and references of forty people, of several lengths."""
    folder = tmp_path_factory.mktemp("texts")
    people = [f"Name{i} has {'a red ' * (i % 4)}hat and {i * i} coins" for i in range(40)]
    tokenizer = Tokenizer.train(people * 2, 700, 2)
    tokenizer.save(folder / "tokenizer")
    documents = [Document(f"d{i}", text) for i, text in enumerate(people)]
    write_references(documents, tokenizer, folder / "references", LENGTH)
    return folder


def prepared(texts: Path, folder: Path, config: Any) -> Path:
    """A workdir whose bank `warmup` wrote."""
    shutil.copytree(texts, folder)
    write(config, References(folder / "references"), folder / "bank")
    write_checkpoint(folder, "warmup", config, 0)
    return folder


@pytest.fixture(scope="module")
def workdir(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with memories of as many tokens in every head, and another checkpoint."""
    folder = prepared(texts, tmp_path_factory.mktemp("uniform") / "run", config_of())
    write_checkpoint(folder, "other", config_of(), 1)
    return folder


def queries_of(oracle: Oracle, tokens: np.ndarray) -> np.ndarray:
    """Attention queries before RoPE `(L, T, K, G, H)` of all layers, by loops over tokens."""
    p = len(PREFIX_TOKENS)
    layers = oracle.passed([*PREFIX_TOKENS, *tokens.tolist()])
    return np.stack([[q for q, _, _ in projected[p:]] for _, projected, _ in layers])


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("counts", "no_rope_every", "heads"),
    [
        pytest.param("", 0, [(0, 0), (0, 1), (1, 0), (1, 1)], marks=pytest.mark.slow),
        ("0:2+5,1:3+0", 2, [(0, 1), (1, 0)]),
        ("0:1+9,1:0+0", 1, [(0, 1)]),
    ],
)
def test_scores_are_those_of_a_loop(
    texts: Path, tmp_path: Path, counts: str, no_rope_every: int, heads: list[tuple[int, int]]
) -> None:
    """The mean over heads that keep many tokens, query heads and tokens of the largest cosine."""
    config = config_of(memory__counts=counts, model__no_rope_every=no_rope_every)
    run, params = prepared(texts, tmp_path / "run", config), tiny_params(config, 0)
    references = References(run / "references")
    bank = open_bank(open_version(run), references)
    ranking = Ranking(run / "warmup", bank, references, rows=3)
    found = list(zip(ranking.layers_J.tolist(), ranking.heads_J.tolist(), strict=True))
    assert found == heads

    oracle, tokenizer = Oracle(config, params, PREFIX_TOKENS), Tokenizer.load(run / "tokenizer")
    texts_of_all = [row[row > 0] for row in references.tokens(range(40))]
    spread = [texts_of_all[39 * i // 15] for i in range(16)]
    every = np.concatenate([queries_of(oracle, row) for row in spread], axis=1)
    asked = ["pet of", *references.texts(range(4))]
    scores = np.full(IDS.shape, -np.inf)
    for i, j in np.ndindex(*IDS.shape):
        if IDS[i, j] < 0:
            continue
        tokens = np.array(tokenizer.encode(asked[i])[:LENGTH])
        q_LTKGH = queries_of(oracle, tokens) - every.mean(1)[:, None]
        keys, _, length, _ = oracle.write(texts_of_all[IDS[i, j]])
        best = []
        for layer, head in heads:
            oracle.enter(layer)
            kept = keys[layer, head, : min(length, oracle.counts()[layer][head])]
            for q in q_LTKGH[layer, :, head].reshape(-1, 8):
                best.append(
                    max(unit(kept) @ unit(oracle.rope(q, len(PREFIX_TOKENS) + LENGTH // 2)))
                )
        scores[i, j] = np.mean(best)
    close(ranking(asked, IDS), scores, 1e-4)
    np.testing.assert_array_equal(ranking(asked[1:3], IDS[1:3]), ranking(asked, IDS)[1:3])
    assert ranking([""], IDS[:1]).tolist() == [[0, 0, -np.inf, 0]]


def test_only_the_writer_ranks_its_bank(workdir: Path, tmp_path: Path) -> None:
    references = References(workdir / "references")
    bank = open_bank(open_version(workdir), references)
    with pytest.raises(RetrievalError, match=r"bank .* not written by .*\(weights differ"):
        Ranking(workdir / "other", bank, references)
    with pytest.raises(RetrievalError, match=r"none.*config.retrieval.checkpoint names"):
        Ranking(workdir / "none", bank, references)
    run = Path(shutil.copytree(workdir, tmp_path / "run"))
    longer = config_of(model__rope_base=20_000.0)
    shutil.rmtree(run / "other")
    write_checkpoint(run, "other", longer, 0)
    with pytest.raises(RetrievalError, match=r"not written by .*\(layout differ"):
        Ranking(run / "other", bank, references)


@pytest.mark.slow
def test_ranks_are_added_to_the_index_and_know_what_an_edit_adds(
    workdir: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(workdir, tmp_path / "run"))
    config = config_of(retrieval__dimension=64, retrieval__rerank=3.0)
    references = References(run / "references")
    build_index(references, make_embedder(config), run / "index", config)
    text = "Zork has a red hat and 9 coins"
    documents = [Document("Zork", text, "", "made up")]
    edit(config, run, documents=documents, write=lambda *to: write(config_of(), *to))

    version, asked = open_version(run), "who has a red hat and 9 coins"
    references = open_references(config, version, Tokenizer.load(run / "tokenizer"))
    retriever = open_retriever(config, version, references, 1.0)
    candidates, scores = retriever.index.search(retriever.index.embedder.embed([asked]), 16)
    ids = retriever.retrieve([asked], None, 16)[0]
    assert 40 in ids.tolist() and sorted(ids) == sorted(candidates[0])
    ranking = Ranking(run / "warmup", open_bank(version, references), references)
    total = dict(zip(candidates[0], (scores + 3 * ranking([asked], candidates))[0], strict=True))
    ordered = [total[i] for i in ids]
    close(ordered, sorted(ordered, reverse=True))
    assert ids.tolist() != candidates[0].tolist()

    (tmp_path / "asked.jsonl").write_text(json.dumps({"question": asked, "answer": "9 coins"}))
    report = hit_rates(config, run, tmp_path / "asked.jsonl", at=(1, 3))
    assert report["embedder"] == "lexical, 64, 8 candidates ranked" and report["answerable"] == 1
