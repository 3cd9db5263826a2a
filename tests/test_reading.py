"""The reader of text files: one content in every form, and one form of every message."""

import ast
import errno
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from m3jax.errors import TextError
from m3jax.reading import (
    decode,
    ending,
    only_field,
    read_records,
    read_text,
    rows,
    stem,
    text_lines,
)

ROOT = Path(__file__).parents[1]
ROWS = [{"text": "Größe", "n": 1}, {"text": "日本\u2028x", "n": None}, {"text": "  three", "n": 3}]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
PLAIN = b"\n".join(LINES) + b"\n"


def compressed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


FORMS = {
    "plain.jsonl": PLAIN,
    "no line end.jsonl": PLAIN.rstrip(),
    "upper.JSONL": PLAIN,
    "unknown": PLAIN,
    "bom.jsonl": b"\xef\xbb\xbf" + PLAIN,
    "crlf.jsonl": PLAIN.replace(b"\n", b"\r\n"),
    "blank.jsonl": b"\n" + PLAIN.replace(b"\n", b"\n \n") + b"\r\n\n",
    "a.jsonl.gz": gzip.compress(PLAIN),
    "members.jsonl.gz": gzip.compress(LINES[0] + b"\n") + gzip.compress(b"\n".join(LINES[1:])),
    "a.jsonl.zst": compressed(PLAIN),
    "frames.jsonl.zst": compressed(PLAIN[:9]) + compressed(b"") + compressed(PLAIN[9:]),
    "long.jsonl.zst": zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=28)
    ).compress(PLAIN),
    "list.json": json.dumps(ROWS, indent=1).encode(),
    "bom list.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "lines.json": PLAIN,
    "crlf lines.json": PLAIN.replace(b"\n", b"\r\n"),
    "table.parquet": None,
}


def make(folder: Path, name: str) -> Path:
    path = folder / name
    if FORMS[name] is None:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    else:
        path.write_bytes(FORMS[name])
    return path


@pytest.mark.parametrize("name", FORMS)
def test_every_form_has_the_same_rows(tmp_path: Path, name: str) -> None:
    unread = Counter[str]()
    read = [row.fields() for row in rows(make(tmp_path, name), unread=unread)]
    assert read == [{k: v for k, v in row.items() if v is not None} for row in ROWS]
    assert unread == ({"blank lines": 6} if name == "blank.jsonl" else {})


def test_every_form_of_a_text_is_the_same(tmp_path: Path) -> None:
    for name, data in FORMS.items():
        if ".json" in name and "list" not in name and "long" not in name:
            path = tmp_path / name.replace("jsonl", "txt").replace("json", "txt")
            path.write_bytes(data)
            assert [line.strip() for line in text_lines(path)] == [
                line.decode() for line in LINES
            ], name
    (tmp_path / "mac.txt").write_bytes(b"one\rtwo\r\r")
    assert text_lines(tmp_path / "mac.txt") == ["one", "two"]
    (tmp_path / "kept.txt").write_bytes(b"\xef\xbb\xbfa\r\n b")
    assert read_text(tmp_path / "kept.txt") == "a\r\n b"


@pytest.mark.parametrize("name", [name for name in FORMS if name.endswith((".gz", ".zst"))])
def test_a_compressed_file_cut_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    """At the end of a frame or member nothing tells that there was another."""
    data, path = FORMS[name], tmp_path / name
    whole = len(list(rows(make(tmp_path, name))))
    silent = []
    for size in range(len(data)):
        path.write_bytes(data[:size])
        try:
            silent += [size] if len([row.fields() for row in rows(path)]) != whole else []
        except TextError as error:
            assert str(error).startswith(str(path)), error
    assert len(silent) == (name == "members.jsonl.gz"), silent


def test_a_bit_of_a_zstandard_file(tmp_path: Path) -> None:
    """With its checksum, which the command zstd writes, every flip is noticed or harmless."""
    data = zstandard.ZstdCompressor(write_checksum=True).compress(PLAIN)
    for place in range(len(data)):
        path = tmp_path / "a.jsonl.zst"
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            assert [row.content + b"\n" for row in rows(path)] == PLAIN.splitlines(keepends=True)
        except TextError as error:
            assert str(error).startswith(str(path))


