"""Embedders made of a checkpoint: equal to slow loops, the same bits in any company, checked."""

import functools
import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from data.data_workdir import tiny_config
from memory.memory_tiny import tiny_params
from memory_axes import by_reference
from tolerance import close

from m3jax.config import PREFIX_TOKENS, to_json
from m3jax.errors import RetrievalError
from m3jax.evaluation.answer_recall import hit_rates
from m3jax.knowledge.edit import edit
from m3jax.knowledge.maintain import compact
from m3jax.knowledge.versions import (
    open_bank,
    open_index,
    open_references,
    open_retriever,
    open_version,
)
from m3jax.make_model import make_model
from m3jax.memory.write import write_bank
from m3jax.retrieval import checkpoint_embedders
from m3jax.retrieval.build import build_index
from m3jax.retrieval.checkpoint_embedders import (
    AttentionEmbedder,
    ModelEmbedder,
    Ranking,
)
from m3jax.retrieval.embed import load_embedder, make_embedder
from m3jax.retrieval.embedder import Embedder
from m3jax.retrieval.lexical import LexicalEmbedder
from m3jax.retrieval.pooling import draw, position_means
from m3jax.text.documents import Document
from m3jax.text.references import References, write_references
from m3jax.text.tokenizer import Tokenizer

LENGTH = 16  # all texts have one shape, which saves compiling


def with_config(**changes: Any) -> Any:
    return tiny_config(
        model__query_heads=4,
        memory__reference_length=LENGTH,
        memory__source="none",
        **{f"retrieval__{name}": value for name, value in changes.items()},
    )


CONFIG = with_config()
KINDS = [ModelEmbedder, AttentionEmbedder]


@functools.cache
def weights(seed: int) -> Any:
    return tiny_params(CONFIG, seed)


