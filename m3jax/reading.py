"""The reader of text files: JSON lines, JSON, Parquet and plain text, as they are or compressed.

Every file that a user names is read by these functions, so that byte-order marks, line ends, blank
lines, compression, and what is wrong with a file are the same everywhere. Messages begin with the
file and the line (`questions.jsonl:3: …`).
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from m3jax.errors import TextError
from m3jax.optional import optional

ROWS = (".jsonl", ".json", ".parquet")  # endings of files of rows
_COMPRESSED = (".gz", ".zst")
_CHUNK = 1 << 17  # bytes read at a time
_PARQUET_ROWS = 1024  # rows converted at a time
_ESCAPED = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a surrogate pair, or a lone surrogate
# Errors of the file system for which a path is to blame, not the machine.
_OF_PATHS = (
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO),
)
_WIDE = (b"\xff\xfe", b"\xfe\xff")  # byte-order marks of UTF-16 and UTF-32

_Item = TypeVar("_Item")


# -- names -----------------------------------------------------------------------------------------
def ending(path: str | os.PathLike[str]) -> str:
    """Returns a file's ending in lower case, without that of its compression: `.jsonl`."""
    return os.path.splitext(_uncompressed(os.fspath(path).lower()))[1]


def stem(path: str | os.PathLike[str]) -> str:
    """Returns a path without the endings of its format and its compression."""
    name = os.fspath(path)
    return os.path.splitext(name[: len(_uncompressed(name.lower()))])[0]


def _uncompressed(name: str) -> str:
    if name.endswith((".parquet.gz", ".parquet.zst")):
        raise TextError(f"{name}: Parquet files are compressed inside; decompress it")
    return next((name.removesuffix(c) for c in _COMPRESSED if name.endswith(c)), name)


# -- bytes and text --------------------------------------------------------------------------------
def read_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yields the lines of a file, decompressed, as bytes with their ends, blank ones included.

    Raises `TextError` for a file that cannot be read, or where its compression is damaged.
    """
    number = 0
    with _reported(path, lambda: f"after line {number}"), _opened(path) as file:
        for number, data in enumerate(file, start=1):  # noqa: B007 (named in the message)
            yield data


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Reads a file, decompressed; raises as `read_lines`."""
    with _reported(path, lambda: ""), _opened(path) as file:
        return file.read()


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a file as UTF-8 with its line ends; raises as `read_lines`, or for an invalid byte."""
    data = read_bytes(path)
    try:
        return decode(data)
    except ValueError as error:
        raise TextError(f"{path}:{_line_of(error)}: {error}") from error


def text_lines(path: str | os.PathLike[str]) -> list[str]:
    r"""Reads the lines of a text file that are not blank, without their ends (\n, \r\n or \r)."""
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    return [line for line in text.split("\n") if line.strip()]


class _DataError(ValueError):
    """Raised for data that is not UTF-8 or not JSON, in the line `line` of it, from 1.

    `several` is True for several values of JSON behind one another.
    """

    def __init__(self, reason: str, line: int = 1, several: bool = False) -> None:
        super().__init__(reason)
        self.line, self.several = line, several


def _line_of(error: ValueError) -> int:
    return error.line if isinstance(error, _DataError) else 1


def decode(data: bytes) -> str:
    """Decodes UTF-8, dropping a byte-order mark; raises `ValueError` naming an invalid byte."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        wide = "; it looks like UTF-16" if data.startswith(_WIDE) else ""
        byte = f"0x{data[error.start]:02x} at byte {error.start}"
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"not UTF-8: byte {byte}{wide}; convert the file to UTF-8"
        raise _DataError(reason, line) from error


