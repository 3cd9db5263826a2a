"""Text files of every flag of every script: one behaviour, one form of message.

Flags are found by walking the commands of the scripts: a new flag of a text file must be listed in
`LINES` with a good line, or in `NO_TEXT` or `OTHER_FILES` with what it is.
"""

import gzip
import itertools
import json
import runpy
import shutil
from pathlib import Path

import pyarrow
import pytest
import zstandard
from absl import flags
from pyarrow import parquet

from m3jax import cli
from m3jax.cli import Flag
from m3jax.errors import UserError
from m3jax.places import Place
from m3jax.text import prepare
from m3jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
SCRIPTS = {path.stem: path for path in sorted((ROOT / "launch").glob("*.py"))}
CONFIG = """
from m3jax.config import default, parse_options, validate


def get_config(options=""):
    config = default()
    config.stage = parse_options(options, stage=("warmup", "sft", "dpo"))["stage"]
    if config.stage in ("sft", "dpo"):
        config.data.packing = "chats" if config.stage == "sft" else "pairs"
    config.knowledge.enabled = True
    config.model.vocabulary = config.text.vocabulary = 700
    config.text.validation_share = 0.2
    return validate(config)
"""
QUESTION = {"question": "Who is {}?", "answer": "{}"}
# A good line for every flag of a text file, by "script command flag"; {} is a number.
LINES = {
    "prepare  documents": {"text": "Text {}."},
    "prepare  knowledge": {"text": "Text {}."},
    "prepare  questions": QUESTION,
    "prepare chats chats": {"prompt": "Who is {}?", "response": "{}"},
    "prepare quality labelled": {"text": "Text {}.", "score": 3},
    "edit_bank add documents": {"text": "Text {}."},
    "edit_bank replace documents": {"text": "Text {}."},
    "evaluate questions questions": QUESTION,
    "evaluate questions shots": QUESTION,
    "evaluate tasks tasks": QUESTION,
    "evaluate retrieval queries": {"text": "Text {}."},
    "evaluate retrieval questions": QUESTION,
    "evaluate leakage against": {"prompt": "Text {}."},
    "evaluate needle needles": {"needle": "Text {}.", "prompt": "Who is {}?", "answer": "{}"},
    "generate  prompts": {"prompt": "Who is {}?"},
    "select_memory worth documents": {"text": "Text {}."},
}
NO_TEXT = {
    "select_memory worth questions": "the format of SQuAD, one value for the whole file",
}
OTHER_FILES = {
    "sweep  sweep": "Python",
    "convert from_hf model": "weights",
    "bench inference gguf": "weights",
    "quickstart smollm2 weights": "weights",
}


def is_file_to_read(flag: Flag) -> bool:
    kind = flag.kind
    return isinstance(kind, Place) and "file" in kind.holds and kind.exists and not kind.written


def commands(script: str) -> cli.Commands:
    return runpy.run_path(str(SCRIPTS[script]))["COMMANDS"]


COMMANDS = {script: commands(script) for script in SCRIPTS}
FLAGS = {
    f"{script} {command} {flag.name}": (script, command, flag)
    for script in SCRIPTS
    for command, (_, own) in COMMANDS[script].items()
    for flag in own
    if is_file_to_read(flag) and f"{script} {command} {flag.name}" not in OTHER_FILES
}


class Stop(Exception):
    """Raised in place of the work, once the text has been read."""


def stop(*_: object, **__: object) -> None:
    raise Stop


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with a tokenizer and nothing else."""
    folder = tmp_path_factory.mktemp("text_files")
    (folder / "config.py").write_text(CONFIG)
    Tokenizer.train(["Who is it? Text. " * 9], 300, 2, 10_000).save(folder / "w" / "tokenizer")
    return folder


def call(key: str, path: Path | str, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the command with the flag's file; returns the error that it ends with, if any."""
    if key == "evaluate tasks tasks":
        pytest.importorskip("lm_eval")
    script, command, flag = FLAGS[key]
    main, own = COMMANDS[script][command]
    name = command or ("main" if command else "")
    words = [f"{script}.py", *filter(None, [name]), f"--{flag.name}={path}"]
    stage = ":stage=sft" if key == "prepare chats chats" else ""
    other = workdir / "other.jsonl"
    other.write_text('{"question": "Which?", "answer": "This."}\n')
    folder = workdir / ("w" if key == "prepare chats chats" else "none")
    shutil.rmtree(workdir / "w" / "chats", ignore_errors=True)
    given = {"config": f"{workdir}/config.py{stage}", "workdir": folder, "scorer": workdir / "s"}
    for needed in own:
        if needed.required and needed.name != flag.name:
            words.append(f"--{needed.name}={given.get(needed.name, other)}")
    values = flags.FlagValues()
    monkeypatch.setattr(prepare.Tokenizer, "train", stop)
    try:
        cli.parse(script, COMMANDS[script], words, values)
        main(values)
    except Stop:
        return ""
    except UserError as error:
        return str(error)
    return ""