def write_checkpoint(workdir: Path, name: str, seed: int, params: Any = None, **meta: Any) -> Path:
    """A stage folder with one checkpoint of random weights."""
    params = weights(seed) if params is None else params
    folder = workdir / name / "checkpoints" / "7"
    shutil.rmtree(folder, ignore_errors=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(folder / "state", args=ocp.args.PyTreeSave({"params": params}))
    tokenizer = Tokenizer.load(workdir / "tokenizer").fingerprint
    known = {"config": json.loads(to_json(CONFIG)), "tokenizer": tokenizer, "step": 7}
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(folder / "meta", args=ocp.args.JsonSave({**known, "writer": None, **meta}))
    return workdir / name


def write(references: References, folder: Path, base: Any) -> None:
    write_bank(
        CONFIG,
        make_model(CONFIG, PREFIX_TOKENS),
        weights(0),
        references,
        folder,
        progress=False,
        base=base,
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty people; the checkpoint `warmup` wrote the bank, `other` has other weights."""
    workdir = tmp_path_factory.mktemp("prepared")
    people = [f"Name{i} has {'a red ' * (i % 4)}hat and {i * i} coins" for i in range(40)]
    tokenizer = Tokenizer.train(people * 2, 700, 2)
    tokenizer.save(workdir / "tokenizer")
    documents = [Document(f"d{i}", text) for i, text in enumerate(people)]
    write_references(documents, tokenizer, workdir / "references", LENGTH)
    write(References(workdir / "references"), workdir / "bank", None)
    write_checkpoint(workdir, "warmup", 0)
    write_checkpoint(workdir, "other", 1)
    return workdir


@pytest.fixture(scope="module")
def texts(workdir: Path) -> list[str]:
    """References of several lengths; a text longer than a reference, and one without a token."""
    references = References(workdir / "references")
    found = references.texts(range(30))
    cut = [text[: 6 + 2 * i] for i, text in enumerate(found[:9])]
    return [*found, *cut, "", " ".join(found[:5])]


@pytest.fixture(scope="module")
def fitted(workdir: Path, texts: list[str]) -> Callable[[type], Any]:
    made: dict[type, Any] = {}

    def get(kind: type) -> Any:
        if kind not in made:
            made[kind] = kind(workdir / "warmup", 64, rows=3)
            made[kind].fit(texts)
        return made[kind]

    return get


def tokens_of(workdir: Path, text: str) -> np.ndarray:
    return Tokenizer.load(workdir / "tokenizer").encode(text)[:LENGTH]


def norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum())


def means_at(rows: list[np.ndarray]) -> list[np.ndarray]:
    """Mean of the rows' states at every position that 16 of them reach."""
    longest = max(map(len, rows))
    at = [[row[t] for row in rows if len(row) > t] for t in range(longest)]
    return [np.mean(found, axis=0) for found in at if len(found) >= 16]


def minus(row: np.ndarray, means: list[np.ndarray]) -> np.ndarray:
    return np.stack([x - means[min(t, len(means) - 1)] for t, x in enumerate(row)])


@pytest.mark.slow
def test_hidden_states_are_pooled_and_whitened_as_by_a_loop(
    workdir: Path, texts: list[str], fitted: Callable[[type], Any]
) -> None:
    embedder = fitted(ModelEmbedder)
    config = with_config()
    config.model.layers = 1
    model = make_model(config, PREFIX_TOKENS)
    params = {name: weights(0)[name] for name in ("embedding", "memory")}
    params, hidden = jax.tree.map(jnp.asarray, params), jax.jit(model.hidden)
    rows = [
        np.asarray(hidden(params, jnp.asarray(tokens_of(workdir, text))[None])[0], np.float64)
        for text in texts
        if text
    ]
    means = means_at(rows)
    pooled = np.stack([minus(row, means).mean(0) for row in rows])
    centre = pooled.mean(0)
    variance, axes = np.linalg.eigh((pooled - centre).T @ (pooled - centre) / len(pooled))
    whitened = (pooled - centre) @ axes / np.sqrt(variance + 0.01 * variance.mean())
    expected = np.stack([norm(row) for row in whitened])
    found = embedder.embed(texts)
    assert embedder.dimension == 16 == found.shape[1] and not found[texts.index("")].any()
    real = found[[bool(text) for text in texts]]
    close(real @ real.T, expected @ expected.T, 2e-4)
    np.testing.assert_array_equal(embedder.embed_queries(texts), found)
    before = embedder.fingerprint
    embedder.fit(iter(texts))
    assert embedder.fingerprint == before


def queries_of(tokens: np.ndarray, params: Any = None) -> np.ndarray:
    """Queries of the first layer (T, K, G, H), from the parameters."""
    params = weights(0) if params is None else params
    layer = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["memory"])
    x = np.asarray(params["embedding"], np.float64)[tokens]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.model.norm_epsilon)
    return np.einsum("td,dkgh->tkgh", x * layer["attention_norm"], layer["query"])


def turned(x: np.ndarray, position: int) -> np.ndarray:
    half = x.shape[-1] // 2
    angle = position * CONFIG.model.rope_base ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def test_attention_searches_and_ranks_as_by_a_loop(
    workdir: Path, texts: list[str], fitted: Callable[[type], Any]
) -> None:
    embedder, asked = fitted(AttentionEmbedder), ["pet of", *texts[:4], "food"]
    means = means_at([queries_of(tokens_of(workdir, text)) for text in texts if text])
    middle = 2 + LENGTH // 2
    queries = [turned(minus(queries_of(tokens_of(workdir, q)), means), middle) for q in asked]
    bank = open_bank(open_version(workdir), References(workdir / "references"))

    ids = np.array([[3, 9, -1, 0], [7, 7, 1, 2], *[[i, 5, 20, 11] for i in range(4)]])
    scores = np.full(ids.shape, -np.inf)
    for place in np.ndindex(*ids.shape):
        if ids[place] < 0:
            continue
        memory, q = by_reference(bank.read(np.array(ids[place]))), queries[place[0]]
        keys = np.asarray(memory.keys[0, :, : memory.length], np.float64)  # (K, P, H)
        scores[place] = sum(
            max(q[t, k, g] @ key for t in range(len(q)) for g in range(q.shape[2]) for key in slots)
            / np.sqrt(8)
            for k, slots in enumerate(keys)
        )
    ranking = Ranking(embedder, bank)
    close(ranking(asked, ids), scores, 1e-4)
    np.testing.assert_array_equal(ranking(asked[1:3], ids[1:3]), ranking(asked, ids)[1:3])

    memory = by_reference(bank.read(np.arange(30)))  # of texts[:30]
    every = embedder.embed(texts)
    slots = np.stack(
        [keys[0, :, :n].mean(1).ravel() for keys, n in zip(*memory[::2], strict=True)]
    ).astype(np.float64)
    found = embedder._learnt["projection"]
    close(found.T @ found, np.eye(16))  # keeps dot products
    expected = np.stack([norm(row) for row in slots - embedder._learnt["centre"]])
    close(every[:30] @ every[:30].T, expected @ expected.T, 1e-4)
    wanted = np.stack([norm(q.mean((0, 2)).ravel()) for q in queries]) @ expected.T
    close(embedder.embed_queries(asked) @ every[:30].T, wanted, 1e-4)


