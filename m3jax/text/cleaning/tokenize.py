"""Blocks that are tokenized or cut to references, one a process, and what is joined from them.

    <name>.bin     the block's documents as records, msgpack, one after the other, in their order
         .npy      one row a document: order, place and size of the record, counts
         .pieces   the block's documents cut to references, msgpack

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
from m3jax.text.cleaning.clean import CleanFolder
from m3jax.text.cleaning.minhash import Part, keys_of_part
from m3jax.text.corpus import EncodedDocument, encode_documents
from m3jax.text.documents import Document, is_validation
from m3jax.text.reference_splitter import Piece, cut_references
from m3jax.text.tokenizer import Tokenizer

_COUNTS = ("order", "offset", "size", "tokens", "characters", "bytes")
_ROW = np.dtype([*((name, "<u8") for name in _COUNTS), ("validation", "?")])
_BUCKET_BYTES = 64 << 20  # of records that are put in order at once


@dataclass(frozen=True)
class BlockWork:
    """Names the folder of results, seen by all processes, the documents, the tokenizer's folder."""

    folder: Path
    documents: CleanFolder
    tokenizer: Path


def tokenize_block(work: BlockWork, share: float, shuffle: int, name: str) -> None:
    """Tokenizes the documents of a block that are left.

    `share` is that of the validation documents, `shuffle` the seed of the order; 0 = as read.
    """
    index = work.folder / f"{name}.npy"
    if index.is_file():
        return
    documents = list(work.documents.block(name))
    encoded = encode_documents(documents, _tokenizer(work.tokenizer))
    rows = np.zeros(len(documents), _ROW)
    records = []
    for i, (document, coded) in enumerate(zip(documents, encoded, strict=True)):
        records.append(msgpack.packb(coded.record))
        order = _order(document, number_of(name, i), shuffle)
        counts = (len(records[-1]), coded.tokens, coded.characters, coded.bytes)
        rows[i] = (order, 0, *counts, is_validation(document, share))
    places = np.argsort(rows["order"], kind="stable")
    rows = rows[places]
    rows["offset"] = np.cumsum(rows["size"]) - rows["size"]
    data = b"".join(records[i] for i in places.tolist())
    write_atomically(work.folder / f"{name}.bin", data, shared=True)
    write_array(index, rows, shared=True)


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
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


def tokenized(folder: Path, shuffle: int, held_out: bool) -> Iterator[EncodedDocument]:
    """Yields the documents for validation, or the others, of all blocks, in their order.

    In reading order a block is held in memory at a time, shuffled about 64 MB.
    """
    names = sorted(path.stem for path in folder.glob("*.npy"))
    if not shuffle:
        for name in names:
            yield from _records(folder, [name], held_out, (0, 1))
        return
    total = sum((folder / f"{name}.bin").stat().st_size for name in names)
    buckets = max(1, -(-total // _BUCKET_BYTES))
    for bucket in range(buckets):
        yield from _records(folder, names, held_out, (bucket, buckets))


def _records(
    folder: Path, names: list[str], held_out: bool, part: Part
) -> Iterator[EncodedDocument]:
    """Yields the documents whose order is in a part of all orders, sorted."""
    documents: list[tuple[int, str, EncodedDocument]] = []
    for name in names:
        rows = np.load(folder / f"{name}.npy", mmap_mode="r")
        with (folder / f"{name}.bin").open("rb") as file:
            inside = rows[keys_of_part(rows["order"], part)]
            for order, offset, size, *counts, validation in inside.tolist():
                if validation == held_out:
                    file.seek(offset)
                    record = msgpack.unpackb(file.read(size))
                    documents.append((order, name, EncodedDocument(record, *counts)))
    # Equal orders are equal documents in all that is written; the sort is stable all the same.
    documents.sort(key=lambda document: document[:2])
    for _, _, document in documents:
        yield document


def cut_block(work: BlockWork, length: int, name: str) -> None:
    """Cuts the documents of a block that are left to references of at most `length` tokens."""
    target = work.folder / f"{name}.pieces"
    if target.is_file():
        return
    documents = []
    for document in work.documents.block(name):
        pieces = [
            (piece.start, piece.end, piece.text, piece.tokens.astype("<i4").tobytes())
            for piece in cut_references(document, _tokenizer(work.tokenizer), length)
        ]
        documents.append((document.id, document.title, document.source, pieces))
    write_atomically(target, msgpack.packb(documents), shared=True)


def cut_documents(folder: Path) -> Iterator[tuple[Document, list[Piece]]]:
    """Yields the documents of all blocks, without texts, with their pieces."""
    for path in sorted(folder.glob("*.pieces")):
        for name, title, source, pieces in msgpack.unpackb(path.read_bytes()):
            cut = [Piece(a, b, text, np.frombuffer(ids, "<i4")) for a, b, text, ids in pieces]
            yield Document(name, "", title, source), cut
