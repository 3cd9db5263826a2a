"""Documents, read one at a time from JSON lines, text and Parquet files, folders and TFDS."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from m3jax.errors import TextError
from m3jax.files import checksum, digest
from m3jax.text.jsonl import decode, json_lines, json_object
from m3jax.text.open_question import open_record
from m3jax.text.optional import optional
from m3jax.text.squad import read_squad

ENDINGS = (".jsonl", ".jsonl.gz", ".txt", ".parquet")
_SQUAD = ".json"  # read only if the file is named: folders hold other files of this ending
ON = "*"  # in references, last: all further chunks read the reference before it
_QUESTION = ("question", "answer", "reference")  # fields of an open question


@dataclass(frozen=True)
class Document:
    """Holds one text and where it comes from.

    Attributes:
      id: name of the document; must be unique within a knowledge base.
      text: the text; valid Unicode without lone surrogates.
      title: title, or "".
      source: file name and line (or data set and position) of the document, or "".
      no_loss: character spans `(start, end)` on which no loss is computed; an empty span at the
        text's end means that the text was cut there, so that its END token has no loss.
      references: keys of the references that the chunks of tokens read, or ids of documents that
        are one reference, one per chunk, if known in advance; "" = the chunk reads none. A last "*"
        repeats the key before it for all further chunks.
    """

    id: str
    text: str
    title: str = ""
    source: str = ""
    no_loss: tuple[tuple[int, int], ...] = ()
    references: tuple[str, ...] = ()


def find_files(spec: str) -> list[str]:
    """Lists the *parts* (files and TFDS data sets) that a spec names, in reading order.

    A spec is a comma-separated list of files, globs, folders (searched recursively for `ENDINGS`,
    sorted by path) and `tfds:NAME[:SPLIT]`, which is a part as it is. A path must not contain a
    comma. Raises `TextError` for a path that does not exist, an unknown ending, or no file at all.
    """
    files: list[str] = []
    for part in filter(None, (piece.strip() for piece in spec.split(","))):
        if part.startswith("tfds:"):
            files.append(part)
            continue
        path = Path(part)
        if path.is_dir():
            below = (p for p in path.rglob("*") if p.name.endswith(ENDINGS) and p.is_file())
            inside = sorted(map(str, below))
        elif path.is_file():
            inside = [part]
        elif glob.has_magic(part):
            inside = sorted(p for p in glob.glob(part, recursive=True) if Path(p).is_file())
        else:
            raise TextError(f"{part} does not exist; give files, globs, folders or tfds:NAME")
        if not inside:
            raise TextError(f"{part} matches no file ending in {', '.join(ENDINGS)}")
        for name in inside:
            if not name.endswith((*ENDINGS, _SQUAD)):
                accepted = ", ".join((*ENDINGS, _SQUAD))
                raise TextError(f"{name} has an unknown ending; accepted: {accepted}")
        files += inside
    if not files:
        raise TextError(f"no documents: the spec {spec!r} names no file")
    return files


def read_documents(spec: str) -> Iterator[Document]:
    r"""Yields the documents of a spec (`find_files`) one at a time, in reading order.

    JSON lines have the field `text`, and may have `id` (default `<file stem>:<line>`), `title`,
    `source` (default `<file name>:<line>`), `no_loss` (pairs of character positions) and
    `references`; other fields are ignored. A line without `text` may be an open question with
    `question` and `answer` (a text, a number, or a list of which the first is taken): it becomes
    the text `Question: …\nAnswer: …\n` with loss on the answer alone, whose chunks all read
    `reference` (or the first of `references`), if there is one. A named file .json has the format
    of SQuAD; its passages are the documents. Rows of Parquet files and examples of TensorFlow
    Datasets are read like JSON lines. A text file is one document whose id is its stem. Documents
    of white space only are skipped.

    Raises:
      TextError: as `find_files`; text that is not UTF-8 or has a lone surrogate, invalid JSON, a
        missing or mistyped field, a damaged gzip or Parquet file, each with file and line or byte;
        a data set that TFDS cannot open; a library that is not installed; no document at all.
    """
    empty = True
    for part in find_files(spec):
        for make in makers(part):
            document = make()
            if document.text.strip():
                empty = False
                yield document
    if empty:
        raise TextError(f"no documents in {spec!r}: every file is empty")


def makers(
    part: str, first: int = 0, lines: Iterable[bytes] | None = None
) -> Iterator[Callable[[], Document]]:
    """Yields one function per document of a part (`find_files`), which returns the document.

    The function raises `TextError` if its document is unreadable; the next ones may still be used.

    Args:
      part: a file, or `tfds:NAME[:SPLIT]`.
      first: number, from 0, of the line or example to begin at, or row that begins a row group.
      lines: lines of the JSON-lines file from `first` on; default: read from the file. Blank lines
        are skipped.
    """
    path = Path(part)
    if part.startswith("tfds:"):
        examples = open_tfds(part)
        for position in range(first, len(examples)):
            yield partial(_from_example, examples[position], part, position)
    elif part.endswith(".txt"):
        yield lambda: Document(path.stem, _decode(path.read_bytes(), part), source=path.name)
    elif part.endswith(".parquet"):
        yield from _parquet_rows(path, first)
    elif part.endswith(_SQUAD):
        for name, title, text, _ in read_squad(path)[first:]:
            yield partial(Document, name, text, title, path.name)
    else:
        for line, data in enumerate(json_lines(part) if lines is None else lines, first + 1):
            if data.strip():
                yield partial(_parse_line, data, path, line)


def is_validation(document: Document, share: float) -> bool:
    """Returns True if a document is held out for validation, by a hash of its id and text.

    `share` is the fraction of documents to hold out, 0 … 1; raising it only adds documents.
    """
    return int(digest(document.id, document.text)[:13], 16) < share * 16**13


def in_batches(
    documents: Iterable[Document], characters: int = 1 << 20
) -> Iterator[list[Document]]:
    """Yields lists of documents of at least `characters` characters; the last may have fewer."""
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


def _decode(data: bytes, where: str) -> str:
    try:
        return decode(data)
    except ValueError as error:
        raise TextError(f"{where} is {error}") from error


def _parse_line(data: bytes, path: Path, line: int) -> Document:
    where = f"{path}, line {line}"
    try:
        fields = json_object(data, "an object with 'text'")
    except ValueError as error:
        raise TextError(f"{where} is {error}") from error
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return _from_fields(fields, where, f"{stem}:{line}", f"{path.name}:{line}")


def _open_parquet(path: Path) -> Any:
    pyarrow = optional("pyarrow", f"{path} needs pyarrow")
    try:
        return optional("pyarrow.parquet", f"{path} needs pyarrow").ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(f"{path} is no Parquet file ({error}); fetch it again") from error


def parquet_groups(part: str) -> list[int]:
    """Returns the number of rows of every row group of a Parquet file."""
    return _group_sizes(_open_parquet(Path(part)))


def _group_sizes(file: Any) -> list[int]:
    return [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]


def _parquet_rows(path: Path, first: int) -> Iterator[Callable[[], Document]]:
    file = _open_parquet(path)
    sizes = _group_sizes(file)
    names = set(file.schema_arrow.names)
    columns = [n for n in (*Document.__dataclass_fields__, *_QUESTION) if n in names]
    starts = [0, *itertools.accumulate(sizes)]
    if first not in starts:
        raise TextError(f"{path} has changed since its rows were counted; prepare it again")
    for group in range(starts.index(first), len(sizes)):
        batches = file.iter_batches(1024, row_groups=[group], columns=columns)
        rows = (fields for batch in batches for fields in batch.to_pylist())
        for row, fields in enumerate(rows, starts[group] + 1):
            names_of_row = f"{path}, row {row}", f"{path.stem}:{row}", f"{path.name}:{row}"
            yield partial(_from_fields, fields, *names_of_row)


def _from_fields(fields: dict[str, Any], where: str, name: str, source: str) -> Document:
    """Makes a document from parsed fields; fields that are absent or null take their defaults."""
    if "text" not in fields and {"question", "answer"} <= fields.keys():
        fields = fields | _asked(fields, where)
    if "text" not in fields:
        raise TextError(f"{where} has no field 'text'; it has: {', '.join(fields) or 'nothing'}")
    values = {key: value for key, value in fields.items() if value is not None}
    name = values.get("id", name)
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    texts = {"id": name, "text": fields["text"]}
    texts |= {"title": values.get("title", ""), "source": values.get("source", source)}
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


def _asked(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Makes the fields of a document out of those of an open question."""
    try:
        question = open_record({name: value for name, value in fields.items() if value is not None})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise TextError(f"{where} is no open question with an answer ({error})") from error
    prompt = question["text"]
    text = f"{prompt} {question['answers'][0]}\n"
    reference = fields.get("reference") or next(iter(fields.get("references") or ()), None)
    return {
        "text": text,
        "no_loss": [[0, len(prompt)], [len(text), len(text)]],  # nor on the end of the text
        "references": [reference, ON] if reference else [],
    }


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


