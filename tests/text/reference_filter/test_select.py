"""Selecting references: planted ones of every kind, the same bytes for any number of processes."""

import json
import random
from pathlib import Path

import pytest

from m3jax import config as configs
from m3jax.config import validate
from m3jax.errors import ConfigError, TextError
from m3jax.text.cleaning.workers import LocalRunner
from m3jax.text.prepare import prepare_text
from m3jax.text.reference_filter import select
from m3jax.text.references import References

NAMES = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "ra", "lo")]
SIGNS = [chr(0x4E00 + 37 * i) for i in range(200)]
QUESTION = "who built the tall white tower of kalo rabe in the year of the comet"


def _sentence(rng, words=NAMES, count=12, gap=" ", end=". "):
    return gap.join(rng.choice(words) for _ in range(count)).capitalize() + end


def _prose(rng):
    return "".join(_sentence(rng) for _ in range(2)).strip()


def _chinese(rng):
    return "".join(_sentence(rng, SIGNS, 20, "", "。") for _ in range(2))


@pytest.fixture
def config():
    config = configs.default()
    config.text.vocabulary = config.model.vocabulary = 600
    config.text.validation_share = 0.2
    config.text.shards = 1
    config.memory.reference_length = 128
    config.knowledge.enabled = True
    return config


@pytest.fixture
def documents(tmp_path):
    """Documents of one reference each, among them one of every kind that is dropped."""
    rng = random.Random(0)
    texts = [_prose(rng) for _ in range(60)] + [_chinese(rng) for _ in range(20)]
    planted = {
        "short": "Bones.",
        "digits": "12 | 2003 | 17.5 %; 13 | 2004 | 18.5 %; 14 | 2005 | 19.5 %",
        "list": "\n".join(f"* {' '.join(rng.sample(NAMES, 4))}" for _ in range(6)),
        "repeated": "buy cheap cars here and now, " * 5,
        "question": f"{_sentence(rng)}{QUESTION.capitalize()}? It was {rng.choice(NAMES)}.",
        "twin": texts[3].upper(),
        "chinese twin": texts[70] + "完",
        "short again": "骨骼。",
    }
    rows = [{"id": f"d{i}", "text": text, "title": f"T{i}"} for i, text in enumerate(texts)]
    rows += [{"id": name, "text": text, "title": name} for name, text in planted.items()]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


EXPECTED = {
    "words_min": {"short", "short again"},
    "nonalphabetic_max": {"digits"},
    "listed_max": {"list"},
    "repeated_max": {"repeated"},
    "contamination": {"question", "d5"},
    "similarity": {"twin", "chinese twin"},
}


def _questions(documents):
    """One that a reference holds, one that holds a reference, and others."""
    rows = [json.loads(line) for line in Path(documents).read_text().splitlines()]
    asked = f"Passage: {rows[5]['text']} Question: what was said of {NAMES[0]}?"
    return [QUESTION, asked, "why?", "what is the name of the river that no text here speaks of"]


def _snapshot(folder):
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def _prepare(config, folder, documents, workers=1, questions=None, **options):
    said = []
    questions = _questions(documents) if questions is None else questions
    runner = LocalRunner(workers) if workers else None
    options = {"runner": runner, "questions": questions, **options}
    prepare_text(config, folder, documents, say=said.append, **options)
    return said


