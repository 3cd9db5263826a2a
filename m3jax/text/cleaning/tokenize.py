"""Tokenized blocks on disk, and a corpus joined from them in reading order or shuffled.

    <name>.bin     the block's documents as records, msgpack, one after the other, in their order
         .npy      one row a document: order, place and size of the record, counts

The order of a document is its number, or a hash of seed, id and text; so the corpus does not depend
on blocks or processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import msgpack
import numpy as np

from m3jax.files import write_array, write_atomically
from m3jax.text.cleaning.blocks import number_of
from m3jax.text.cleaning.clean import Cleaning
from m3jax.text.cleaning.dedup import Cleaned
from m3jax.text.corpus import EncodedDocument, encode_documents
from m3jax.text.documents import Document, is_validation
from m3jax.text.tokenizer import Tokenizer

_ROW = np.dtype(
    [
        ("order", "<u8"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("tokens", "<u8"),
        ("characters", "<u8"),
        ("bytes", "<u8"),
        ("validation", "?"),
    ]
)
_BUCKET_BYTES = 64 << 20  # of records that are put in order at once


@dataclass(frozen=True)
class BlockWork:
    """Names the folder of results, seen by all processes, the documents, the tokenizer's folder."""

    folder: Path
    cleaning: Cleaning
    tokenizer: Path


@dataclass(frozen=True)
class Tokenizing(BlockWork):
    """Adds the share of documents for validation, and the seed of the order (0 = as read)."""

    share: float
    shuffle: int


def tokenize_block(tokenizing: Tokenizing, name: str) -> str:
    """Tokenizes the documents of a block that are left; returns its name."""
    index = tokenizing.folder / f"{name}.npy"
    if index.is_file():
        return name
    cleaned = Cleaned(tokenizing.cleaning)
    documents = list(cleaned.block(name))
    encoded = encode_documents(documents, tokenizer_of(tokenizing.tokenizer))
    rows = np.zeros(len(documents), _ROW)
    records = []
    for i, (document, coded) in enumerate(zip(documents, encoded, strict=True)):
        records.append(msgpack.packb(coded.record))
        order = _order(document, number_of(name, i), tokenizing.shuffle)
        held_out = is_validation(document, tokenizing.share)
        counts = (len(records[-1]), coded.tokens, coded.characters, coded.bytes)
        rows[i] = (order, 0, *counts, held_out)
    places = np.argsort(rows["order"], kind="stable")
    rows = rows[places]
    rows["offset"] = np.cumsum(rows["size"]) - rows["size"]
    data = b"".join(records[i] for i in places.tolist())
    write_atomically(tokenizing.folder / f"{name}.bin", data, shared=True)
    write_array(index, rows, shared=True)
    return name


@lru_cache(maxsize=1)
def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def _order(document: Document, number: int, seed: int) -> int:
    if not seed:
        return number
    total = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"))
    for text in (document.id, document.text):
        data = text.encode()
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return int.from_bytes(total.digest(), "little")


def tokenized(tokenizing: Tokenizing, held_out: bool) -> Iterator[EncodedDocument]:
    """Yields the documents for validation, or the others, of all blocks, in their order.

    In reading order a block is held in memory at a time, shuffled about 64 MB.
    """
    names = sorted(path.stem for path in tokenizing.folder.glob("*.npy"))
    if not tokenizing.shuffle:
        for name in names:
            yield from _records(tokenizing.folder, [name], held_out, 0, 1)
        return
    total = sum((tokenizing.folder / f"{name}.bin").stat().st_size for name in names)
    buckets = max(1, -(-total // _BUCKET_BYTES))
    for bucket in range(buckets):
        yield from _records(tokenizing.folder, names, held_out, bucket, buckets)


def _records(
    folder: Path, names: list[str], held_out: bool, bucket: int, buckets: int
) -> Iterator[EncodedDocument]:
    """Yields the documents whose order is in a part of all orders, sorted."""
    low, high = (-(-(i << 64) // buckets) for i in (bucket, bucket + 1))
    documents: list[tuple[int, str, EncodedDocument]] = []
    for name in names:
        rows = np.load(folder / f"{name}.npy", mmap_mode="r")
        first = int(np.searchsorted(rows["order"], np.uint64(low)))
        last = len(rows)
        if high < 1 << 64:
            last = int(np.searchsorted(rows["order"], np.uint64(high)))
        with (folder / f"{name}.bin").open("rb") as file:
            for order, offset, size, *counts, validation in rows[first:last].tolist():
                if validation == held_out:
                    file.seek(offset)
                    record = msgpack.unpackb(file.read(size))
                    documents.append((order, name, EncodedDocument(record, *counts)))
    # Equal orders are equal documents in all that is written; the sort is stable all the same.
    documents.sort(key=lambda document: document[:2])
    for _, _, document in documents:
        yield document