BAD = {
    b'{"text": "\xff"}': r":3: not UTF-8: byte 0xff at byte 10; convert the file to UTF-8",
    b'{"text": ': r":3: not valid JSON: .* \(column \d+\)",
    b'{"text": "a"} {"text": "b"}': r":3: not valid JSON: Extra data \(column 15\)",
    b"[1]": r":3: a JSON list; expected an object",
    b"null": r":3: a JSON NoneType; expected an object",
    b'{"n": NaN}': r":3: not valid JSON: NaN is no number of JSON",
    b'{"n": ' + b"1" * 5000 + b"}": r":3: not valid JSON: ",
    b"[" * 100_000: r":3: not valid JSON: nested too deeply",
    b'{"a": 1, "a": 2}': r":3: not valid JSON: the field 'a' occurs twice; leave one out",
    b'{"a": {"b": ["\\ud800x"]}}': r":3: 'b' is not Unicode text: lone surrogate at character 0",
    b'{"\\udfff": 1}': r":3: a name is not Unicode text",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*LINES[:2], line, *LINES]))
    with pytest.raises(TextError, match="^" + str(path) + BAD[line]):
        [row.fields() for row in rows(path)]
    packed = tmp_path / "b.jsonl.zst"
    packed.write_bytes(compressed(path.read_bytes()))
    with pytest.raises(TextError, match="^" + str(packed) + BAD[line]):
        [row.fields() for row in rows(packed)]


def test_surrogate_pairs_are_letters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00 \\\\ud800"}')
    (row,) = rows(tmp_path / "a.jsonl")
    assert row.fields() == {"text": "😀 \\ud800"}


def _refused(number: int) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_what_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, words in (
        (tmp_path / "none.jsonl", "does not exist; name a file"),
        (tmp_path, "is a folder; name a file"),
    ):
        for read in (read_text, text_lines, lambda path: list(rows(path))):
            with pytest.raises(TextError, match=words):
                read(path)
    (tmp_path / "wide.txt").write_bytes("Größe".encode("utf-16"))
    with pytest.raises(TextError, match=r"wide\.txt:1: not UTF-8: byte 0xff.*like UTF-16"):
        read_text(tmp_path / "wide.txt")
    (tmp_path / "bad.txt").write_bytes(b"a\n\nb\xe9c")
    with pytest.raises(TextError, match=r"bad\.txt:3: not UTF-8: byte 0xe9 at byte 4"):
        read_text(tmp_path / "bad.txt")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(TextError, match=r"a\.parquet is no Parquet file"):
        list(rows(tmp_path / "a.parquet"))
    (tmp_path / "bad.json").write_bytes(b'[{"a": 1},\n{"a": \xff}]')
    with pytest.raises(TextError, match=r"bad\.json:2: not UTF-8"):
        list(rows(tmp_path / "bad.json"))
    (tmp_path / "bad.json").write_bytes(b'[{"a": 1},\n{"a": }]')
    with pytest.raises(TextError, match=r"bad\.json:2: not valid JSON"):
        list(rows(tmp_path / "bad.json"))
    monkeypatch.setattr("builtins.open", _refused(errno.EACCES))
    with pytest.raises(TextError, match=r"a\.txt cannot be read: Permission denied"):
        read_text(tmp_path / "a.txt")
    for number in (errno.EMFILE, errno.EIO, errno.ENOMEM):  # of the machine: `failures` explains
        monkeypatch.setattr("builtins.open", _refused(number))
        with pytest.raises(OSError, match=os.strerror(number)):
            read_text(tmp_path / "a.txt")
    monkeypatch.undo()
    with pytest.raises(TextError, match="compressed inside"):
        ending("a.parquet.gz")


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    path = make(tmp_path, "a.jsonl.zst")
    with pytest.raises(TextError, match=r"a\.jsonl\.zst needs zstandard: pip install zstandard"):
        list(rows(path))


