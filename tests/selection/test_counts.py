"""Dealing the tokens of a memory to layers and heads."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from data.data_workdir import WORLD, make_workdir, tiny_config

from m3jax.config import PREFIX_TOKENS, slot_counts, validate
from m3jax.errors import ConfigError, TextError
from m3jax.knowledge.edit import edit
from m3jax.knowledge.versions import open_references
from m3jax.make_model import make_model
from m3jax.mesh import make_mesh
from m3jax.quickstart import people
from m3jax.selection import counts
from m3jax.selection.counts import TokenWeights, counts_table, deal_counts, select_counts
from m3jax.selection.worth import worth_report, worth_table
from m3jax.text.tokenizer import Tokenizer
from m3jax.train.checkpoints import Checkpoints
from m3jax.train.optimizer import make_optimizer
from m3jax.train.state import new_state

R, L, K, W = 3, 2, 2, 5


def weights(seed: int = 0) -> TokenWeights:
    random = np.random.default_rng(seed)
    return TokenWeights(*(random.random((R, L, K, W)) for _ in range(2)))


@pytest.mark.parametrize(("budget", "each"), [(2, 0), (2, 1), (3, 2), (1, 1), (5, 0)])
def test_counts_are_the_mean_of_those_of_each_reference(budget: int, each: int) -> None:
    both, total = weights(), budget * L * K
    mean = np.zeros((L, K))
    for r in range(R):
        kept = np.zeros((L, K, W), bool)
        for layer, head in np.ndindex(L, K):
            kept[layer, head, np.argsort(-both.received[r, layer, head])[:each]] = True
        rest = [
            (both.reconstruction[r, layer, head, w], layer, head, w)
            for layer, head, w in np.ndindex(L, K, W)
            if not kept[layer, head, w]
        ]
        for _, layer, head, w in sorted(rest, reverse=True)[: total - each * L * K]:
            kept[layer, head, w] = True
        mean += kept.sum(-1) / R
    dealt = deal_counts(both, budget, each)
    assert dealt.sum() == total and (np.abs(dealt - mean) < 1).all()
    assert dealt.min() >= each and dealt.max() <= W


def test_a_head_that_copies_gets_the_budget() -> None:
    both = weights()
    both.reconstruction[:, 1, 0] += 1
    np.testing.assert_array_equal(deal_counts(both, W / (L * K), 0), [[0, 0], [W, 0]])


def test_padding_is_never_dealt() -> None:
    both = weights()
    for side in both:
        side[..., 3:] = -np.inf
    assert deal_counts(both, 2, 1).max() <= 3


@pytest.mark.parametrize(("budget", "each"), [(1, 2), (6, 0), (0, 0)])
def test_budgets_that_cannot_be_dealt_are_refused(budget: int, each: int) -> None:
    with pytest.raises(ConfigError, match="at most 5, the tokens of a reference"):
        deal_counts(weights(), budget, each)


def test_the_table_names_layers_and_heads() -> None:
    report = {
        **{"checkpoint": "runs/x/warmup", "step": 0, "references": 3, "budget": 2.0, "each": 1},
        **{"by_layer": [[1, 2], [3, 4]], "first_layer": 5, "heads_of_half": 0.5},
    }
    lines = counts_table(report).splitlines()
    assert lines[2:] == [
        "| layer | head 0 | head 1 |",
        "|---|---|---|",
        "| 5 | 1 | 2 |",
        "| 6 | 3 | 4 |",
    ]


# -- a workdir
CONFIG = tiny_config(memory__layers=2, memory__reference_length=8)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workdir(tmp_path_factory.mktemp("counts"), CONFIG)
    params = jax.jit(make_model(CONFIG, PREFIX_TOKENS).init)(jax.random.key(1))
    tokenizer = Tokenizer.load(folder / "tokenizer").fingerprint
    checkpoints = Checkpoints(folder / "continual", CONFIG, tokenizer)
    with jax.set_mesh(make_mesh(CONFIG, jax.devices()[:1])):
        checkpoints.save(new_state(params, make_optimizer(CONFIG)), 0)
    checkpoints.close()
    return folder


@pytest.mark.slow
def test_counts_of_a_workdir_fit_its_config(workdir: Path) -> None:
    report = select_counts(CONFIG, workdir, workdir / "continual", budget=3, each=1, sample=20)
    config = CONFIG.copy_and_resolve_references()
    with config.unlocked():
        config.memory.update(counts=report["counts"], each=1, selection="reconstruction")
    kept = slot_counts(config.model, validate(config).memory)
    np.testing.assert_array_equal(kept, report["by_layer"])
    assert kept.sum() == 3 * 2 * 2 and kept.min() >= 1 and report["references"] == 20


def test_references_that_were_deleted_are_not_looked_at(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def weights(config: Any, params: Any, tokens: np.ndarray, prefix: Any) -> TokenWeights:
        seen.append(tokens)
        shape = (len(tokens), 2, 2, tokens.shape[1])
        return TokenWeights(*np.random.default_rng(0).random((2, *shape)))

    monkeypatch.setattr(counts, "measure_weights", weights)
    own = workdir.parent / "edited"
    shutil.copytree(workdir, own)
    key = people.knowledge(WORLD.people)[0]["id"]
    version, tokenizer = edit(CONFIG, own, delete=[key]), Tokenizer.load(own / "tokenizer")
    live = len(open_references(CONFIG, version, tokenizer).live)
    for folder in (workdir, own):
        select_counts(CONFIG, folder, folder / "continual", budget=3, each=1, sample=1000)
    assert [len(tokens) for tokens in seen] == [160, live] and live < 160


def test_a_budget_that_cannot_be_dealt_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 8, the tokens of a reference"):
        select_counts(CONFIG, tmp_path, budget=9, each=1)
    with pytest.raises(ConfigError, match="at most 8, the tokens of a reference"):
        worth_report(CONFIG, tmp_path, documents="none.jsonl", budgets=[4, 9])
    with pytest.raises(ConfigError, match="rule 'head' .* known: heads, uniform, paper, all"):
        worth_report(CONFIG, tmp_path, documents="none.jsonl", rules=["head"])


@pytest.mark.slow
def test_the_worth_of_memories_of_a_workdir(workdir: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    words = ["home", "pet", "of", "Mozi", "saza", "kotu", "Tiru", "otter"]
    texts = [" ".join(random.choice(words, 40)) for _ in range(50)]
    documents = tmp_path / "texts.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options: dict[str, Any] = {"documents": documents, "budgets": [4], "most": 22}
    report = worth_report(CONFIG, workdir, workdir / "continual", **options)
    rows = report["tasks"]["continuation"]
    assert set(rows) == {"nothing", "text", "4 heads", "4 uniform", "4 paper", "all"}
    assert rows["text"]["own"]["worth"] == pytest.approx(1)
    for name in ("4 heads", "4 uniform", "4 paper", "all"):
        assert set(rows[name]) == {"own", "five", "wrong", "five wrong"}
        assert all(0 < row["nats"] < 20 and row["error"] > 0 for row in rows[name].values())
    table = worth_table(report)
    assert f"{rows['all']['own']['nats']:.3f} (" in table
    spaced = CONFIG.copy_and_resolve_references()
    with spaced.unlocked():
        spaced.memory.spacing = 8
    report = worth_report(spaced, workdir, workdir / "continual", **options, rules=["heads"])
    spaced_rows = report["tasks"]["continuation"]
    assert set(spaced_rows) == {"nothing", "text", "4 heads"}
    heads = spaced_rows["4 heads"]
    assert heads["own"] == pytest.approx(rows["4 heads"]["own"], rel=1e-5)
    ranks = {heads[name]["nats"] for name in ("five", "five, own farthest")}
    assert len(ranks | {rows["4 heads"]["five"]["nats"]}) == 3
    with pytest.raises(TextError, match="too few for wrong ones"):
        worth_report(CONFIG, workdir, workdir / "continual", **{**options, "most": 10})