def open_tfds(part: str) -> Sequence[dict[str, Any]]:
    """Opens `tfds:NAME[:SPLIT]` (default train); raises `TextError` if TFDS fails or is missing."""
    packages = "tensorflow-datasets importlib_resources array_record"
    tfds = optional("tensorflow_datasets", f"{part} needs TensorFlow Datasets", packages)
    _, name, *split = part.split(":", 2)
    try:
        return tfds.data_source(name, split="".join(split) or "train")
    except Exception as error:  # TFDS raises many classes, with long messages
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TextError(f"{part} cannot be opened by TensorFlow Datasets: {reason}") from error


def _from_example(example: dict[str, Any], part: str, position: int) -> Document:
    where, name = f"{part}, example {position}", part.split(":", 2)[1]
    if "text" not in example:
        raise TextError(f"{where} has no feature 'text'; it has: {', '.join(example)}")
    fields = {}
    for key in ("text", "id", "title"):
        value: Any = example.get(key)
        value = value.item() if hasattr(value, "item") else value
        fields[key] = _decode(value, where) if isinstance(value, bytes) else value
    return _from_fields(fields, where, f"{name}:{position}", f"{part}:{position}")


def inputs_of(spec: str) -> list[str]:
    """Returns the names and checksums of a spec's files (`find_files`), to detect later changes.

    A `tfds:…` part is listed by its name alone.
    """
    return [
        part if part.startswith("tfds:") else f"{Path(part).name} {checksum(part)}"
        for part in find_files(spec)
    ]
