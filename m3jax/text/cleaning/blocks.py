"""Blocks of documents of a few megabytes: units of work that processes share, in reading order."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from m3jax.errors import TextError
from m3jax.text.documents import Document, find_files, makers, open_tfds, parquet_groups
from m3jax.text.jsonl import json_lines

BLOCK_BYTES = 4 << 20
_MOST = 1 << 16  # documents of a block of lines, files or examples
_EXAMPLES = 1024  # examples of TensorFlow Datasets, and files, in a block
INDEX_BITS, BLOCK_BITS, SOURCE_BITS = 24, 20, 20  # of a document's number


class BlockSource(NamedTuple):
    """Names a file, a `tfds:…` part, or some text files, that one process cuts into blocks."""

    number: int  # among all sources
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Names or holds some neighbouring documents of a source."""

    name: str  # `<source>-<block>`, in digits, so that names sort in reading order
    parts: tuple[str, ...]  # as of the source; of text files those of the block
    first: int  # number of the first line, row or example, from 0
    count: int  # lines, rows, examples or files
    lines: tuple[bytes, ...] = ()  # of files of JSON lines


def number_of(name: str, index: int) -> int:
    """Numbers a document, from its block's name and place, so that order is reading order."""
    source, block = map(int, name.split("-"))
    return (source << (BLOCK_BITS + INDEX_BITS)) | (block << INDEX_BITS) | index


def place_of(number: int) -> tuple[str, int]:
    """Inverts `number_of`: returns the block's name and the place."""
    rest, index = divmod(number, 1 << INDEX_BITS)
    return _name(*divmod(rest, 1 << BLOCK_BITS)), index


def _name(source: int, block: int) -> str:
    return f"{source:07d}-{block:07d}"


def sources_of(spec: str) -> list[BlockSource]:
    """Lists the sources of a spec (`find_files`) in reading order; `TextError` for too many."""
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
    left = sys.maxsize if limit is None else limit
    for source in sources:
        for block, (first, count, lines) in enumerate(_cut(source, left)):
            if block >= 1 << BLOCK_BITS:
                raise TextError(f"{source.parts[0]} is too large for one file; split it")
            parts = source.parts[:count]  # one, or text files
            yield Block(_name(source.number, block), parts, first, count, lines)
            left -= sum(1 for line in lines if line.strip()) if lines else count


def _cut(source: BlockSource, left: int) -> Iterator[tuple[int, int, tuple[bytes, ...]]]:
    """Yields first, count and lines of every block."""
    part = source.parts[0]
    if part.startswith("tfds:"):
        whole, rest = divmod(len(open_tfds(part)), _EXAMPLES)
        counts = [_EXAMPLES] * whole + [rest] * (rest > 0)
    elif part.endswith(".txt"):
        counts = [len(source.parts)]
    elif part.endswith(".parquet"):
        counts = parquet_groups(part)
    else:
        yield from _cut_lines(part, left)
        return
    for first, count in zip(itertools.accumulate(counts, initial=0), counts, strict=False):
        if first < left:
            yield first, min(count, left - first), ()


def _cut_lines(path: str, left: int) -> Iterator[tuple[int, int, tuple[bytes, ...]]]:
    held: list[bytes] = []
    size = first = 0
    for number, line in enumerate(json_lines(path), start=1):
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


def read_block(block: Block) -> Iterator[Document | TextError]:
    """Yields the documents of a block, white space only included, blank lines not.

    Of what is unreadable the error is yielded; one of a file that cannot be opened is raised.
    """
    lines = block.lines or None
    documents = (make for part in block.parts for make in makers(part, block.first, lines))
    for make in itertools.islice(documents, block.count):
        try:
            yield make()
        except TextError as error:
            yield error
