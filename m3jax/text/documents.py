"""Documents from JSON lines, text files, folders of them and TensorFlow Datasets, one at a time."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3jax.text.files import checksum, digest

ENDINGS = (".jsonl", ".jsonl.gz", ".txt")


class TextError(ValueError):
    """Text, or a file made from text, that cannot be used. The message names it and the remedy."""


@dataclass(frozen=True)
class Document:
    """One text with where it comes from.

    Attributes:
      id: name of the document; must be unique within a knowledge base.
      text: the text; valid Unicode without lone surrogates.
      title: title, or "".
      source: file name and line (or data set and position) it was read from, or "".
      no_loss: character spans `(start, end)` of the text on which no loss is computed.
      references: keys of references known in advance, one per chunk of tokens; "" = none.
    """

    id: str
    text: str
    title: str = ""
    source: str = ""
    no_loss: tuple[tuple[int, int], ...] = ()
    references: tuple[str, ...] = ()


def find_files(spec: str) -> list[str]:
    """The parts of a spec, folders and globs expanded, in reading order.

    Args:
      spec: comma-separated files, globs, folders (searched recursively for `.jsonl`, `.jsonl.gz`
        and `.txt`, sorted by path) or `tfds:NAME[:SPLIT]`. A path must not contain a comma.

    Returns:
      Paths of files, and `tfds:…` parts as they are. A part named twice is read twice.

    Raises:
      TextError: a path that does not exist, an ending that is not known, or no file at all.
    """
    found: list[str] = []
    for part in filter(None, (piece.strip() for piece in spec.split(","))):
        if part.startswith("tfds:"):
            found.append(part)
            continue
        path = Path(part)
        if path.is_dir():
            inside = sorted(
                str(p) for p in path.rglob("*") if p.name.endswith(ENDINGS) and p.is_file()
            )
        elif path.is_file():
            inside = [part]
        elif glob.has_magic(part):
            inside = sorted(p for p in glob.glob(part, recursive=True) if Path(p).is_file())
        else:
            raise TextError(f"{part} does not exist; give files, globs, folders or tfds:NAME")
        if not inside:
            raise TextError(f"{part} matches no file ending in {', '.join(ENDINGS)}")
        for name in inside:
            if not name.endswith(ENDINGS):
                raise TextError(f"{name} has an unknown ending; accepted: {', '.join(ENDINGS)}")
        found += inside
    if not found:
        raise TextError(f"no documents: the spec {spec!r} names no file")
    return found


def read_documents(spec: str) -> Iterator[Document]:
    """Reads documents one at a time, in the order of `find_files`.

    JSON lines have the field `text`, and may have `id` (default `<file stem>:<line>`), `title`,
    `source` (default `<file name>:<line>`), `no_loss` (pairs of character positions) and
    `references`; other fields are ignored. A text file is one document whose id is its stem.
    Documents of white space only are skipped.

    Args:
      spec: see `find_files`.

    Raises:
      TextError: what `find_files` raises; text that is not UTF-8, invalid JSON, a missing or
        mistyped field, a damaged gzip file, each with file and line or byte; no document at all.
    """
    empty = True
    for part in find_files(spec):
        if part.startswith("tfds:"):
            documents = _read_tfds(part)
        elif part.endswith(".txt"):
            documents = iter([_read_text_file(Path(part))])
        else:
            documents = _read_json_lines(Path(part))
        for document in documents:
            if document.text and not document.text.isspace():
                empty = False
                yield document
    if empty:
        raise TextError(f"no documents in {spec!r}: every file is empty")


def is_validation(document: Document, share: float) -> bool:
    """Whether the document is held out: a fixed function of its id and text, for any order.

    Args:
      document: the document.
      share: share of documents to hold out, 0 … 1; raising it only adds documents.
    """
    return int(digest(document.id, document.text)[:13], 16) < share * 16**13


def in_batches(
    documents: Iterable[Document], characters: int = 1 << 20
) -> Iterator[list[Document]]:
    """The documents in lists of at least this many characters, to be worked on in parallel."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _read_text_file(path: Path) -> Document:
    return Document(id=path.stem, text=_decode(path.read_bytes(), str(path)), source=path.name)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at byte {error.start};"
            " convert the file to UTF-8"
        ) from error