def test_endings_and_stems() -> None:
    assert [ending(name) for name in ("a.JSONL.GZ", "a.b.txt", "a.gz", "a", ".jsonl")] == [
        *(".jsonl", ".txt", "", "", "")
    ]
    assert [stem(name) for name in ("x/a.b.jsonl.zst", "a.txt", "a.JSONL.GZ")] == [
        *("x/a.b", "a", "a")
    ]
    assert decode(b"\xef\xbb\xbfa") == "a"


def test_fields_of_one_meaning() -> None:
    assert only_field({"b": 1}, "a", "b") == "b"
    with pytest.raises(ValueError, match="it has 'a' and 'b'; leave all but one out"):
        only_field({"a": 1, "b": 1}, "a", "b")
    with pytest.raises(KeyError):
        only_field({}, "a", "b")


def test_records_name_the_field_that_is_missing(tmp_path: Path) -> None:
    path = make(tmp_path, "plain.jsonl")
    with pytest.raises(
        TextError, match=r"plain\.jsonl:2: expected a form \(no field 'n'; it has: text\)"
    ):
        read_records(path, lambda fields: fields["n"], "items", "a form")
    assert read_records(path, lambda fields: fields["n"], "items", "a form", most=1) == [1]
    path.write_bytes(b"\n\n")
    with pytest.raises(TextError, match=r"plain\.jsonl holds no items; give lines of a form"):
        read_records(path, lambda fields: fields, "items", "a form")


# Files of m3jax that read what m3jax itself, or another program, has written: no texts of a user.
OWN = {
    "m3jax/reading.py": "the reader",
    "m3jax/cli.py": "the null device",
    "m3jax/config_files.py": "configs, which are Python",
    "m3jax/files.py": "checksums, sealed files",
    "m3jax/store.py": "objects of folders and buckets",
    "m3jax/mirror.py": "files of published parts",
    "m3jax/published.py": "marks of published parts",
    "m3jax/region.py": "answers of Cloud Storage",
    "m3jax/workdir.py": "marks of parts",
    "m3jax/distributed.py": "messages of processes",
    "m3jax/text/records.py": "side files",
    "m3jax/text/tokenizer.py": "tokenizer.json",
    "m3jax/text/tokenizer_import.py": "tokenizer.json of a model",
    "m3jax/text/prepare.py": "marks of parts",
    "m3jax/text/chat/corpus.py": "report.json",
    "m3jax/text/cleaning": "blocks",
    "m3jax/text/reference_filter/select.py": "questions.json of a workdir",
    "m3jax/model/hf.py": "folders of models",
    "m3jax/model/hf_config.py": "folders of models",
    "m3jax/retrieval": "indices, folders of encoders",
    "m3jax/knowledge": "versions",
    "m3jax/memory": "banks",
    "m3jax/train": "checkpoints, metrics",
    "m3jax/selection/memory_value.py": "marks of parts",
    "m3jax/sweep": "logs, marks, tables",
    "m3jax/bench": "files that it has made",
    "m3jax/quickstart/real_llama.py": "marks of parts",
    "launch/quickstart.py": "its report",
}
READS = {"open", "read_text", "read_bytes", "loads", "load"}


def reads(node: ast.AST) -> bool:
    """Returns True for a call that opens or reads a file, or parses JSON, by itself."""
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Name):
        return node.func.id == "open"
    if not isinstance(node.func, ast.Attribute) or node.func.attr not in READS:
        return False
    of = ast.unparse(node.func.value)
    if node.func.attr == "open":
        return not of[:1].isupper()  # Bank.open, Index.open
    return of == "json" or node.func.attr not in ("loads", "load")


def test_no_other_reader_of_text_files() -> None:
    """A reader that is added must use m3jax.reading, or be listed with what it reads."""
    strange = {}
    for path in sorted([*(ROOT / "m3jax").rglob("*.py"), *(ROOT / "launch").glob("*.py")]):
        name = path.relative_to(ROOT).as_posix()
        if any(name == own or name.startswith(own + "/") for own in OWN):
            continue
        tree = ast.walk(ast.parse(path.read_text("utf-8")))
        places = [ast.unparse(node) for node in tree if reads(node)]
        strange |= {name: places} if places else {}
    assert not strange, f"read with m3jax.reading, or list them: {strange}"
