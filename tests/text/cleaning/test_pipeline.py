"""Preparation in blocks: the same bytes for any number of processes and after any end."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from subprocess import DEVNULL, TimeoutExpired

import numpy as np
import processes
import pytest

from m3jax import config as configs
from m3jax.errors import TextError
from m3jax.printable import as_markdown
from m3jax.text.cleaning import blocks, clean, minhash, pipeline, rules, tokenize
from m3jax.text.cleaning.workers import LocalRunner
from m3jax.text.corpus import Corpus
from m3jax.text.documents import is_validation, read_documents
from m3jax.text.prepare import prepare_text
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
NAMES = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "ra", "lo")]


def _sentence(rng):
    return " ".join(rng.choice(NAMES) for _ in range(12)).capitalize() + ". "


def _texts(count, seed=0):
    rng = random.Random(seed)
    return ["".join(_sentence(rng) for _ in range(rng.randrange(8, 16))) for _ in range(count)]


def _write(path, texts, **fields):
    rows = [
        {"id": f"{path.stem}{i}", "text": text, "title": "T", **fields}
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def documents(tmp_path):
    """Two inputs; the second repeats texts of the first, and one of its own with a word changed."""
    first = _texts(60)
    second = _texts(40, seed=1) + [first[7], first[11].upper(), "too short"]
    second.append(second[3].replace(second[3].split()[50], "changed", 1))
    return ",".join([_write(tmp_path / "a.jsonl", first), _write(tmp_path / "b.jsonl", second)])


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 8000)
    config = configs.default()
    config.text.vocabulary = config.model.vocabulary = 400
    config.text.validation_share = 0.2
    config.text.shards = 3
    config.memory.reference_length = 32
    config.clean.enabled = True
    return config


def _snapshot(folder):
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def _prepare(config, folder, documents, workers=1, **options):
    said = []
    prepare_text(config, folder, documents, say=said.append, runner=LocalRunner(workers), **options)
    return said


def _left(workdir):
    return [d for name in ("train", "validation") for d in Corpus(workdir / "corpus" / name)]


def _report(workdir):
    return json.loads((workdir / "report/data/report.json").read_text())


@pytest.mark.slow
def test_without_cleaning_the_same_as_the_plain_path(config, documents, tmp_path):
    config.clean.enabled = False
    prepare_text(config, tmp_path / "plain", documents, say=lambda _: None)
    said = _prepare(config, tmp_path / "blocks", documents)
    assert [line.split(":")[0] for line in said][0] == "clean" and len(said) == 5
    in_blocks = _snapshot(tmp_path / "blocks")
    assert len([name for name in in_blocks if name.endswith(".documents")]) > 4
    assert not [name for name in in_blocks if "tokens-" in name or "pieces-" in name]
    kept = {k: v for k, v in in_blocks.items() if not k.startswith("clean/")}
    assert kept == _snapshot(tmp_path / "plain")
    prepare_text(config, tmp_path / "plain7", documents, limit=71, say=lambda _: None)
    _prepare(config, tmp_path / "blocks7", documents, limit=71)
    kept = {k: v for k, v in _snapshot(tmp_path / "blocks7").items() if k[:6] != "clean/"}
    assert kept == _snapshot(tmp_path / "plain7")


@pytest.mark.slow
def test_one_and_two_processes_make_the_same_bytes(config, documents, tmp_path):
    config.text.shuffle = 7
    more = [_write(tmp_path / f"{name}.jsonl", _texts(20, seed=i)) for i, name in enumerate("cdef")]
    documents = ",".join([documents, *more])
    one, two = tmp_path / "one", tmp_path / "two"
    blocks.BLOCK_BYTES = 4 << 20  # the other processes do not see the fixture's
    _prepare(config, one, documents, workers=1)
    _prepare(config, two, documents, workers=2)
    assert len(list((one / "clean/blocks").glob("*.documents"))) == 6
    assert _snapshot(one) == _snapshot(two)


def test_cleaned_documents_and_their_report(config, documents, tmp_path):
    workdir = tmp_path / "w"
    _prepare(config, workdir, documents)
    left = _left(workdir)
    ids = {f"a{i}" for i in range(60)} | {f"b{i}" for i in range(40)}
    assert {d.id for d in left} == ids and len(left) == 100
    read = {d.id: d for d in read_documents(documents)}
    for name in ("train", "validation"):
        for d in Corpus(workdir / f"corpus/{name}"):
            assert is_validation(read[d.id], 0.2) == (name == "validation")
    keys = References(workdir / "references").live_keys()
    assert {key.split("#")[0] for key in keys} == ids

    report = _report(workdir)
    assert report["read"]["documents"] == 104 and report["left"]["documents"] == 100
    removed = {step: pair["documents"] for step, pair in report["removed"].items()}
    assert {step: n for step, n in removed.items() if n} == {"words_min": 1, "similarity": 3}
    characters = [sum(p["characters"] for p in report["removed"].values())]
    assert report["read"]["characters"] == report["left"]["characters"] + characters[0]
    values = {s["id"]: s["value"] for s in report["samples"]["similarity"]}
    assert values["b40"] == "a7 (a.jsonl:8), 1.00" and values["b41"].startswith("a11 ")
    assert set(values) == {"b40", "b41", "b43"} and values["b43"].startswith("b3 (")
    (short,) = report["samples"]["words_min"]
    assert (short["id"], short["source"], short["value"]) == ("b42", "b.jsonl:43", "2")
    assert sum(report["words_read"].values()) == 104 == sum(report["languages_read"].values())
    assert sum(report["words_left"].values()) == 100 == sum(report["languages_left"].values())
    page = (workdir / "report/data/report.md").read_text()
    assert "| − words_min | 1 |" in page and "too short" in page and "b.jsonl:43" in page
    for picture in ("lengths", "languages"):
        data = (workdir / f"report/data/{picture}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000


def test_repairs_unicode_and_shows_it(config, tmp_path):
    texts = _texts(30)
    broken = "It\u2019s a caf\u00e9. ".encode().decode("cp1252") + texts[4]
    documents = _write(tmp_path / "a.jsonl", [*texts[:4], broken, *texts[5:]])
    _prepare(config, tmp_path / "w", documents)
    found = {d.id: d for n in ("train", "validation") for d in Corpus(tmp_path / "w/corpus" / n)}
    decoded = Tokenizer.load(tmp_path / "w/tokenizer").decode(found["a4"].tokens)
    assert decoded == "It’s a café. " + texts[4]
    report = _report(tmp_path / "w")
    assert report["repaired"]["documents"] == 1
    assert "â€™" in report["samples"]["repaired"][0]["value"]
    config.clean.repair = False
    _prepare(config, tmp_path / "v", documents)
    assert _report(tmp_path / "v")["repaired"]["documents"] == 0


def test_languages():
    """The second one is Mandarin, which py3langid takes for Wu."""
    assert clean._language(_ENGLISH) == "en"
    assert clean._language(_MANDARIN) == "zh"


_ENGLISH = "The harbour was frozen for most of the winter, and few ships came before the spring."
_MANDARIN = (
    "许栩（），字季阙，东汉时期人物，潁川郡郾县（今河南省漯河市郾城区）人。\n"
    "许栩年轻时勤读好学，通儒学，官至卫尉、太守。延熹"
)


@pytest.mark.slow
def test_shuffled_documents_are_the_same_in_another_order(config, documents, tmp_path, monkeypatch):
    def ids(folder):
        return [d.id for d in Corpus(folder / "corpus/train")]

    _prepare(config, tmp_path / "0", documents)
    config.text.shuffle = 1
    _prepare(config, tmp_path / "1", documents)
    with monkeypatch.context() as patched:
        patched.setattr(tokenize, "_BUCKET_BYTES", 2000)
        patched.setattr(minhash, "_PART_BYTES", 4000)
        patched.setattr(blocks, "BLOCK_BYTES", 20000)
        _prepare(config, tmp_path / "1b", documents)
    config.text.shuffle = 2
    _prepare(config, tmp_path / "2", documents)
    in_order, first, second = (ids(tmp_path / name) for name in "012")
    assert sorted(first) == sorted(in_order) == sorted(second)
    assert first != in_order and second not in (first, in_order)
    places = [in_order.index(name) for name in first]
    assert abs(np.corrcoef(places, range(len(places)))[0, 1]) < 0.35
    assert len(list((tmp_path / "1b/clean/compared").glob("*.drops.npy"))) > 5
    assert _report(tmp_path / "1b")["removed"] == _report(tmp_path / "1")["removed"]
    corpus = _snapshot(tmp_path / "1/corpus")
    assert corpus == _snapshot(tmp_path / "1b/corpus")  # other buckets, blocks and parts


def test_bad_input_is_counted_and_left_out(config, tmp_path):
    texts = _texts(40)
    path = tmp_path / "a.jsonl"
    _write(path, texts)
    noise = random.Random(0).randbytes(3000)
    with path.open("ab") as file:
        file.write(b'{"text": "x"}\n\n{"text": "  "}\n{broken\n')
        file.write(noise.replace(b"\n", b"") + b"\n")
        file.write(json.dumps({"id": "binary", "text": "\x00\x01\x02@\x7f" * 300}).encode() + b"\n")
        junk = " ".join(f"{i % 97}%" for i in range(300))
        file.write(json.dumps({"id": "junk", "text": junk}).encode() + b"\n")
        file.write(b'{"id": "huge", "text": "' + b"word and more " * (100_000_000 // 14) + b'"}\n')
        file.write(json.dumps({"id": "a3", "text": _texts(1, seed=9)[0]}).encode() + b"\n")
    (tmp_path / "noise.txt").write_bytes(noise)
    documents = f"{path},{tmp_path / 'noise.txt'}"
    with pytest.raises(TextError, match=r"3 of 49 lines, rows and files are unreadable.*0\.01"):
        _prepare(config, tmp_path / "w", documents)
    config.clean.unreadable_share = 0.1
    _prepare(config, tmp_path / "w", documents)
    report = _report(tmp_path / "w")
    removed = {step: pair["documents"] for step, pair in report["removed"].items()}
    assert removed["unreadable"] == 3 and removed["empty"] == 1
    assert removed["characters_max"] == 1 and removed["nonalphabetic_max"] == 1
    assert removed["words_min"] == 2  # one character, and what is left of "binary"
    reasons = " ".join(s["value"] for s in report["samples"]["unreadable"])
    assert "a.jsonl:44: not valid JSON" in reasons and "a.jsonl:45: not UTF-8" in reasons
    assert "noise.txt:1: not UTF-8" in reasons
    assert report["not_read"] == {"blank lines": 1}
    assert report["repeated_ids"] == 1
    found = [d.id for d in _left(tmp_path / "w")]
    assert sorted(found) == sorted([f"a{i}" for i in range(40)] + ["a3~a.jsonl:49"])
    config.clean.enabled = False
    with pytest.raises(TextError, match=r"a\.jsonl:44: not valid JSON"):
        _prepare(config, tmp_path / "v", documents)


def test_equal_ids_of_one_source_are_told_apart(config, tmp_path):
    for name in ("x", "y", "z"):
        (tmp_path / name).mkdir()
        _write(tmp_path / name / "a.jsonl", _texts(20, seed=ord(name)), source="wiki")
    _prepare(config, tmp_path / "w", ",".join(str(tmp_path / name) for name in "xyz"))
    ids = [d.id for d in _left(tmp_path / "w")]
    expected = [f"a{i}" for i in range(20)]
    for name in ("y", "z"):
        expected += [f"a{i}~{name}/a.jsonl:{i + 1}" for i in range(20)]
    assert sorted(ids) == sorted(expected)


def test_the_report_shows_hostile_text_as_it_is(config, tmp_path):
    evil = "\x1b[31m<script>|`\u202e*"
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / f"{evil.replace('/', '')}.csv").touch()
    rows = [{"id": f"{i}", "text": text} for i, text in enumerate(_texts(30))]
    rows.append({"id": evil, "source": evil, "title": evil, "text": f"{evil}\nshort"})
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    _prepare(config, tmp_path / "w", str(folder))
    page = (tmp_path / "w" / "report/data/report.md").read_text()
    shown = "·\\[31m&lt;script&gt;\\|\\`·\\*"
    assert f"* {shown} · {shown} **" in page
    assert f"files of other endings (1: {as_markdown(str(folder))}/{shown}.csv)" in page
    # Code of a list item; what acts on a terminal has been repaired before.
    assert "      <script>|`·*\n      short\n" in page
    assert not set(page) & {"\x1b", "\u202e"}


def test_a_long_document_goes_through_all_steps(config, tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "_PIECE", 5000)
    rng = random.Random(0)
    long = "".join(_sentence(rng) for _ in range(1000))  # a dozen pieces
    documents = _write(tmp_path / "a.jsonl", [*_texts(20), long, "Other start. " + long])
    _prepare(config, tmp_path / "w", documents)
    assert _report(tmp_path / "w")["removed"]["similarity"]["documents"] == 1


def test_quality_takes_out_what_scores_low(config, documents, tmp_path, monkeypatch):
    (tmp_path / "by_word.py").write_text(
        "class Scorer:\n    fingerprint = 'by-word'\n"
        "    def score(self, texts):\n        return [5 * (' bara ' not in t) for t in texts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TextError, match="with --quality=by_word:Scorer; a scorer and a threshold"):
        _prepare(config, tmp_path / "w", documents, quality="by_word:Scorer")
    config.clean.quality_min = 2.5
    with pytest.raises(TextError, match="with --quality=None"):
        _prepare(config, tmp_path / "w", documents)
    _prepare(config, tmp_path / "w", documents, quality="by_word:Scorer")
    low = [d for d in read_documents(documents) if " bara " in d.text]
    assert _report(tmp_path / "w")["removed"]["quality_min"]["documents"] == len(low) > 3


@pytest.mark.slow
def test_nothing_left_and_other_inputs_are_refused(config, documents, tmp_path):
    config.clean.words_min = 10**6
    with pytest.raises(TextError, match="no documents are left of .*words_min 104"):
        _prepare(config, tmp_path / "w", documents)
    config.clean.words_min = 50
    _prepare(config, tmp_path / "w", documents)  # what the unfinished run left is made again
    assert _report(tmp_path / "w")["left"]["documents"] == 100
    config.clean.similarity = 0.9
    with pytest.raises(TextError, match=r"clean was made from other.*clean\.similarity was 0\.8"):
        _prepare(config, tmp_path / "w", documents)
    config.clean.enabled = False
    with pytest.raises(TextError, match="was made from other inputs: clean.characters_max"):
        prepare_text(config, tmp_path / "w", documents)


@pytest.mark.parametrize(
    "module, name, calls",
    [
        (minhash, "groups", 2),
        *(
            pytest.param(*moment, marks=pytest.mark.slow)
            for moment in (
                (pipeline, "clean_block", 3),
                (pipeline, "decide", 1),
                (pipeline, "tokenize_block", 4),
                (tokenize, "write_array", 3),
                (pipeline, "cut_block", 2),
                (clean, "write_array", 3),
            )
        ),
    ],
)
def test_stopped_at_any_stage_and_run_again(
    config, documents, tmp_path, monkeypatch, module, name, calls
):
    _prepare(config, tmp_path / "whole", documents)
    usual, count = getattr(module, name), [0]

    def stop(*arguments, **named):
        count[0] += 1
        if count[0] == calls:
            raise KeyboardInterrupt
        return usual(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            _prepare(config, tmp_path / "w", documents)
    made = []
    monkeypatch.setattr(
        pipeline, "clean_block", lambda job, block: made.append(block.name) or _clean(job, block)
    )
    _prepare(config, tmp_path / "w", documents)
    whole = _snapshot(tmp_path / "whole")
    assert _snapshot(tmp_path / "w") == whole
    total = len([n for n in whole if n.endswith(".documents")])
    again = {(pipeline, "clean_block"): total - 2, (clean, "write_array"): total - 1}
    assert len(made) == again.get((module, name), 0)


_clean = clean.clean_block

KILLED = """
import sys
sys.path.insert(0, {root!r})
from m3jax.config import default
from m3jax.printable import as_markdown
from m3jax.text.cleaning import blocks
from m3jax.text.prepare import prepare_text
from m3jax.text.cleaning.workers import LocalRunner

