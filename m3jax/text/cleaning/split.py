"""References of blocks on disk, each cut by one process: `<name>.pieces`, msgpack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgpack
import numpy as np

from m3jax.files import write_atomically
from m3jax.text.cleaning.dedup import Cleaned
from m3jax.text.cleaning.tokenize import BlockWork, tokenizer_of
from m3jax.text.documents import Document
from m3jax.text.reference_splitter import Piece, cut_references


@dataclass(frozen=True)
class Cutting(BlockWork):
    """Adds the most tokens of a reference."""

    length: int


def cut_block(cutting: Cutting, name: str) -> str:
    """Cuts the documents of a block that are left; returns its name."""
    target = cutting.folder / f"{name}.pieces"
    if target.is_file():
        return name
    tokenizer = tokenizer_of(cutting.tokenizer)
    documents = []
    for document in Cleaned(cutting.cleaning).block(name):
        pieces = [
            (piece.start, piece.end, piece.text, piece.tokens.astype("<i4").tobytes())
            for piece in cut_references(document, tokenizer, cutting.length)
        ]
        documents.append((document.id, document.title, document.source, pieces))
    write_atomically(target, msgpack.packb(documents), shared=True)
    return name


def cut_documents(cutting: Cutting) -> Iterator[tuple[Document, list[Piece]]]:
    """Yields the documents of all blocks, without texts, with their pieces."""
    for path in sorted(cutting.folder.glob("*.pieces")):
        for name, title, source, pieces in msgpack.unpackb(path.read_bytes()):
            cut = [Piece(a, b, text, np.frombuffer(ids, "<i4")) for a, b, text, ids in pieces]
            yield Document(name, "", title, source), cut
