"""The needle test: where needles are, what counts as right, and what is refused."""

from pathlib import Path

import jax
import numpy as np
import pytest
from data.data_workdir import WORLD, make_workdir, tiny_config

from m3jax.config import PREFIX_TOKENS
from m3jax.errors import TextError
from m3jax.evaluation import needle as needles
from m3jax.evaluation.needle import Haystack, Needle, make_haystack, needle_test, read_needles
from m3jax.evaluation.plots import needle_lines
from m3jax.inference import session as session_module
from m3jax.inference.long_context import LongContextGenerator
from m3jax.inference.session import Session
from m3jax.knowledge.memory_writer import Writer
from m3jax.make_model import make_model

PERSON = WORLD.unseen[0]
RELATION, VALUE = PERSON.facts[0]
NEEDLE = Needle(PERSON.text, f"{RELATION} of {PERSON.name}", f" {VALUE}")


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    config = tiny_config(stage="continual", data__sequence_length=40)
    workdir = make_workdir(tmp_path_factory.mktemp("needle") / "run", config)
    params = jax.jit(make_model(config, PREFIX_TOKENS).init)(jax.random.key(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            session_module, "restore_params", lambda *_, **__: (params, {"step": 3, "writer": None})
        )
        patch.setattr(
            session_module, "restore_writer", lambda *_, **__: Writer(params, Path(), 0, "")
        )
        yield Session(config, workdir)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_haystack_holds_its_needle_once_at_its_depth(session, depth):
    encode = session.tokenizer.encode
    for length in (40, 200):
        random = np.random.default_rng(length)
        made = make_haystack(NEEDLE, session.references, session.tokenizer, length, depth, random)
        assert length - 12 < len(encode(made.prompt)) <= length
        assert made.prompt.count(NEEDLE.text) == 1
        assert made.prompt.endswith("\n" + NEEDLE.prompt)
        assert made.prompt.count(NEEDLE.prompt) == NEEDLE.text.count(NEEDLE.prompt) + 1
        before, after = made.prompt.split(NEEDLE.text)
        lines = len(before.splitlines()), len(after.splitlines()) - 2
        assert abs(lines[0] - depth * sum(lines)) <= 2
        assert made.behind == len(encode(after.removeprefix("\n")))


def test_references_that_all_hold_the_question_are_too_few(session):
    with pytest.raises(TextError, match="--haystack"):
        make_haystack(
            Needle("of", " of", " x"),
            session.references,
            session.tokenizer,
            100,
            0.5,
            np.random.default_rng(0),
        )


@pytest.mark.slow
def test_the_share_of_right_answers_is_counted(session, monkeypatch, tmp_path):
    """The right answer is whatever the reader with memory says to every other text."""
    expected: dict[str, str] = {}
    real = make_haystack

    def made(needle, references, tokenizer, length, depth, random):
        one = real(needle, references, tokenizer, length, depth, random)
        reader = LongContextGenerator(session.generator("long_context", length=8), 20)
        said = reader.generate([one.prompt], new)[0].text
        wanted = said if len(expected) % 2 else "nothing that it says"
        expected[one.prompt] = wanted
        return Haystack(one.prompt, wanted, one.behind)

    new = len(session.tokenizer.encode(NEEDLE.answer))
    monkeypatch.setattr(needles, "make_haystack", made)
    report = needle_test(
        session, [NEEDLE], session.references, [60], count=6, window=20, cut=8, batch=4
    )
    assert report["memory"] == [0.5] and len(report["memory_by_depth"][0]) == 4
    assert np.mean([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]) == report["memory"][0]
    assert report["beyond"] == [np.mean([one >= 28 for one in _behind(session, 60, 6)])]
    assert report["window"][0] <= 0.5
    table = needles.needle_table(report)
    assert table.splitlines()[2].startswith("| 60 | ") and "| 0.500 |" in table
    needle_lines(tmp_path / "needle.png", report)
    assert (tmp_path / "needle.png").stat().st_size > 5000


def _behind(session, length, count):
    random = np.random.default_rng([0, length])
    return [
        make_haystack(NEEDLE, session.references, session.tokenizer, length, depth, random).behind
        for depth in np.linspace(0, 1, count).tolist()
    ]


def test_needles_are_read_or_named(tmp_path):
    path = tmp_path / "needles.jsonl"
    path.write_text('{"needle": "a b", "prompt": "a", "answer": " b"}\n')
    assert read_needles(path) == [Needle("a b", "a", " b")]
    path.write_text('{"needle": "a b", "prompt": "a", "answer": " b"}\n{"needle": "x"}\n')
    with pytest.raises(TextError, match=r"needles.jsonl:2: expected"):
        read_needles(path)
    path.write_text('{"needle": "a b", "prompt": " ", "answer": " b"}\n')
    with pytest.raises(TextError, match="an empty field"):
        read_needles(path)
    path.write_text("")
    with pytest.raises(TextError, match="holds no needles"):
        read_needles(path)
