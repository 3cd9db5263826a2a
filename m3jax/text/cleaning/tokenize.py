"""Tokenization of cleaned blocks, cutting of blocks into references, joining of the results.

    <name>.bin     msgpack records of the block's documents, concatenated, sorted by their order
         .npy      one row per document: order, byte offset and size of the record, counts
         .pieces   the block's documents cut into references, msgpack

A document's order is its number or, if shuffled, a hash of seed, id and text; so the corpus does
not depend on the division into blocks or the processes.
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

_COUNTS = ("order", "offset", "size", "tokens", "characters", "bytes", "lost")
_ROW = np.dtype([*((name, "<u8") for name in _COUNTS), ("validation", "?")])
_BUCKET_BYTES = 64 << 20  # of records that are sorted at once


@dataclass(frozen=True)
class BlockWork:
    """Names the folder of results (which all processes see), the documents and the tokenizer."""

    folder: Path
    documents: CleanFolder
    tokenizer: Path


def tokenize_block(work: BlockWork, share: float, shuffle: int, name: str) -> None:
    """Tokenizes the documents that cleaning kept in a block.

    Writes NAME.bin (records) and NAME.npy (their index); does nothing if the index exists. `share`
    is the fraction (0 … 1) of documents used for validation, `shuffle` the seed of the order of
    documents; 0 = reading order.
    """
    index = work.folder / f"{name}.npy"
    if index.is_file():
        return
    documents = list(work.documents.block(name))
    encodings = encode_documents(documents, _tokenizer(work.tokenizer))
    rows = np.zeros(len(documents), _ROW)
    records = []
    for i, (document, encoding) in enumerate(zip(documents, encodings, strict=True)):
        records.append(msgpack.packb(encoding.record))
        order = _order(document, number_of(name, i), shuffle)
        counts = (len(records[-1]), *encoding[1:])
        rows[i] = (order, 0, *counts, is_validation(document, share))
    by_order = np.argsort(rows["order"], kind="stable")
    rows = rows[by_order]
    rows["offset"] = np.cumsum(rows["size"]) - rows["size"]
    data = b"".join(records[i] for i in by_order.tolist())
    write_atomically(work.folder / f"{name}.bin", data, shared=True)
    write_array(index, rows, shared=True)  # last: it says that the block is done


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
    """Yields the validation (if `held_out`) or training documents of all blocks, in order.

    Holds one block in RAM at a time in reading order, about 64 MiB of records if shuffled.
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
    """Yields the documents whose order is in `part` of the 64-bit range, sorted by order."""
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
    # Documents of equal order have equal records, so it does not matter which comes first.
    documents.sort(key=lambda document: document[:2])
    for _, _, document in documents:
        yield document


def cut_block(work: BlockWork, length: int, name: str) -> None:
    """Cuts the documents of a block that cleaning kept into references of ≤ `length` tokens.

    Writes NAME.pieces; does nothing if it exists.
    """
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
    """Yields the documents of all blocks in reading order, with empty text, and their pieces."""
    for path in sorted(folder.glob("*.pieces")):
        for name, title, source, pieces in msgpack.unpackb(path.read_bytes()):
            cut = [Piece(a, b, text, np.frombuffer(ids, "<i4")) for a, b, text, ids in pieces]
            yield Document(name, "", title, source), cut