def good(key: str, count: int = 6) -> list[bytes]:
    lines = []
    for number in range(count):
        line = {
            name: field.replace("{}", f"né{number}") if isinstance(field, str) else field
            for name, field in LINES[key].items()
        }
        lines.append(json.dumps(line, ensure_ascii=False).encode())
    return lines


def test_every_flag_of_a_text_file_is_listed() -> None:
    assert set(FLAGS) == {*LINES, *NO_TEXT}, "list new flags in LINES with a good line"


FORMS = {
    "plain.jsonl": b"\n".join,
    "bom.jsonl": lambda lines: b"\xef\xbb\xbf" + b"\n".join(lines),
    "crlf.jsonl": lambda lines: b"\r\n".join([*lines, b""]),
    "blank.jsonl": lambda lines: b"\n\n".join([b"", *lines, b" ", b""]),
    "packed.jsonl.gz": lambda lines: gzip.compress(b"\n".join(lines)),
    "packed.jsonl.zst": lambda lines: zstandard.compress(b"\n".join(lines)),
    "list.json": lambda lines: b"[" + b",\n".join(lines) + b"]",
}


@pytest.mark.parametrize("key", LINES)
def test_every_form_of_a_good_file_is_read(
    key: str, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, form in FORMS.items():
        path = tmp_path / name
        path.write_bytes(form(good(key)))
        error = call(key, path, workdir, monkeypatch)
        assert name not in error, (name, error)
    path = tmp_path / "table.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in good(key)]), path)
    error = call(key, path, workdir, monkeypatch)
    assert "table" not in error, error


BAD = {  # third line → words of the message
    b'{"text": "\xff", "question": "\xff"}': "{}:3: not UTF-8: byte 0xff at byte 10",
    b'{"text": ': "{}:3: not valid JSON: ",
    b"[1]": "{}:3: a JSON list",
    b'{"a": 1, "a": 2}': "{}:3: not valid JSON: the field 'a' occurs twice",
    b'{"text": "\\ud800"}': "{}:3: 'text' is not Unicode text: lone surrogate",
    b'{"strange": 1}': "{}:3: ",
}


@pytest.mark.parametrize("key", LINES)
def test_a_bad_third_line_is_named(
    key: str, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bad.jsonl"
    for (line, words), packed in itertools.product(BAD.items(), (False, True)):
        first, second, *others = good(key)
        data = b"\n".join([first, second, line, *others])
        path = tmp_path / ("bad.jsonl.zst" if packed else "bad.jsonl")
        path.write_bytes(zstandard.compress(data) if packed else data)
        error = call(key, path, workdir, monkeypatch)
        assert words.replace("{}", str(path)) in error, (line, error)


@pytest.mark.parametrize("key", FLAGS)
def test_a_file_that_cannot_be_read_is_named(
    key: str, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = zstandard.compress(b"\n".join(good(key) if key in LINES else [b"{}"]))
    for name, data, words in (
        ("none.jsonl", None, "none.jsonl"),
        ("cut.jsonl.zst", packed[:-1], "is truncated or damaged"),
        ("empty.jsonl.gz", b"", "is truncated or damaged"),
        ("no.parquet", b"PAR1", "is no Parquet file"),
        ("empty.jsonl", b"", "empty.jsonl"),
        ("blank.jsonl", b"\r\n\n", "blank.jsonl"),
    ):
        if key in NO_TEXT:
            name = name.replace(".jsonl", ".json").replace(".parquet", ".json")
            words = "no.json" if name == "no.json" else words.replace(".jsonl", ".json")
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        error = call(key, path, workdir, monkeypatch)
        assert words in error and name in error, (name, error)


def test_nothing_was_made(workdir: Path) -> None:
    """Runs last: all mistakes were known before any work."""
    assert not (workdir / "none").exists()