@contextlib.contextmanager
def _reported(path: str | os.PathLike[str], place: Callable[[], str]) -> Iterator[None]:
    """Raises `TextError` in place of the errors of a path and of compressions."""
    try:
        yield
    except FileNotFoundError as error:
        raise TextError(f"{path} does not exist; name a file") from error
    except IsADirectoryError as error:
        raise TextError(f"{path} is a folder; name a file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        where = " ".join(filter(None, ("is truncated or damaged", place())))
        raise TextError(f"{path} {where} ({error}); fetch it again") from error
    except OSError as error:
        if error.errno not in _OF_PATHS:
            raise  # of the machine, as too many open files
        raise TextError(f"{path} cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    name = os.fspath(path).lower()
    with open(path, "rb") as file:
        if name.endswith(_COMPRESSED) and not file.peek(1):
            raise EOFError("it is empty")
        if name.endswith(".gz"):
            yield gzip.GzipFile(fileobj=file)  # type: ignore[misc]
        elif name.endswith(".zst"):
            zstandard = optional("zstandard", f"{path} needs zstandard", "zstandard")
            yield io.BufferedReader(_Zstandard(file, zstandard), _CHUNK)
        else:
            yield file


class _Zstandard(io.RawIOBase):
    """Decompresses all frames of a Zstandard file; raises `EOFError` where the last is cut short.

    The readers of the library stop at the end of the first frame, or where a file is cut.
    """

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        self._file, self._library = file, zstandard
        self._frame: Any = None
        self._left, self._ready = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._left or self._file.read(_CHUNK)
            if not data:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._ready = self._decompressed(data)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _decompressed(self, data: bytes) -> bytes:
        if self._frame is None:
            # The default refuses frames of a window above 128 MiB (zstd --long).
            largest = 1 << 31
            decompressor = self._library.ZstdDecompressor(max_window_size=largest)
            self._frame = decompressor.decompressobj()
        try:
            text = self._frame.decompress(data)
        except self._library.ZstdError as error:
            raise EOFError(str(error)) from error
        self._left = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame
        return text


# -- rows ------------------------------------------------------------------------------------------
class Row(NamedTuple):
    """Line of JSON lines, item of a JSON list, or row of a Parquet file.

    Attributes:
      where: file and place, to begin messages with.
      number: number of the line, item or row in the file, from 1.
      content: the line, or what was parsed already.
    """

    where: str
    number: int
    content: Any

    def fields(self, form: str = "an object") -> dict[str, Any]:
        """Returns the fields that are not null; raises `TextError` for JSON that is no object.

        `form` describes the object expected, for the message.
        """
        try:
            value = self.content
            if isinstance(value, bytes):
                value = parse_json(value)
            if not isinstance(value, dict):
                raise ValueError(f"a JSON {type(value).__name__}; expected {form}")
        except ValueError as error:
            raise TextError(f"{self.where}: {error}") from error
        return {name: field for name, field in value.items() if field is not None}


def rows(
    path: str | os.PathLike[str],
    first: int = 0,
    given: Iterable[bytes] | None = None,
    unread: Counter[str] | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Yields the rows of a file; blank lines of JSON lines are left out.

    A file of another ending than `ROWS` is read as JSON lines.

    Args:
      path: a file.
      first: number, from 0, of the line or item to begin at, or row that begins a row group.
      given: lines of a file of JSON lines from `first` on; default: read from the file.
      unread: counts `blank lines`.
      columns: columns of a Parquet file to read; default all.

    Raises:
      TextError: as `read_lines`; invalid JSON in a file .json; a Parquet file that is damaged; a
        library is missing.
    """
    unread = Counter() if unread is None else unread
    if ending(path) == ".parquet":
        yield from _parquet_rows(Path(path), first, columns)
        return
    if ending(path) == ".json":
        value = read_json(path)
        if not isinstance(value, _Lines):
            items = value if isinstance(value, list) else [value]
            for number, item in enumerate(items[first:], first + 1):
                yield Row(f"{path}: item {number}", number, item)
            return
        given = itertools.islice(value.lines, first, None)
    for number, data in enumerate(read_lines(path) if given is None else given, first + 1):
        if data.strip():
            yield Row(f"{path}:{number}", number, data)
        else:
            unread["blank lines"] += 1


class _Lines(NamedTuple):
    lines: list[bytes]


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a file .json; raises as `read_lines`, and for invalid JSON, with the line.

    Returns the parsed value; several values behind one another are JSON lines, for `rows`.
    """
    data = read_bytes(path)
    try:
        return parse_json(data)
    except ValueError as error:
        if isinstance(error, _DataError) and error.several:
            return _Lines(data.splitlines(keepends=True))
        raise TextError(f"{path}:{_line_of(error)}: {error}") from error


def parse_json(data: bytes) -> Any:
    """Parses JSON in UTF-8; raises `ValueError`.

    Refused are also a name that an object has twice, NaN and infinities, and lone surrogates.
    """
    text = decode(data)
    try:
        value = _JSON.decode(text)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg} (column {error.colno})"
        raise _DataError(reason, error.lineno, error.msg == "Extra data") from error
    except RecursionError as error:
        raise ValueError("not valid JSON: nested too deeply") from error
    except ValueError as error:  # also integers of 5000 digits
        raise ValueError(f"not valid JSON: {error}") from error
    if _ESCAPED.search(data):
        _refuse_surrogates(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise ValueError(f"the field {twice!r} occurs twice; leave one out")
    return fields


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _refuse_surrogates(value: Any, name: str = "a text") -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_surrogates(key, "a name")
            _refuse_surrogates(inner, repr(key))
    elif isinstance(value, list):
        for inner in value:
            _refuse_surrogates(inner, name)
    elif isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} is not Unicode text: lone surrogate at character {error.start}; pair or"
                " remove it"
            ) from error


# -- Parquet ---------------------------------------------------------------------------------------
def parquet_groups(path: str | os.PathLike[str]) -> list[int]:
    """Returns the number of rows of every row group of a Parquet file."""
    metadata = _open_parquet(Path(path)).metadata
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def _open_parquet(path: Path) -> Any:
    pyarrow = optional("pyarrow", f"{path} needs pyarrow", "pyarrow")
    parquet = optional("pyarrow.parquet", f"{path} needs pyarrow", "pyarrow")
    with _reported(path, lambda: ""):
        path.open("rb").close()
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the machine
        raise TextError(f"{path} is no Parquet file ({error}); fetch it again") from error


def _parquet_rows(path: Path, first: int, columns: Sequence[str] | None) -> Iterator[Row]:
    pyarrow = optional("pyarrow", f"{path} needs pyarrow", "pyarrow")
    file, sizes = _open_parquet(path), parquet_groups(path)
    names = [n for n in file.schema_arrow.names if columns is None or n in columns]
    starts = [0, *itertools.accumulate(sizes)]
    if first not in starts:
        raise TextError(f"{path} has changed since its rows were counted; prepare it again")
    number = first
    groups = list(range(starts.index(first), len(sizes)))
    batches = file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=names)
    while True:
        try:
            batch = next(batches, None)
            fields = [] if batch is None else batch.to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise TextError(f"{path} is damaged after row {number} ({error})") from error
        if batch is None:
            return
        for row in fields:
            number += 1
            yield Row(f"{path}: row {number}", number, row)