def _read_json_lines(path: Path) -> Iterator[Document]:
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    line = 0
    try:
        with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as file:
            for line, data in enumerate(file, start=1):  # noqa: B007 (named in the error below)
                if data.strip():
                    yield _parse(data, path, stem, line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TextError(
            f"{path} is truncated or damaged after line {line} ({error}); fetch it again"
        ) from error


def _parse(data: bytes, path: Path, stem: str, line: int) -> Document:
    where = f"{path}, line {line}"
    try:
        fields = json.loads(_decode(data, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise TextError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise TextError(f"{where} is {type(fields).__name__}; expected an object with 'text'")
    if "text" not in fields:
        raise TextError(f"{where} has no field 'text'; it has: {', '.join(fields) or 'nothing'}")
    return _from_fields(fields, where, f"{stem}:{line}", f"{path.name}:{line}")


def _from_fields(fields: dict[str, Any], where: str, name: str, source: str) -> Document:
    """A document from parsed fields; fields that are absent or null take their defaults."""
    values = {key: value for key, value in fields.items() if value is not None}
    name = values.get("id", name)
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    texts = {"id": name, "text": fields["text"]}
    texts |= {key: values.get(key, usual) for key, usual in (("title", ""), ("source", source))}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise TextError(f"{where}: {key!r} is {type(value).__name__}; expected a string")
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise TextError(
                    f"{where}: {key!r} is not Unicode text: lone surrogate at character"
                    f" {error.start}; pair or remove it"
                ) from error
    references = values.get("references", [])
    if not isinstance(references, list) or not all(isinstance(key, str) for key in references):
        raise TextError(f"{where}: 'references' must be a list of strings, one per chunk")
    return Document(
        **texts,
        no_loss=_spans(values.get("no_loss", []), len(texts["text"]), where),
        references=tuple(references),
    )


def _spans(spans: Any, length: int, where: str) -> tuple[tuple[int, int], ...]:
    correct = isinstance(spans, list) and all(
        isinstance(span, list)
        and len(span) == 2
        and all(type(bound) is int for bound in span)
        and 0 <= span[0] <= span[1] <= length
        for span in spans
    )
    if not correct:
        raise TextError(
            f"{where}: 'no_loss' must be pairs of character positions [start, end] inside the"
            f" text's {length} characters; got {str(spans)[:80]}"
        )
    return tuple((start, end) for start, end in spans)


def _read_tfds(part: str) -> Iterator[Document]:
    """Documents of `tfds:NAME[:SPLIT]`, whose examples have a `text` and may have a `title`."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise TextError(
            f"{part} needs TensorFlow Datasets:"
            " pip install tensorflow-datasets importlib_resources array_record"
        ) from error
    _, name, *split = part.split(":", 2)
    for position, example in enumerate(
        tfds.data_source(name, split=split[0] if split else "train")
    ):
        where = f"{part}, example {position}"
        if "text" not in example:
            raise TextError(f"{where} has no feature 'text'; it has: {', '.join(example)}")
        fields = {}
        for key in ("text", "id", "title"):
            value = example.get(key)
            value = value.item() if hasattr(value, "item") else value
            fields[key] = _decode(value, where) if isinstance(value, bytes) else value
        yield _from_fields(fields, where, f"{name}:{position}", f"{part}:{position}")


def inputs_of(spec: str) -> list[str]:
    """What a spec reads, to tell later whether it changed: file names with checksums of the bytes.

    Args:
      spec: see `find_files`. `tfds:…` parts stand for themselves.
    """
    return [
        part if part.startswith("tfds:") else f"{Path(part).name} {checksum(part)}"
        for part in find_files(spec)
    ]
