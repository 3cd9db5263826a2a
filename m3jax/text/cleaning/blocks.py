"""Blocks of neighbouring documents, a few megabytes each: the tasks of parallel cleaning."""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from m3jax.errors import TextError
from m3jax.reading import parquet_groups, read_lines, rows
from m3jax.text.documents import Document, makers, open_tfds
from m3jax.text.listing import TEXTS, TFDS, Part, list_files
from m3jax.text.squad import read_squad

BLOCK_BYTES = 4 << 20
_MOST = 1 << 16  # most lines of a block
_EXAMPLES = 1024  # most examples of TensorFlow Datasets, or text files, of a block
INDEX_BITS, BLOCK_BITS, SOURCE_BITS = 24, 20, 20  # bits of the fields of a document's number


class BlockSource(NamedTuple):
    """Names a file, a data set, or several text files, which one process cuts into blocks."""

    number: int  # index among all sources
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Block:
    """Describes a run of documents of a source; of JSON-lines files it holds the lines."""

    name: str  # `<source>-<block>`, in digits, so that names sort in reading order
    parts: tuple[Part, ...]  # the source's file or data set, or its text files
    first: int  # number of the first line, row or example, from 0
    count: int  # lines, rows, examples or files
    lines: tuple[bytes, ...] = ()  # the lines of a JSON-lines file


def number_of(name: str, index: int) -> int:
    """Returns the number of a document, by block and index in it; sorts in reading order."""
    source, block = map(int, name.split("-"))
    return (source << (BLOCK_BITS + INDEX_BITS)) | (block << INDEX_BITS) | index


def place_of(number: int) -> tuple[str, int]:
    """Inverts `number_of`: returns the block's name and the document's index in the block."""
    rest, index = divmod(number, 1 << INDEX_BITS)
    return _name(*divmod(rest, 1 << BLOCK_BITS)), index


def _name(source: int, block: int) -> str:
    return f"{source:07d}-{block:07d}"


def sources_of(spec: str) -> list[BlockSource]:
    """Lists the sources of a spec (`list_files`) in reading order; `TextError` for 2²⁰ or more."""
    gathered: list[list[Part]] = []
    size = 0
    for part in list_files(spec).parts:
        is_text = part.form in TEXTS
        small = is_text and gathered and gathered[-1][-1].form in TEXTS
        if small and size < BLOCK_BYTES and len(gathered[-1]) < _EXAMPLES:
            gathered[-1].append(part)
        else:
            gathered.append([part])
            size = 0
        size += os.path.getsize(part.path) if is_text else 0
    if len(gathered) >= 1 << SOURCE_BITS:
        raise TextError(f"{spec!r} names {len(gathered)} files; join them to fewer")
    return [BlockSource(number, tuple(parts)) for number, parts in enumerate(gathered)]


def blocks_of(sources: Iterable[BlockSource], limit: int | None = None) -> Iterator[Block]:
    """Yields the blocks of sources, one at a time.

    `limit` is the most lines (blank ones do not count), rows, files or examples in total; None =
    all. Raises `TextError` for a source of more than 2²⁰ blocks.
    """
    left = sys.maxsize if limit is None else limit
    for source in sources:
        for block, (first, count, lines) in enumerate(_cut(source, left)):
            if block >= 1 << BLOCK_BITS:
                raise TextError(f"{source.parts[0].path} is too large for one file; split it")
            parts = source.parts[:count]  # a single part, or all text files
            yield Block(_name(source.number, block), parts, first, count, lines)
            left -= sum(1 for line in lines if line.strip()) if lines else count


def _cut(source: BlockSource, left: int) -> Iterator[tuple[int, int, tuple[bytes, ...]]]:
    """Yields `Block.first`, `count` and `lines` of every block of a source."""
    path, form = source.parts[0].path, source.parts[0].form
    if form == TFDS:
        whole, rest = divmod(len(open_tfds(path)), _EXAMPLES)
        counts = [_EXAMPLES] * whole + [rest] * (rest > 0)
    elif form in TEXTS:
        counts = [len(source.parts)]
    elif form == ".parquet":
        counts = parquet_groups(path)
    elif form == ".json":
        passages = read_squad(path)
        counts = [sum(1 for _ in rows(path)) if passages is None else len(passages)]
    else:
        yield from _cut_lines(path, left)
        return
    for first, count in zip(itertools.accumulate(counts, initial=0), counts, strict=False):
        if first < left:
            yield first, min(count, left - first), ()


def _cut_lines(path: str, left: int) -> Iterator[tuple[int, int, tuple[bytes, ...]]]:
    held: list[bytes] = []
    size = first = 0
    for number, line in enumerate(read_lines(path), start=1):
        if left <= 0:
            break
        held.append(line)
        size += len(line)
        left -= bool(line.strip())
        if size >= BLOCK_BYTES or len(held) >= _MOST:
            yield first, len(held), tuple(held)
            held, size, first = [], 0, number
    if held:
        yield first, len(held), tuple(held)


def read_block(block: Block, unread: Counter[str]) -> Iterator[Document | TextError]:
    """Yields the documents of a block, also if they are only white space, but no blank lines.

    For an unreadable document its `TextError` is yielded; that of an unreadable file is raised.
    `unread` counts `blank lines`.
    """
    given = block.lines or None
    documents = (make for part in block.parts for make in makers(part, block.first, given, unread))
    for make in itertools.islice(documents, block.count):
        try:
            yield make()
        except TextError as error:
            yield error