@pytest.mark.parametrize(("counts", "no_rope_every"), [("0:2+5", 2), ("0:0+5", 0), ("0:2+5", 1)])
def test_attention_searches_with_the_slots_that_each_head_has(
    workdir: Path, texts: list[str], tmp_path: Path, counts: str, no_rope_every: int
) -> None:
    """The second memory layer has none, nor has a head: they add nothing."""
    shape = {"model__layers": 3, "memory__layers": 2, "memory__counts": counts}
    shape["model__no_rope_every"] = no_rope_every
    config = tiny_config(
        model__query_heads=4, memory__reference_length=LENGTH, memory__source="none", **shape
    )
    run, params = tmp_path / "run", tiny_params(config, 3)
    for part in ("tokenizer", "references"):
        shutil.copytree(workdir / part, run / part)
    references = References(run / "references")
    model = make_model(config, PREFIX_TOKENS)
    write_bank(config, model, params, references, run / "bank", progress=False)
    write_checkpoint(run, "warmup", 0, params, config=json.loads(to_json(config)))
    embedder = AttentionEmbedder(run / "warmup", 64, rows=3)
    embedder.fit(texts)
    bank = open_bank(open_version(run), references)

    asked, ids = (
        ["pet of", *texts[:4]],
        np.array([[3, 9, -1, 0], *[[i, 5, 20, 11] for i in range(4)]]),
    )
    means = means_at([queries_of(tokens_of(run, text), params) for text in texts if text])
    first, second = map(int, counts[2:].split("+"))
    scores = np.zeros(ids.shape)
    for place in np.ndindex(*ids.shape):
        if ids[place] < 0:
            scores[place] = -np.inf
            continue
        memory = by_reference(bank.read(np.array(ids[place])))
        assert memory.keys.shape == (1, 1, first + second, 8)
        q = minus(queries_of(tokens_of(run, asked[place[0]]), params), means)
        q = q if no_rope_every == 1 else turned(q, 2 + LENGTH // 2)
        for k, (start, count) in enumerate(((0, first), (first, second))):
            slots = memory.keys[0, 0, start : start + min(count, memory.length)].astype(np.float64)
            if len(slots):
                scores[place] += np.einsum("tgh,sh->tgs", q[:, k], slots).max() / np.sqrt(8)
    close(Ranking(embedder, bank)(asked, ids), scores, 1e-4)

    memory = by_reference(bank.read(np.arange(30)))  # of texts[:30]
    slots = np.zeros((30, 2, 2, 8))  # layer, head
    for i, n in enumerate(memory.length):
        for k, (start, count) in enumerate(((0, first), (first, second))):
            if count:
                slots[i, 0, k] = memory.keys[i, 0, 0, start : start + min(count, n)].mean(0)
    expected = [norm(row) for row in slots.reshape(30, -1) - embedder._learnt["centre"]]
    found, expected = embedder.embed(texts[:30]), np.stack(expected)
    close(found @ found.T, expected @ expected.T, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_in_any_company_and_on_any_devices(
    kind: type, workdir: Path, texts: list[str], fitted: Callable[[type], Any], monkeypatch: Any
) -> None:
    embedder = fitted(kind)
    assert isinstance(embedder, Embedder) and embedder.mesh.size == 8
    for embed in (embedder.embed, embedder.embed_queries):
        rows = embed(texts)
        lengths = np.linalg.norm(rows, axis=1)
        close(lengths, [float(bool(text)) for text in texts])
        order = np.random.default_rng(0).permutation(len(texts))
        np.testing.assert_array_equal(embed([texts[i] for i in order]), rows[order])
        np.testing.assert_array_equal([embed([text])[0] for text in texts[28:34]], rows[28:34])
        monkeypatch.setattr(checkpoint_embedders, "_BLOCK", 7)
        np.testing.assert_array_equal(embed(texts), rows)
        monkeypatch.undo()
    one = kind(workdir / "warmup", 64, rows=3, devices=jax.local_devices()[:1])
    one.set_statistics(embedder._learnt)
    np.testing.assert_array_equal(one.embed(texts), embedder.embed(texts))
    assert one.fingerprint == embedder.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_refused(
    kind: type, workdir: Path, texts: list[str], fitted: Callable[[type], Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for part in ("tokenizer", "warmup"):
        shutil.copytree(workdir / part, run / part)
    config = with_config(embedder=kind.name, dimension=64, encoder_batch=3)
    embedder = make_embedder(config, run)
    assert type(embedder) is kind and not embedder.fitted
    with pytest.raises(RetrievalError, match=f"{kind.name!r} has learnt nothing yet; call fit"):
        embedder.embed(["x"])
    embedder.set_statistics(fitted(kind)._learnt)
    assert embedder.fingerprint == fitted(kind).fingerprint and embedder.extended([]) is embedder
    embedder.save(tmp_path / "saved")
    first = (tmp_path / "saved" / "statistics.npz").read_bytes()
    loaded = load_embedder(tmp_path / "saved")
    assert loaded.spec == embedder.spec and load_embedder(tmp_path / "saved") is loaded
    expected = fitted(kind).embed(texts[:9])
    np.testing.assert_array_equal(loaded.embed(texts[:9]), expected)
    loaded.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "statistics.npz").read_bytes() == first

    del loaded, embedder
    gc.collect()
    write_checkpoint(run, "warmup", 1)
    with pytest.raises(RetrievalError, match="another checkpoint than .*7 holds now.*retrieval.ch"):
        load_embedder(tmp_path / "saved")
    (tmp_path / "saved" / "statistics.npz").write_bytes(first[:100])
    with pytest.raises(RetrievalError, match="cannot load the embedder .*build the index again"):
        load_embedder(tmp_path / "saved")
    (tmp_path / "saved" / "statistics.npz").write_bytes(first)
    shutil.rmtree(run / "warmup")
    with pytest.raises(RetrievalError, match="needs the checkpoint .*warmup.*which is missing"):
        load_embedder(tmp_path / "saved")
    with pytest.raises(RetrievalError, match=r"no checkpoint in .*warmup.*config\.retrieval\.ch"):
        make_embedder(config, run)
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    shutil.copytree(workdir / "other", run / "other")
    with pytest.raises(RetrievalError, match=r"tokenizer\.json is damaged.*retrieval\.checkpoint"):
        make_embedder(with_config(embedder=kind.name, checkpoint=str(run / "other")), run)


def test_checkpoints_that_do_not_serve_are_refused(workdir: Path) -> None:
    with pytest.raises(RetrievalError, match="retrieval.layer = 3, but the checkpoint .* 2 layers"):
        ModelEmbedder(workdir / "warmup", 8, layer=3)
    assert ModelEmbedder(workdir / "warmup", 8, layer=2).fingerprint != (
        ModelEmbedder(workdir / "warmup", 8).fingerprint
    )
    reads = write_checkpoint(workdir, "continual", 1, writer={"path": "/a/warmup", "hash": "x"})
    with pytest.raises(RetrievalError, match="another writer, /a/warmup.*retrieval.checkpoint to"):
        AttentionEmbedder(reads, 8)
    old = write_checkpoint(workdir, "old", 0, config={"model": {"unknown": 1}, "memory": {}})
    with pytest.raises(RetrievalError, match="config of checkpoint .* another version"):
        ModelEmbedder(old, 8)
    with pytest.raises(RetrievalError, match="none of the 2 references has a token"):
        ModelEmbedder(workdir / "warmup", 8).fit(["", ""])


@pytest.fixture(scope="module", params=[kind.name for kind in KINDS])
def indexed(
    request: pytest.FixtureRequest, workdir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Any]]:
    """A workdir whose index is of an embedder, and its config; candidates are ranked if they can
    be."""
    run = Path(shutil.copytree(workdir, tmp_path_factory.mktemp("indexed") / "run"))
    rerank = request.param == "attention"
    config = with_config(embedder=request.param, dimension=64, rerank=rerank)
    references = References(run / "references")
    build_index(references, make_embedder(config, run), run / "index", config)
    yield run, config


def nearest(run: Path, config: Any, beginning: str) -> str:
    """As long a beginning of the reference whose vector is nearest to that of the one so begun."""
    version = open_version(run)
    references = open_references(config, version, Tokenizer.load(run / "tokenizer"))
    text = next(t for t in references.texts(range(len(references))) if t.startswith(beginning))
    index = open_index(version, references)
    ids, scores = index.search(index.embedder.embed([text]), 1)
    close(scores, 1)
    return references.texts(ids[0])[0][: len(beginning)]


def test_what_an_edit_adds_is_found_and_an_edited_index_is_compacted(
    indexed: tuple[Path, Any], tmp_path: Path
) -> None:
    run, config = Path(shutil.copytree(indexed[0], tmp_path / "run")), indexed[1]
    text = "Zork otter"
    edit(config, run, documents=[Document("Zork", text, "", "made up")], write=write)
    assert [nearest(run, config, query) for query in (text, "Name3 has")] == [text, "Name3 has"]
    if config.retrieval.rerank:
        version, asked = open_version(run), "who has 9 coins"
        references = open_references(config, version, Tokenizer.load(run / "tokenizer"))
        retriever = open_retriever(config, version, references, 1.0)
        ids = retriever.retrieve([asked], None, 8)
        assert (ids >= 0).sum() > 3
        scores = Ranking(retriever.index.embedder, open_bank(version, references))([asked], ids)
        assert (np.diff(scores[ids >= 0]) <= 0).all()
        return
    embedders = [
        json.loads((folder / "index" / "embedder" / "embedder.json").read_text())
        for folder in open_version(run).folders
    ]
    assert len(embedders) == 2 and embedders[0] == embedders[1]
    compact(config, run, write=write)
    assert nearest(run, config, text) == text


def test_an_index_refuses_another_checkpoint(indexed: tuple[Path, Any]) -> None:
    run, config = indexed
    gc.collect()
    write_checkpoint(run, "warmup", 1)
    with pytest.raises(RetrievalError, match="another checkpoint than .*holds now"):
        nearest(run, config, "Name3 has")
    write_checkpoint(run, "warmup", 0)
    assert nearest(run, config, "Name3 has") == "Name3 has"


def test_a_bank_ranks_for_its_writer_only(workdir: Path) -> None:
    references = References(workdir / "references")
    bank = open_bank(open_version(workdir), references)
    with pytest.raises(RetrievalError, match=r"bank .* was not written by .*\(weights differ"):
        Ranking(AttentionEmbedder(workdir / "other", 8), bank)
    with pytest.raises(RetrievalError, match="rerank needs an index of .*'attention'.*'lexical'"):
        Ranking(LexicalEmbedder(64), bank)


def test_hits_of_ranked_candidates(indexed: tuple[Path, Any], tmp_path: Path) -> None:
    run, config = indexed
    asked = {"question": "who has 9 coins?", "answer": "9 coins"}
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked) + "\n")
    report = hit_rates(config, run, tmp_path / "asked.jsonl", at=(1, 3))
    ranked = ", best of 8 by its bank" if config.retrieval.rerank else ""
    assert (report["embedder"], report["answerable"]) == (
        f"{config.retrieval.embedder}, 16{ranked}",
        1,
    )


def test_every_text_is_drawn_alike() -> None:
    assert draw(map(str, range(5)), 9) == ["0", "1", "2", "3", "4"]
    drawn = draw(map(str, range(4000)), 1000)
    assert len(set(drawn)) == 1000 and draw(map(str, range(4000)), 1000) == drawn
    assert 1800 < np.mean([int(text) for text in drawn]) < 2200


def test_positions_that_few_texts_reach_have_no_mean_of_their_own() -> None:
    sums, counts = np.arange(8.0).reshape(4, 2) * 20, np.array([40.0, 20, 16, 15])
    close(position_means(sums, counts), sums[:3] / counts[:3, None])
    assert len(position_means(sums, np.array([3.0, 3, 2, 0]))) == 2  # fewer than 16 in all