if __name__ == "__main__":
    blocks.BLOCK_BYTES = 30_000
    config = default()
    config.text.vocabulary = config.model.vocabulary = 400
    config.text.validation_share, config.text.shuffle, config.clean.enabled = 0.2, 5, True
    config.memory.reference_length = 32
    workers = int(sys.argv[3])
    prepare_text(config, sys.argv[1], sys.argv[2], say=lambda _: print("|", flush=True),
                 runner=LocalRunner(workers))
"""


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(root=str(ROOT)))
    documents = _write(tmp_path / "a.jsonl", _texts(600))

    def start(folder, workers):
        return processes.start(["python", script, folder, documents, workers], stdout=DEVNULL)

    began = time.monotonic()
    assert start(tmp_path / "whole", 1).wait(processes.HANG) == 0
    usual = time.monotonic() - began
    rng, kills = random.Random(2), 0
    for attempt in range(8):
        process = start(tmp_path / "w", 1 + attempt % 2)
        try:
            process.wait(usual * rng.uniform(0.3, 0.9))
            shutil.rmtree(tmp_path / "w")  # finished: the next one begins anew
        except TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # its workers must end by themselves
            process.wait()
            kills += 1
        if kills == 3:
            break
    assert kills >= 2
    assert start(tmp_path / "w", 2).wait(processes.HANG) == 0
    assert _snapshot(tmp_path / "w") == _snapshot(tmp_path / "whole")
    processes.wait_until(lambda: not _running(str(script)))


def _running(script):
    import psutil

    own = os.getpid()
    found = (p for p in psutil.process_iter(["cmdline", "pid"]) if p.info["pid"] != own)
    return [p.info for p in found if script in " ".join(p.info["cmdline"] or [])]