# -- items -----------------------------------------------------------------------------------------
def read_records(
    path: str | os.PathLike[str],
    parse: Callable[[dict[str, Any]], _Item],
    what: str,
    form: str,
    *,
    most: int | None = None,
) -> list[_Item]:
    """Reads and parses every row of a file (`rows`).

    Args:
      parse: makes an item from the fields of a row, or raises ValueError, KeyError, TypeError,
        AttributeError or StopIteration if the row has another form.
      what: plural noun for the items, used in messages.
      form: form of a row, used in messages, such as `{"prompt": text, "answer": text}`.
      most: most items to read; None = all.

    Raises:
      TextError: as `rows`; a row has another form; the file has no rows.
    """
    items: list[_Item] = []
    for row in itertools.islice(rows(path), most):
        fields = row.fields(form)
        try:
            items.append(parse(fields))
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            reason = reason_of(error, fields)
            raise TextError(f"{row.where}: expected {form} ({reason})") from error
    if not items:
        raise TextError(f"{path} holds no {what}; give lines of {form}")
    return items


def reason_of(error: Exception, fields: Mapping[str, Any]) -> str:
    """Returns in words why the fields of a row are of another form."""
    if isinstance(error, KeyError | StopIteration):
        missing = f"no field {error.args[0]!r}" if error.args else "none of its fields"
        return f"{missing}; it has: {', '.join(fields) or 'nothing'}"
    return str(error)


def only_field(fields: Mapping[str, Any], *names: str) -> str:
    """Returns the one of the names that is among the fields; raises `KeyError` if none is.

    Raises `ValueError` if there are several: nobody can know which of them is meant.
    """
    present = [name for name in names if name in fields]
    if len(present) > 1:
        raise ValueError(f"it has {' and '.join(map(repr, present))}; leave all but one out")
    if not present:
        raise KeyError(names[0])
    return present[0]
