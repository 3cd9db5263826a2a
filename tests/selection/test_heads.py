"""Masked heads against NumPy loops in which every head lists the keys that it sees."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from data.data_workdir import make_workdir, tiny_config
from memory_axes import layers_first
from model.oracle import Oracle, oracle_config, random_params, random_references, random_tokens
from tolerance import close

from m3jax.config import PREFIX_TOKENS, format_heads
from m3jax.data.batch import Batch
from m3jax.errors import ConfigError
from m3jax.make_model import make_model
from m3jax.mesh import make_mesh
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.selection import heads
from m3jax.selection.heads import (
    HeadScores,
    heads_report,
    heads_table,
    masked_losses,
    score_heads,
)
from m3jax.text.tokenizer import Tokenizer
from m3jax.train.checkpoints import Checkpoints
from m3jax.train.evaluator import evaluator
from m3jax.train.optimizer import make_optimizer
from m3jax.train.state import new_state

T, WINDOW = 8, 3


class Masked(Oracle):
    """Token by token, head by head; the masked head goes without some keys."""

    def __init__(self, config: Any, params: Any, prefix: tuple[int, ...], **mask: Any):
        super().__init__(config, params, prefix)
        self.mask = mask  # layer, k, g (None: all of the group), hide

    def position(self, i: int) -> int:
        p = len(self.prefix)
        return i if i < p else i + self.config.memory.reference_length

    def row(self, tokens: np.ndarray, chunks: list) -> np.ndarray:
        """Logits of a row whose chunks have memories `(keys, values, length)`."""
        p, H = len(self.prefix), self.config.model.head_dim
        stream = [self.embed(int(token)) for token in (*self.prefix, *tokens)]
        for number, layer in enumerate(self.layers):
            projected = [self.project(layer, x) for x in stream]
            turned = [[self.rope(h, self.position(i)) for h in k]
                      for i, (_, k, _) in enumerate(projected)]  # fmt: skip
            after = []
            for i, x in enumerate(stream):
                q = projected[i][0]
                out = np.zeros(q.shape)
                for k in range(q.shape[0]):
                    for g in range(q.shape[1]):
                        hit = self.mask["layer"] == number and self.mask["k"] == k
                        hit = hit and self.mask["g"] in (None, g) and i >= p
                        seen = []
                        for j in range(i + 1):
                            far = i - j >= WINDOW and j > p
                            if not (hit and self.mask["hide"] == "context" and far):
                                seen.append((turned[j][k], projected[j][2][k]))
                        reads = chunks and i >= p and number in self.memory_layers
                        if reads and not (hit and self.mask["hide"] == "memory"):
                            seen += self.slots(chunks, i - p, number, k)
                        query = self.rope(q[k, g], self.position(i))
                        scores = np.array([query @ key / np.sqrt(H) for key, _ in seen])
                        weights = np.exp(scores - scores.max())
                        weights /= weights.sum()
                        for weight, (_, value) in zip(weights, seen, strict=True):
                            out[k, g] += weight * value
                x = x + np.einsum("kgh,kghd->d", out, layer["output"])
                after.append(self.mlp(layer, x))
            stream = after
        normed = [self.norm(x, self.params["final_norm"]) for x in stream[p:]]
        return np.stack([self.params["head"] @ x for x in normed])

    def slots(self, chunks: list, t: int, number: int, k: int) -> list:
        memory, own = self.config.memory, t // self.config.memory.chunk_length
        row, found = number - memory.first_layer, []
        for chunk in range(max(0, own - memory.window + 1), own + 1):
            for keys, values, length in chunks[chunk]:
                found += [(keys[row, k, s], values[row, k, s]) for s in range(length)]
        return found


def row_losses(logits: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(-(logprobs[np.arange(T), targets] * weights).sum())


@pytest.mark.parametrize(
    ("prefix", "hide", "group", "changes"),
    [
        ((), "context", -1, {}),
        ((1, 2), "context", 1, {"memory__first_layer": 1}),
        ((1, 2), "memory", -1, {}),
    ],
)
def test_masked_losses_equal_the_loops(
    prefix: Any, hide: str, group: int, changes: dict[str, Any]
) -> None:
    """With scores in blocks of queries that do not divide the row."""
    config = oracle_config(model__attention="blocked", model__attention_block=3, **changes)
    params = random_params(config)
    tokens, targets = random_tokens(1, 2, T), random_tokens(2, 2, T)
    weights = (np.arange(2 * T).reshape(2, T) % 4 > 0).astype(np.float32)
    given: list[Any] = [tokens, targets, weights]
    batch = Batch(*given)
    chunks: list = [[], []]
    if hide == "memory":
        references = random_references(6, np.resize([7, 2, 5], (2, 3, 1)))
        written = [[Oracle(config, params, prefix).write(r)[:3] for r in row[:, 0]]
                   for row in references]  # fmt: skip
        keys, values, length = (
            np.stack([np.stack([np.stack([m[i]]) for m in row]) for row in written])
            for i in range(3)
        )
        half = np.float32
        memory: list[Any] = [keys.astype(half), values.astype(half), length]
        batch = batch._replace(memory=layers_first(ExplicitMemory(*memory)))
        chunks = [[[memory] for memory in row] for row in written]
    candidates = [(0, 1), (1, 0), (2, 1)]
    array = np.array([(layer, k, group) for layer, k in candidates], np.int32)
    program = jax.jit(masked_losses(make_model(config, prefix), hide, WINDOW))
    found = np.asarray(program(params, batch, array))
    for place, (layer, k) in enumerate([(99, 0), *candidates]):
        mask = {"layer": layer, "k": k, "g": None if group < 0 else group, "hide": hide}
        slow = Masked(config, params, prefix, **mask)
        for row in range(2):
            logits = slow.row(tokens[row], chunks[row])
            expected = row_losses(logits, targets[row], weights[row])
            close(found[place, row], expected, 2e-5)
    apart = np.abs(found[1:] - found[0]).max(1)
    reads = [True, True, hide == "context"]  # the last layer has no memories
    np.testing.assert_array_equal(apart > 1e-3, reads)


# -- a workdir


CONFIG = tiny_config(model__layers=3, memory__layers=2, evaluation__batches=3)


def params_of() -> Any:
    """Random ones, large enough that heads differ."""
    return jax.tree.map(
        lambda x: 1.5 * x, jax.jit(make_model(CONFIG, PREFIX_TOKENS).init)(jax.random.key(1))
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workdir(tmp_path_factory.mktemp("heads"), CONFIG)
    tokenizer = Tokenizer.load(folder / "tokenizer").fingerprint
    checkpoints = Checkpoints(folder / "continual", CONFIG, tokenizer)
    params = params_of()
    with jax.set_mesh(make_mesh(CONFIG, jax.devices()[:1])):
        checkpoints.save(new_state(params, make_optimizer(CONFIG)), 0)
    checkpoints.close()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("hide", ["context", "memory"])
def test_scores_of_a_workdir(workdir: Path, hide: str) -> None:
    stage = workdir / "continual"
    found = score_heads(CONFIG, workdir, stage, hide=hide, window=9)
    assert found.increase.shape == found.error.shape == (3, 2)
    figures = evaluator(CONFIG, workdir)(params_of())
    mode = "memory" if hide == "memory" else "none"
    assert found.loss == pytest.approx(figures[f"loss_{mode}"], rel=1e-5)
    assert (found.error[:2] > 0).all() and np.abs(found.increase[:2]).max() > 0
    # The layer without memories has none to hide.
    assert np.isnan(found.increase[2]).all() == (hide == "memory")
    assert len(found.ranking()) == (4 if hide == "memory" else 6)


def test_a_stopped_run_goes_on(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score_heads(CONFIG, workdir, workdir / "continual", window=5)
    files = (workdir / "report" / "heads").iterdir()
    store = max(files, key=lambda path: path.stat().st_mtime_ns)
    rows = np.load(store)
    assert rows.shape == (3, 2 + 6, 4)
    np.save(store, rows[:1])
    written = []
    monkeypatch.setattr(heads, "write_array", lambda path, array: written.append(len(array)))
    again = score_heads(CONFIG, workdir, workdir / "continual", window=5)
    assert written == [2, 3]
    close(again.increase, whole.increase)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 60}, "data.sequence_length = 60"),
        ({"hide": "memory", "by_query": True}, "stored for key-value heads"),
        ({"hide": "all"}, "known: context, memory"),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    workdir: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        score_heads(CONFIG, workdir, workdir / "continual", **options)
    config = tiny_config(memory__source="none")
    with pytest.raises(ConfigError, match="no memories to hide"):
        score_heads(config, workdir, hide="memory")


# -- figures


def scores() -> HeadScores:
    increase = np.array([[0.1, 0.5], [0.3, -0.2], [0.9, 0.4]])
    about = {"checkpoint": "c", "step": 3, "hide": "context", "window": 100, "by": "kv"}
    return HeadScores(2.0, increase, increase / 10, 8, 640, about)


def test_increase_and_standard_error_by_hand() -> None:
    """Rows of unequal weight; the error is that of a ratio, each row compared with itself."""
    weights, base = np.array([4.0, 2.0, 0.0]), np.array([8.0, 5.0, 0.0])
    masked = np.array([[9.0, 6.0, 0.0], [8.0, 5.0, 0.0]])
    candidates = np.array([[0, 0, 1], [0, 1, 0]])
    found = heads._scores(weights, base, masked, (1, 4), candidates, {})
    assert found.loss == pytest.approx(13 / 6) and (found.rows, found.tokens) == (2, 6)
    close(found.increase, [[np.nan, 2 / 6, 0, np.nan]])
    assert found.ranking() == [(0, 1), (0, 2)]
    residual = np.array([1 - 4 * 2 / 6, 1 - 2 * 2 / 6])
    error = np.sqrt(2 * (residual**2).sum()) / 6
    close(found.error, [[np.nan, error, 0, np.nan]])


def test_the_best_heads_of_the_memory_layers() -> None:
    found = scores()
    assert found.ranking() == [(2, 0), (0, 1), (2, 1), (1, 0), (0, 0), (1, 1)]
    assert found.best(0.5, range(0, 2)) == [(0, 1), (1, 0)]
    assert format_heads(found.best(0.5, range(3))) == "0:1,2:0+1"
    assert found.best(0.01, range(1, 2)) == [(1, 0)]
    with pytest.raises(ConfigError, match=r"a share of 0"):
        found.best(0.0, range(3))
    data = json.loads(json.dumps(heads_report(found, found.best(0.5, range(3)))))
    assert data["memory_heads"] == "0:1,2:0+1" and data["heads"][0]["increase"] == 0.9
    text = heads_table(data, most=4)
    assert "| 1 | 2 | 0 | +0.90000 | 0.09000 | yes |" in text and "… and 2 more" in text
