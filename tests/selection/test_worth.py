"""What a memory is worth against its text: tasks, conditions, and the nats of each."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory.memory_tiny import tiny_config

from m3jax.config import PREFIX_TOKENS, slot_counts
from m3jax.errors import TextError
from m3jax.make_model import make_model
from m3jax.selection import worth

W = 8


def encode(text: str) -> list[int]:
    return [4 + ord(letter) % 40 for letter in text]


def continuation(count: int = 24) -> worth.Task:
    random = np.random.default_rng(0)
    texts = ("".join(map(chr, random.integers(97, 123, 30))) for _ in range(count))
    return worth.read_continuation_task(texts, encode, W, 6, count)


def squad(path: Path, contexts: list[str], answer: str) -> Path:
    paragraphs = [
        {
            "context": context,
            "qas": [
                {
                    "question": f"What {i}?",
                    "answers": [{"text": answer, "answer_start": context.index(answer)}],
                }
                for i in range(3)
            ],
        }
        for context in contexts
    ]
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return path


def test_questions_are_those_whose_answer_is_in_the_reference(tmp_path: Path) -> None:
    contexts = ["ab red abcdef", "abcdefgh red", "red"]  # inside, behind, too short
    path = squad(tmp_path / "q.json", contexts, "red")
    decode = lambda tokens: "x" * len(tokens)  # noqa: E731
    task = worth.read_question_task(path, encode, decode, W, 10)
    assert len(task) == 2 and len(task.references) == 1  # at most two for a paragraph
    np.testing.assert_array_equal(task.references[0], encode("ab red a"))
    assert task.target == [encode(" red\n")] * 2
    with pytest.raises(TextError, match="no paragraph of 20 tokens"):
        worth.read_question_task(path, encode, decode, 20, 10)
    path.write_text("[]")
    with pytest.raises(TextError, match="SQuAD's format"):
        worth.read_question_task(path, encode, decode, W, 10)


def test_wrong_memories_are_never_right_ones() -> None:
    task = continuation()
    read = worth.readings(task)
    assert not (read["wrong"] == task.own[:, None]).any()
    assert not (read["five wrong"] == task.own[:, None]).any()
    np.testing.assert_array_equal(read["five"][:, 0], task.own)
    assert all(len({*row}) == 5 for row in read["five"].tolist())
    with pytest.raises(TextError, match="20 references are too few"):
        worth.readings(continuation(20))


@pytest.mark.slow
def test_nats_are_those_of_the_plain_logits() -> None:
    counts = "1:3+0,2:1+4"
    config = tiny_config(memory__reference_length=W, memory__counts=counts, memory__spacing=W)
    params = jax.jit(make_model(config, PREFIX_TOKENS).init)(jax.random.key(0))
    task = continuation()
    reader = worth.Reader(config, params, PREFIX_TOKENS, rows=5)
    memories = reader.write(task.references)
    readings = worth.readings(task)
    np.testing.assert_array_equal(readings["five, own farthest"][:, -1], task.own)
    for name in ("own", "five, own farthest"):
        nats = reader.nats(task, memories, readings[name])
        expected = plain(config, params, task, 7, memories, readings[name][7])
        assert nats[7] == pytest.approx(expected, rel=1e-4), name
    nearest = reader.nats(task, memories, readings["five"])
    assert np.abs(nearest - nats).min() > 1e-4
    text = reader.nats(task, text=task.own[:, None])
    row = [*PREFIX_TOKENS, *task.references[3].tolist(), *task.context[3], *task.target[3]]
    assert text[3] == pytest.approx(of_row(config, params, row, len(task.target[3]), ()), rel=1e-4)


def of_row(
    config: Any, params: Any, row: list[int], predicted: int, prefix: Any, memory: Any = None
) -> float:
    model = make_model(config, prefix)
    logits = jax.jit(model.logits)(params, jnp.array([row]), memory)
    logprobs = np.asarray(jax.nn.log_softmax(logits[0]))
    targets = np.array(row[-predicted:])
    return float(-logprobs[np.arange(-predicted - 1, -1), targets].mean())


def plain(config: Any, params: Any, task: Any, i: int, memories: Any, read: Any) -> float:
    whole = config.copy_and_resolve_references()
    row = task.context[i] + task.target[i]
    with whole.unlocked():
        whole.memory.update(chunk_length=len(row), window=1)
    keys, values = (jnp.asarray(x[:, read])[:, None, None] for x in memories[:2])
    memory = type(memories)(keys, values, jnp.asarray(memories.length[read])[None, None])
    return of_row(whole, params, row, len(task.target[i]), PREFIX_TOKENS, memory)


def test_the_worth_of_the_text_is_one() -> None:
    random = np.random.default_rng(0)
    none, text = random.random(50) + 2, random.random(50)
    assert worth.summarize(text, none, text)["worth"] == pytest.approx(1)
    assert worth.summarize(text, none, text)["worth_error"] < 1e-12
    assert worth.summarize(none, none, text)["worth"] == pytest.approx(0)
    half = worth.summarize((none + text) / 2, none, text)
    assert half["worth"] == pytest.approx(0.5)


def test_settings_spend_the_same_budget() -> None:
    config = tiny_config(memory__reference_length=W)
    L, K = config.memory.layers, config.model.kv_heads
    random = np.random.default_rng(0)
    weights = worth.TokenWeights(*(random.random((3, L, K, W)) for _ in range(2)))
    sizes = {}
    for name, changed in worth.settings(config, weights, [2, 4]):
        sizes[name] = int(slot_counts(changed.model, changed.memory).sum())
    assert sizes["4 heads"] == sizes["4 uniform"] == sizes["4 paper"] == 4 * L * K
    assert sizes["2 heads"] == 2 * L * K and sizes["all"] == W * L * K
