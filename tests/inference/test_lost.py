"""Generation while its knowledge changes, goes away, or has nothing to give."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from data.data_workdir import make_workdir, tiny_config
from memory.served import serving
from tolerance import close

from m3jax.config import PREFIX_TOKENS
from m3jax.errors import BankError, InferenceError, VersionError
from m3jax.inference import session as session_module
from m3jax.inference.cli import Request, run
from m3jax.inference.session import Session
from m3jax.knowledge.edit import edit
from m3jax.knowledge.maintain import compact
from m3jax.knowledge.versions import open_version
from m3jax.make_model import make_model
from m3jax.memory import storage
from m3jax.memory.bank import Bank

CONFIG = tiny_config(stage="continual")
PROMPTS = ["the pet of Livu", "the home of Nivo and"]
NEW = 24


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("lost") / "run", CONFIG)


@pytest.fixture(autouse=True)
def checkpoint(monkeypatch):
    """Random weights, which the bank is said to be written by; and short pauses."""
    params = jax.jit(make_model(CONFIG, PREFIX_TOKENS).init)(jax.random.key(5))
    meta = {"step": 3, "writer": None}
    monkeypatch.setattr(session_module, "restore_params", lambda *_, **__: (params, meta))
    monkeypatch.setattr(session_module, "check_reader", lambda *_: None)
    monkeypatch.setattr(storage, "_PAUSE", 0.01)
    pauses = {"initial_delay": "5ms", "max_delay": "10ms"}
    monkeypatch.setattr(storage, "_RETRIES", {**storage._RETRIES, **pauses})


@pytest.fixture
def workdir(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def generated(generator, listener=None):
    """Text with words that are searched for: what random weights say is not."""
    forced = generator.tokenizer.encode_batch([" food of Livu and the home of Nivo" * 3] * 2)
    return generator.generate(PROMPTS, NEW, listener=listener, forced=forced)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        close(a.logprobs, b.logprobs)


@pytest.mark.slow
def test_a_bank_that_goes_away_ends_a_generation_with_its_name(workdir):
    with serving(workdir / "bank") as server:
        session = Session(CONFIG, workdir, bank=server.url)
        expected = generated(session.generator("memory"))
        told = []

        def gone(number, text):
            told.append((number, text))
            server.fault = lambda path: 503

        session.bank = Bank.open(server.url)
        with pytest.raises(BankError, match=server.url):
            generated(session.generator("memory"), gone)
        for number, row in enumerate(expected):
            text = "".join(piece for place, piece in told if place == number)
            assert text and row.text.startswith(text)
            assert len(text) < len(row.text)


def test_what_was_generated_before_is_written(workdir, tmp_path, capsys):
    """The bank goes away between two prompts."""
    with serving(workdir / "bank") as server:
        request = Request(
            [PROMPTS[0], PROMPTS[1]],
            new_tokens=4,
            batch=1,
            json=str(tmp_path / "a.json"),
            html=str(tmp_path / "a.html"),
        )
        reads = 0
        real = Bank.read_stored

        def read(bank, ids):
            nonlocal reads
            reads += 1
            if reads == 2:
                server.fault = lambda path: 503
            return real(bank, ids)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bank, "read_stored", read)
            with pytest.raises(BankError, match=server.url):
                run(CONFIG, workdir, request, bank=server.url)
    records = json.loads((tmp_path / "a.json").read_text())
    assert [one["prompt"] for one in records] == PROMPTS[:1]
    assert PROMPTS[0] in (tmp_path / "a.html").read_text()
    assert PROMPTS[0] + records[0]["text"] in capsys.readouterr().out


@pytest.mark.slow
def test_a_reference_deleted_meanwhile_is_read_to_the_end_and_then_never_again(workdir):
    session = Session(CONFIG, workdir)
    expected = generated(session.generator("memory"))
    read = [chunk.ids for row in expected for chunk in row.chunks]
    keys = {session.references[i].key for ids in read for i in ids[ids >= 0].tolist()}
    asked = []

    def delete(number, text):
        if not asked:
            edit(CONFIG, workdir, delete=sorted(keys)).close()
            asked.append(compact(CONFIG, workdir, write=_no_memories)[1])

    same(generated(session.generator("memory"), delete), expected)
    assert asked == [[str(workdir)]]  # kept for its reader
    after = Session(CONFIG, workdir)
    for row in generated(after.generator("memory")):
        for chunk in row.chunks:
            for i in chunk.ids[chunk.ids >= 0].tolist():
                assert after.references[i].key not in keys
    with pytest.raises(VersionError, match="was deleted"):
        open_version(workdir, 0)


def _no_memories(references, folder, base):
    """Memories are copied: nothing is left to encode."""
    from m3jax.memory.write import write_bank

    model = make_model(CONFIG, PREFIX_TOKENS)
    write_bank(
        CONFIG,
        model,
        jax.jit(model.init)(jax.random.key(0)),
        references,
        folder,
        progress=False,
        base=base,
    )


def test_fewer_references_than_are_read(workdir):
    session = Session(CONFIG, workdir)
    keys = [session.references[i].key for i in range(2, len(session.references))]
    edit(CONFIG, workdir, delete=keys)
    few = Session(CONFIG, workdir)
    assert CONFIG.memory.per_prompt_chunk > 2
    for row in generated(few.generator("memory")):
        assert all((chunk.ids >= 0).sum() <= 2 for chunk in row.chunks)
        assert np.isfinite(row.logprobs).all()


@pytest.mark.slow
def test_a_search_that_finds_nothing_is_no_memory(workdir):
    """Words that the knowledge base does not know; the chunk has no other."""
    session = Session(CONFIG, workdir)
    prompts = ["qqq xxx", "zzz"]
    memory = session.generator("memory").generate(prompts, 5)
    assert all((chunk.ids < 0).all() for row in memory for chunk in row.chunks)
    same(memory, session.generator("none").generate(prompts, 5))


def test_modes_without_what_they_need_are_refused(workdir):
    shutil.rmtree(workdir / "bank")
    with pytest.raises(BankError, match="write_bank"):
        Session(CONFIG, workdir).generator("memory")
    with pytest.raises(InferenceError, match="has not learned to read"):
        Session(tiny_config(stage="warmup"), workdir).generator("long_context")
    with pytest.raises(InferenceError, match="known: none, memory, cold, rag, long_context"):
        Session(CONFIG, workdir).generator("explicit")
    with pytest.raises(VersionError, match="version 7"):
        Session(CONFIG, workdir, version=7).generator("memory")
