"""Blocks of documents of a few megabytes: units of work that processes share, in reading order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from m3jax.errors import TextError
from m3jax.text.documents import (
    Document,
    count_tfds,
    find_files,
    parquet_groups,
    parquet_rows,
    parse_line,
    read_text_file,
    tfds_examples,
)
from m3jax.text.jsonl import json_lines

BLOCK_BYTES = 4 << 20
_MOST = 1 << 16  # documents of a block of lines, files or examples
_EXAMPLES = 1024  # examples of TensorFlow Datasets, and files, in a block
INDEX_BITS, BLOCK_BITS, SOURCE_BITS = 24, 20, 20  # of a document's number


@dataclass(frozen=True)
class BlockSource:
    """Names files that one process reads from beginning to end.

    Attributes:
      number: place among all sources.
      parts: a `.jsonl`, `.jsonl.gz` or `.parquet` file, a `tfds:…` part, or some text files.
    """

    number: int
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Names or holds some neighbouring documents of a source.

    Attributes:
      name: `<source>-<block>`, in digits, so that names sort in reading order.
      parts: as of the source; of text files those of the block.
      first: number of the first line (from 1), row group or example.
      count: lines, rows or examples.
      lines: the lines themselves, of files of JSON lines.
      row: number of the first row of a row group, from 1.
    """

    name: str
    parts: tuple[str, ...]
    first: int
    count: int
    lines: tuple[bytes, ...] = ()
    row: int = 1


@dataclass(frozen=True)
class Unreadable:
    """Says why a line, row or file is no document."""

    reason: str


def number_of(name: str, index: int) -> int:
    """Numbers a document, from its block's name and place, so that order is reading order."""
    source, block = map(int, name.split("-"))
    return (source << (BLOCK_BITS + INDEX_BITS)) | (block << INDEX_BITS) | index


def place_of(number: int) -> tuple[str, int]:
    """Inverts `number_of`: returns the block's name and the place."""
    block = number >> INDEX_BITS
    source, block = block >> BLOCK_BITS, block & ((1 << BLOCK_BITS) - 1)
    return _name(source, block), number & ((1 << INDEX_BITS) - 1)


def _name(source: int, block: int) -> str:
    return f"{source:07d}-{block:07d}"


def sources_of(spec: str) -> list[BlockSource]:
    """Lists the sources of a spec (`find_files`), in reading order.

    Raises:
      TextError: what `find_files` raises, or more sources than documents can be numbered by.
    """
    gathered: list[list[str]] = []
    size = 0
    for part in find_files(spec):
        is_text = part.endswith(".txt") and not part.startswith("tfds:")
        small = is_text and gathered and gathered[-1][-1].endswith(".txt")
        if small and size < BLOCK_BYTES and len(gathered[-1]) < _EXAMPLES:
            gathered[-1].append(part)
        else:
            gathered.append([part])
            size = 0
        size += os.path.getsize(part) if is_text else 0
    if len(gathered) >= 1 << SOURCE_BITS:
        raise TextError(f"{spec!r} names {len(gathered)} files; join them to fewer")
    return [BlockSource(number, tuple(parts)) for number, parts in enumerate(gathered)]


def blocks_of(sources: Iterable[BlockSource], limit: int | None = None) -> Iterator[Block]:
    """Yields the blocks of sources, one at a time.

    `limit` is the most lines, rows, files or examples of all; blank lines do not count; None = all.
    """
    left = limit if limit is not None else 1 << 62
    for source in sources:
        for block, (first, count, lines, row) in enumerate(_cut(source, left)):
            if block >= 1 << BLOCK_BITS:
                raise TextError(f"{source.parts[0]} is too large for one file; split it")
            texts = source.parts[0].endswith(".txt")
            parts = source.parts[:count] if texts else source.parts
            yield Block(_name(source.number, block), parts, first, count, lines, row)
            left -= sum(1 for line in lines if line.strip()) if lines else count


def _cut(source: BlockSource, left: int) -> Iterator[tuple[int, int, tuple[bytes, ...], int]]:
    """Yields first, count, lines and first row of every block."""
    part = source.parts[0]
    if part.startswith("tfds:"):
        total = min(count_tfds(part), left)
        for low in range(0, total, _EXAMPLES):
            yield low, min(_EXAMPLES, total - low), (), 1
    elif part.endswith(".txt"):
        if left:
            yield 0, min(len(source.parts), left), (), 1
    elif part.endswith(".parquet"):
        row = 1
        for group, rows in enumerate(parquet_groups(Path(part))):
            if row - 1 < left:
                yield group, min(rows, left - row + 1), (), row
            row += rows
    else:
        yield from _cut_lines(Path(part), left)


def _cut_lines(path: Path, left: int) -> Iterator[tuple[int, int, tuple[bytes, ...], int]]:
    held: list[bytes] = []
    size, first = 0, 1
    for number, line in enumerate(json_lines(path), start=1):
        if left <= 0:
            break
        held.append(line)
        size += len(line)
        left -= bool(line.strip())
        if size >= BLOCK_BYTES or len(held) >= _MOST:
            yield first, len(held), tuple(held), 1
            held, size, first = [], 0, number + 1
    if held:
        yield first, len(held), tuple(held), 1


def read_block(block: Block, strict: bool) -> Iterator[Document | Unreadable]:
    """Yields the documents of a block, white space only included, blank lines not.

    Raises:
      TextError: `strict` and something is unreadable, which otherwise is yielded; a file that
        cannot be opened or is damaged.
    """
    for place, make in enumerate(_makers(block)):
        if place >= block.count:
            break
        try:
            yield make()
        except TextError as error:
            if strict:
                raise
            yield Unreadable(str(error))


def _makers(block: Block) -> Iterator[Callable[[], Document]]:
    """Yields, for every document of a block, a function that makes it or raises `TextError`."""
    part = block.parts[0]
    if part.startswith("tfds:"):
        yield from tfds_examples(part, block.first, block.first + block.count)
    elif part.endswith(".txt"):
        for name in block.parts:
            yield partial(read_text_file, Path(name))
    elif part.endswith(".parquet"):
        yield from parquet_rows(Path(part), block.first, block.row)
    else:
        for number, line in enumerate(block.lines, start=block.first):
            if line.strip():
                yield partial(parse_line, line, Path(part), number)
