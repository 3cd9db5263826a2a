"""Documents, read one at a time from JSON lines, text and Parquet files, folders and TFDS."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from m3jax.errors import TextError
from m3jax.files import digest
from m3jax.optional import optional
from m3jax.reading import Row, decode, only_field, read_text, reason_of, rows
from m3jax.text.listing import TEXTS, TFDS, Part, list_files
from m3jax.text.open_question import open_record
from m3jax.text.squad import read_squad

ON = "*"  # in references, last: all further chunks read the reference before it
_Item = TypeVar("_Item")
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
      place: file and line (or row, or example), also of a document that names its source; "" if it
        comes from no file.
    """

    id: str
    text: str
    title: str = ""
    source: str = ""
    no_loss: tuple[tuple[int, int], ...] = ()
    references: tuple[str, ...] = ()
    place: str = field(default="", compare=False)


def read_documents(spec: str, unread: Counter[str] | None = None) -> Iterator[Document]:
    r"""Yields the documents of a spec (`list_files`) one at a time, in reading order.

    Rows of JSON lines, Parquet files or a JSON list have the field `text`, and may have `id`
    (default `<path without ending>:<line>`, with the path below the given folder), `title`,
    `source` (default `<path>:<line>`), `no_loss` (pairs of character positions) and `references`;
    other fields are ignored. A row without `text` may be an open question with `question` and
    `answer` (a text, a number, or a list of which the first is taken): it becomes the text
    `Question: …\nAnswer: …\n` with loss on the answer alone, whose chunks all read `reference` (or
    the first of `references`), if there is one. A named file .json may have the format of SQuAD;
    its passages are the documents. Examples of TensorFlow Datasets are read like rows. A text file
    is one document whose id is its path without ending. Documents of white space only are skipped.

    Args:
      spec: names the files.
      unread: counts `blank lines` and `empty documents`.

    Raises:
      TextError: as `list_files`; text that is not UTF-8 or has a lone surrogate, invalid JSON, a
        missing or mistyped field, a damaged file, each with file and line or byte; a data set that
        TFDS cannot open; a library that is not installed; no document at all.
    """
    unread, empty = Counter() if unread is None else unread, True
    for part in list_files(spec).parts:
        for make in makers(part, unread=unread):
            document = make()
            if document.text.strip():
                empty = False
                yield document
            else:
                unread["empty documents"] += 1
    if empty:
        raise TextError(f"no documents in {spec!r}: every file is empty")


def with_unique_ids(
    items: Iterable[_Item], document_of: Callable[[_Item], Document]
) -> Iterator[_Item]:
    """Yields the items; raises `TextError` at one whose document has the id of an earlier one."""
    seen: set[bytes] = set()
    for item in items:
        document = document_of(item)
        name = hashlib.blake2b(document.id.encode(), digest_size=12).digest()
        if name in seen:
            again = document.place or document.source
            again = f" (again at {again})" if again else ""
            raise TextError(
                f"duplicate document id in the knowledge base: {document.id!r} occurs"
                f" twice{again}; make ids unique, or leave them out: the default is file and line"
            )
        seen.add(name)
        yield item


def check_documents(documents: Iterable[Document], unique: bool = False) -> int:
    """Reads all documents, so that what is wrong with one is known at once; returns their number.

    Raises `TextError` as `read_documents`; if `unique`, also for an id that occurs twice.
    """
    if unique:
        documents = with_unique_ids(documents, lambda document: document)
    return sum(1 for _ in documents)


def describe_unread(spec: str, unread: Counter[str]) -> str:
    """Formats what of a spec was not read: files, and the counts of `read_documents`; or ""."""
    counts = [f"{what} ({number})" for what, number in sorted(unread.items()) if number]
    return "; ".join(filter(None, (list_files(spec).describe(), *counts)))


def makers(
    part: Part,
    first: int = 0,
    given: Iterable[bytes] | None = None,
    unread: Counter[str] | None = None,
) -> Iterator[Callable[[], Document]]:
    """Yields one function per document of a part, which returns the document.

    The function raises `TextError` if its document is unreadable; the next ones may still be used.

    Args:
      part: a file, or `tfds:NAME[:SPLIT]`.
      first: number, from 0, of the line, item or example to begin at, or row that begins a group.
      given: lines of the JSON-lines file from `first` on; default: read from the file. Blank lines
        are left out.
      unread: counts `blank lines`.
    """
    path, name = part
    if part.form == TFDS:
        examples = open_tfds(path)
        for position in range(first, len(examples)):
            yield partial(_from_example, examples[position], path, position)
    elif part.form in TEXTS:
        yield lambda: Document(part.stem, read_text(path), source=name, place=name)
    elif (passages := read_squad(path)) is not None:
        for passage in passages[first:]:
            at = f"{name}:{passage.id}"
            yield partial(Document, passage.id, passage.text, passage.title, name, place=at)
    else:
        columns = (*Document.__dataclass_fields__, *_QUESTION)
        for row in rows(path, first, given, unread, columns):
            yield partial(_from_row, row, part)


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


def _from_row(row: Row, part: Part) -> Document:
    fields = row.fields("an object with 'text'")
    return _from_fields(fields, row.where, f"{part.stem}:{row.number}", f"{part.name}:{row.number}")


def _from_fields(fields: dict[str, Any], where: str, name: str, source: str) -> Document:
    """Makes a document from parsed fields; fields that are absent or null take their defaults."""
    if {"question", "answer"} <= fields.keys():
        if "text" in fields:
            raise TextError(
                f"{where}: it has 'text' and 'question' with 'answer', which is a text of its own;"
                " leave one out"
            )
        fields = fields | _asked(fields, where)
    if "text" not in fields:
        raise TextError(f"{where}: no field 'text'; it has: {', '.join(fields) or 'nothing'}")
    name = fields.get("id", name)
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    texts = {"id": name, "text": fields["text"]}
    texts |= {"title": fields.get("title", ""), "source": fields.get("source", source)}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise TextError(f"{where}: {key!r} is {type(value).__name__}; expected a string")
    references = fields.get("references", [])
    if not isinstance(references, list) or not all(isinstance(key, str) for key in references):
        raise TextError(f"{where}: 'references' must be a list of strings, one per chunk")
    return Document(
        **texts,
        no_loss=_spans(fields.get("no_loss", []), len(texts["text"]), where),
        references=tuple(references),
        place=source,
    )


def _asked(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Makes the fields of a document out of those of an open question."""
    try:
        question = open_record(fields)
        keys = [key for key in ("reference", "references") if key in fields]
        named = fields[only_field(fields, *keys)] if keys else None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = reason_of(error, fields)
        raise TextError(f"{where}: no open question with an answer ({reason})") from error
    prompt = question["text"]
    text = f"{prompt} {question['answers'][0]}\n"
    reference = next(iter(named), None) if isinstance(named, list) else named
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
        try:
            fields[key] = decode(value) if isinstance(value, bytes) else value
        except ValueError as error:
            raise TextError(f"{where}: {error}") from error
    fields = {key: value for key, value in fields.items() if value is not None}
    return _from_fields(fields, where, f"{name}:{position}", f"{part}:{position}")
