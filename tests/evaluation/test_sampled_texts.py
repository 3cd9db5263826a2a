"""Texts that a model makes up: split as asked, drawn from it, the same whatever the batch."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory.memory_tiny import tiny_config, tiny_params

from m3jax.errors import InferenceError
from m3jax.evaluation.sampled_texts import make_texts
from m3jax.inference.session import Session
from m3jax.make_model import make_model
from m3jax.text.documents import is_validation, read_documents
from m3jax.text.tokenizer import BOS, END, SPECIAL_TOKENS, Tokenizer
from m3jax.text.tokenizer_import import id_tokenizer

ASKED: dict[str, Any] = {"count": 24, "tokens": 12, "split": 5}


@pytest.fixture(scope="module")
def session() -> Session:
    """Random weights; logits large enough that some texts end, and some early."""
    config = tiny_config(data__sequence_length=64, text__validation_share=0.4)
    made = object.__new__(Session)
    made.config, made.model = config, make_model(config, ())
    params = tiny_params(config, 2)
    params["head"] *= 2
    params["head"][[BOS, END]] *= 2
    made.params = jax.tree.map(jnp.asarray, params)
    text = id_tokenizer(260, ["0", "1", "3", "2"], SPECIAL_TOKENS).text
    made.tokenizer, made.checkpoint = Tokenizer(text), Path("warmup")
    made.meta = {"step": 0}
    return made


def texts_of(session: Session, folder: Path) -> dict[str, np.ndarray]:
    """First part and rest of every text, joined."""
    first = {d.id: d.text for d in read_documents(str(folder / "knowledge.jsonl"))}
    encode = session.tokenizer.encode
    found = {}
    for document in read_documents(str(folder / "documents.jsonl")):
        assert document.references == (f"{document.id}#0",)
        assert document.no_loss == ((len(document.text),) * 2,)
        parts = encode(first[document.id]), encode(document.text)
        assert len(parts[0]) == ASKED["split"] and 0 < len(parts[1]) <= 12 - 5
        found[document.id] = np.concatenate(parts)
    assert found.keys() == first.keys()
    return found


def test_the_loss_of_the_whole_text_is_the_models(session: Session, tmp_path: Path) -> None:
    report = make_texts(session, tmp_path / "a", **ASKED)
    texts = texts_of(session, tmp_path / "a")
    assert report["texts"] == 24 and 5 < report["kept"] == len(texts) < 24
    assert len({len(text) for text in texts.values()}) > 2  # some end before they are cut
    nats = []
    for document in read_documents(str(tmp_path / "a" / "documents.jsonl")):
        if is_validation(document, 0.4):
            tokens = np.array([[BOS, *texts[document.id]]], np.int32)
            logits = jax.jit(session.model.logits)(session.params, jnp.asarray(tokens[:, :-1]))
            logprobs = np.asarray(jax.nn.log_softmax(logits))[0]
            nats += [-logprobs[t, tokens[0, t + 1]] for t in range(5, tokens.shape[1] - 1)]
    assert report["held_out"] == len(nats) > 5
    assert report["loss_whole"] == pytest.approx(np.mean(nats), rel=1e-4)


@pytest.mark.slow
def test_texts_depend_on_the_seed_alone(session: Session, tmp_path: Path) -> None:
    make_texts(session, tmp_path / "a", **ASKED)
    make_texts(session, tmp_path / "b", **ASKED, batch=7)
    make_texts(session, tmp_path / "c", **ASKED, seed=1)
    for name in ("documents.jsonl", "knowledge.jsonl"):
        a, b, c = ((tmp_path / run / name).read_bytes() for run in "abc")
        assert a == b != c
    before = (tmp_path / "a" / "documents.jsonl").stat().st_mtime_ns
    again = make_texts(session, tmp_path / "a", **ASKED)
    assert (tmp_path / "a" / "documents.jsonl").stat().st_mtime_ns == before
    assert again == json.loads((tmp_path / "a" / "report.json").read_bytes())


@pytest.mark.slow
def test_draws_follow_the_model(session: Session, tmp_path: Path) -> None:
    """The first tokens of many texts have the model's probabilities after `<s>`."""
    asked = {**ASKED, "count": 2000, "tokens": 2, "split": 1}
    make_texts(session, tmp_path / "a", **asked, batch=2000)
    first = [d.text for d in read_documents(str(tmp_path / "a" / "knowledge.jsonl"))]
    logits = jax.jit(session.model.logits)(session.params, jnp.array([[BOS]]))[0, -1]
    p = np.asarray(jax.nn.softmax(logits))
    best = int(np.argmax(np.where(np.arange(260) > 3, p, 0)))
    second = jax.jit(session.model.logits)(session.params, jnp.array([[BOS, best]]))[0, -1]
    stays = 1 - np.asarray(jax.nn.softmax(second))[[BOS, END]].sum()
    expected = 2000 * p[best] * stays  # texts that end after one token are left out
    found = first.count(session.tokenizer.decode([best]))
    assert expected > 30 and abs(found - expected) < 5 * np.sqrt(expected)


@pytest.mark.parametrize("wrong", [{"split": 12}, {"tokens": 65}, {"split": 0}])
def test_parts_that_cannot_be_are_refused(
    session: Session, tmp_path: Path, wrong: dict[str, int]
) -> None:
    with pytest.raises(InferenceError, match="config.data.sequence_length = 64"):
        make_texts(session, tmp_path, **{**ASKED, **wrong})
