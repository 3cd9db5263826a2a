"""JSON lines, plain or gzipped: reading, decoding, parsing."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from m3jax.errors import TextError, UserError

_Item = TypeVar("_Item")


def json_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yields the lines of a `.jsonl` or `.jsonl.gz` file as bytes, blank ones included.

    Raises `TextError` at the damaged or truncated place of a gzip file.
    """
    line = 0
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            for line, data in enumerate(file, start=1):  # noqa: B007 (named in the error below)
                yield data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TextError(
            f"{path} is truncated or damaged after line {line} ({error}); fetch it again"
        ) from error


def decode(data: bytes) -> str:
    """Decodes UTF-8, dropping a byte-order mark; raises `ValueError` naming an invalid byte."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = f"0x{data[error.start]:02x} at byte {error.start}"
        raise ValueError(f"not UTF-8: byte {byte}; convert the file to UTF-8") from error


def json_object(data: bytes, form: str = "an object") -> dict[str, Any]:
    """Parses a JSON object; raises `ValueError` if `data` is not UTF-8, JSON or an object.

    `form` describes the object expected, for the message.
    """
    text = decode(data)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also integers of 5000 digits
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}; expected {form}")
    return value


def answer_text(value: Any, what: str = "answer") -> str:
    """Returns an answer as text: a number as it is written, any other text unchanged.

    Raises `TypeError` for another type, `ValueError` for an empty or blank text; messages call the
    value `what`.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise TypeError(f"{what}: {type(value).__name__} in place of a text or a number")
    if not value.strip():
        raise ValueError(f"an empty {what}")
    return value


def read_records(
    path: str | os.PathLike[str],
    parse: Callable[[Any], _Item],
    what: str,
    form: str,
    *,
    most: int | None = None,
    error: type[UserError] = TextError,
) -> list[_Item]:
    """Reads and parses every line of a JSON-lines file; blank lines are skipped.

    Args:
      parse: makes an item from the parsed JSON of a line, or raises ValueError, KeyError,
        TypeError, AttributeError or StopIteration if the line has another form.
      what: plural noun for the items, used in messages.
      form: form of a line, used in messages, such as `{"prompt": text, "answer": text}`.
      most: most items to read; None = all.
      error: class of the error raised if the file cannot be opened, a line has another form, or the
        file has no items. A damaged gzip file raises `TextError`.
    """
    items: list[_Item] = []
    try:
        numbered = ((n, data) for n, data in enumerate(json_lines(path), 1) if data.strip())
        for number, data in itertools.islice(numbered, most):
            try:
                items.append(parse(json.loads(decode(data))))
            except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as wrong:
                raise error(f"{path}:{number}: expected {form} ({wrong!r})") from wrong
            except RecursionError as wrong:
                raise error(f"{path}:{number}: expected {form} (nested too deeply)") from wrong
    except OSError as wrong:
        raise error(f"{Path(path)} cannot be read ({wrong}); name a file of JSON lines") from wrong
    if not items:
        raise error(f"{path} holds no {what}; give lines of {form}")
    return items