def test_what_is_planted_is_dropped_and_nothing_else(config, documents, tmp_path):
    said = _prepare(config, tmp_path / "w", documents, workers=0)
    dropped = set().union(*EXPECTED.values())
    assert any(f"88 references cut, {len(dropped)} dropped" in line for line in said)
    references = References(tmp_path / "w/references")
    kept = {key.partition("#")[0] for key in references.live_keys()}
    assert kept == ({f"d{i}" for i in range(80)} - dropped) and len(references) == 79
    assert references[4].title == "T4" and references[5].title == "T6"  # titles, in reading order
    report = json.loads((tmp_path / "w/report/knowledge/report.json").read_text())
    shown = {rule: {s["id"][:-2] for s in found} for rule, found in report["samples"].items()}
    assert shown == EXPECTED
    removed = {rule: counted["references"] for rule, counted in report["removed"].items()}
    assert removed == {rule: len(found) for rule, found in EXPECTED.items()}
    assert report["cut"]["references"] == 88 and report["left"]["references"] == 79
    assert report["left"]["tokens"] == references.lengths.sum() and report["documents_left"] == 79
    assert (report["questions"], report["questions_too_short"]) == (4, 1)
    twin = next(s for s in report["samples"]["similarity"] if s["id"] == "twin#0")
    assert twin["value"] == "d3#0, 1.00" and "— is like —" in twin["text"]
    page = (tmp_path / "w/report/knowledge/report.md").read_text()
    assert "| − contamination | 2 |" in page and QUESTION in page and "| left | 79 |" in page
    picture = (tmp_path / "w/report/knowledge/lengths.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert not (tmp_path / "w/selection").exists()


@pytest.mark.slow
def test_the_same_bytes_for_one_and_two_processes_and_for_blocks(config, documents, tmp_path):
    _prepare(config, tmp_path / "plain", documents, workers=0)
    whole = _snapshot(tmp_path / "plain")
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        _prepare(config, folder, documents, workers=workers)
        found = _snapshot(folder)
        assert {k: v for k, v in found.items() if not k.startswith("clean/")} == whole


@pytest.mark.parametrize(
    "name, calls",
    [
        ("write_array", 2),
        *(
            pytest.param(*moment, marks=pytest.mark.slow)
            for moment in (("look_at", 4), ("compare_part", 2), ("decide", 1))
        ),
    ],
)
def test_stopped_at_any_stage_and_run_again(config, documents, tmp_path, monkeypatch, name, calls):
    monkeypatch.setattr(select, "_RANGE", 16)
    monkeypatch.setattr(select.minhash, "_PART_BYTES", 20_000)
    _prepare(config, tmp_path / "whole", documents, workers=0)
    usual, count = getattr(select, name), [0]

    def stop(*arguments, **named):
        count[0] += 1
        if count[0] == calls:
            raise KeyboardInterrupt
        return usual(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(select, name, stop)
        with pytest.raises(KeyboardInterrupt):
            _prepare(config, tmp_path / "w", documents, workers=0)
    assert not (tmp_path / "w/references/inputs.json").exists()
    looked_at, real = [], select.measure_reference
    monkeypatch.setattr(
        select, "measure_reference", lambda text: looked_at.append(text) or real(text)
    )
    monkeypatch.setattr(
        "m3jax.text.references.cut_references", None
    )  # what was cut is not cut again
    said = _prepare(config, tmp_path / "w", documents, workers=0)
    assert _snapshot(tmp_path / "w") == _snapshot(tmp_path / "whole")
    assert len(looked_at) == {"look_at": 88 - 48, "write_array": 88 - 16}.get(name, 0)
    assert "made" in said[-1]
    again = _prepare(config, tmp_path / "w", documents, workers=0)
    assert all("kept" in line for line in again)


def test_an_unfinished_selection_of_other_rules_is_thrown_away(
    config, documents, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(select, "decide", None)
        with pytest.raises(TypeError):
            _prepare(config, tmp_path / "w", documents, workers=0)
    config.knowledge.words_min = 0
    _prepare(config, tmp_path / "w", documents, workers=0)
    keys = References(tmp_path / "w/references").live_keys()
    assert "short#0" in keys and "short again#0" in keys and "digits#0" not in keys
    config.knowledge.words_min = 8
    with pytest.raises(TextError, match=r"references was made from other.*knowledge\.words_min"):
        _prepare(config, tmp_path / "w", documents, workers=0)
    config.knowledge.words_min = 0
    with pytest.raises(TextError, match=r"other inputs: questions"):
        _prepare(config, tmp_path / "w", documents, workers=0, questions=[QUESTION])


def test_a_selection_that_is_off_changes_no_byte(config, documents, tmp_path):
    config.knowledge.enabled = False
    _prepare(config, tmp_path / "off", documents, workers=0, questions=[])
    config.knowledge.enabled = True
    none = {"words_min": 0, "similarity": 0.0}
    ones = ("nonalphabetic_max", "listed_max", "repeated_max", "contamination")
    config.knowledge.update({**none, **dict.fromkeys(ones, 1.0)})
    _prepare(config, tmp_path / "all", documents, workers=0)
    off, everything = _snapshot(tmp_path / "off"), _snapshot(tmp_path / "all")
    assert References(tmp_path / "all/references").fingerprint
    for name in ("tokens.bin", "table.bin", "records-00000.array_record", "manifest.json"):
        assert off[f"references/{name}"] == everything[f"references/{name}"]


def test_what_cannot_be_is_refused(config, documents, tmp_path):
    config.knowledge.words_min = 10**6
    with pytest.raises(TextError, match=r"leaves none of 88 references: words_min 88,.*Loosen"):
        _prepare(config, tmp_path / "w", documents, workers=0)
    config.knowledge.enabled = False
    with pytest.raises(TextError, match="4 questions are given .*knowledge.enabled = False; set"):
        _prepare(config, tmp_path / "v", documents, workers=0)
    assert not (tmp_path / "v").exists()
    config.knowledge.enabled = True
    config.retrieval.ids, config.data.packing = "stored", "document"
    with pytest.raises(ConfigError, match="knowledge.enabled = True: documents name references"):
        validate(config)


def test_references_of_a_document_with_gaps_are_all_found(config, tmp_path):
    """Their numbers in the keys stay, so that a key means one text whatever was dropped."""
    rng = random.Random(1)
    long = "\n".join([_prose(rng), "Bones.", _prose(rng), _prose(rng)])
    path = tmp_path / "d.jsonl"
    more = [{"id": f"d{i}", "text": _prose(rng)} for i in range(8)]
    path.write_text("".join(json.dumps(d) + "\n" for d in [{"id": "long", "text": long}, *more]))
    config.memory.reference_length, config.text.vocabulary = 40, 600
    config.knowledge.words_min = 0
    _prepare(config, tmp_path / "all", str(path), workers=0, questions=[])
    whole = References(tmp_path / "all/references")
    first = whole.texts(whole.of_document("long"))
    assert len(first) > 3 and whole.of_document("nobody") == []
    _prepare(
        config, tmp_path / "some", str(path), workers=0, questions=[" ".join(first[0].split())]
    )
    some = References(tmp_path / "some/references")
    assert some.lookup("long#0") is None
    assert some.texts(some.of_document("long")) == first[1:]
    assert some.of_document("nobody") == [] and some[some.find("long#1")].text == first[1]
