"""Knowledge base: references cut from documents, each traceable to its text."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt64

from m3jax.errors import TextError
from m3jax.text.documents import Document, in_batches
from m3jax.text.records import Records, RecordWriter, dtype_of_tokens
from m3jax.text.reference_splitter import Piece, cut_references
from m3jax.text.tokenizer import PAD, Tokenizer

_KIND = "references"
_BLOCK = 1024  # references read at a time
# One row of table.bin a reference: hash of its key, hash of its tokens, number of tokens.
_ROW = np.dtype([("key", "<u8"), ("content", "<u8"), ("length", "<i4")])


@dataclass(frozen=True)
class Reference:
    """Holds a piece of a document: `text` is characters `[start, end)` of the document's text.

    `key` is `<document id>#<n>`, n counting the document's references from 0, also those that were
    left out since. `tokens` (≤ W) hold neither prefix nor padding. `source` is the document's.
    """

    key: str
    title: str
    source: str
    start: int
    end: int
    text: str
    tokens: Int32[np.ndarray, " W"]


@runtime_checkable
class ReferenceReader(Protocol):
    """Interface of a knowledge base that can be read: `References` or `DeltaReferences`.

    Attributes:
      length: most tokens W of a reference.
      lengths: tokens of every reference; int32 (R,).
      record_hashes: hash of every reference's tokens; uint64 (R,). Where it differs between two
        sets made with one tokenizer, the reference's memory must be written again.
      fingerprint: hex hash of all references, the length and the tokenizer.
      tokenizer_fingerprint: of the tokenizer the references were made with.
      dtype: of the stored tokens.
    """

    length: int
    lengths: Int32[np.ndarray, " R"]
    record_hashes: UInt64[np.ndarray, " R"]
    fingerprint: str
    tokenizer_fingerprint: str
    dtype: np.dtype

    @property
    def live(self) -> Int64[np.ndarray, " n"]:
        """Returns the ids of the references in use, ascending."""

    def live_keys(self) -> list[str]:
        """Returns the keys of the references in use, in the order of ids; reads every record."""

    def documents(self) -> Int[np.ndarray, " R"]:
        """Numbers every reference's document; a document's references are consecutive."""

    def info(self) -> str:
        """Describes the counts in words."""

    def verify(self) -> None:
        """Reads all bytes and compares checksums; raises `TextError` naming a damaged file."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int | np.integer) -> Reference: ...

    def read(self, ids: Sequence[int] | np.ndarray) -> list[Reference]:
        """Reads references, in the order of `ids`."""

    def texts(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Reads texts of references, in the order of `ids`."""

    def tokens(self, ids: Sequence[int] | np.ndarray) -> Int32[np.ndarray, "n W"]:
        """Reads tokens of references, one row each, filled up with PAD; no prefix inside."""

    def lookup(self, key: str) -> int | None:
        """Returns the id of the reference in use with this key, or None."""

    def find(self, key: str) -> int:
        """Returns the id of the reference in use with this key, or raises `TextError`."""

    def find_or_removed(self, key: str) -> int:
        """Returns the id of the reference with this key; −1 where it was removed."""

    def of_document(self, document: str) -> list[int]:
        """Returns the ids in use of a document's references."""


def write_references(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    length: int,
    shards: int = 1,
) -> int:
    """Cuts documents into references of at most `length` tokens and writes them to `folder`.

    The folder is replaced: records in `shards` files, round robin; `tokens.bin` (all tokens, one
    reference after the other); `table.bin` (hashes and lengths); `manifest.json` last. Documents
    are read once, about a million characters held at a time. Returns the number of references.

    Raises:
      TextError: no documents, no usable tokens in them, or an id that occurs twice.
    """
    return write_pieces(_cut_all(documents, tokenizer, length), tokenizer, folder, length, shards)


def write_pieces(
    cut: Iterable[tuple[Document, list[Piece]]],
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    length: int,
    shards: int = 1,
) -> int:
    """Writes references of documents that are cut already, as `write_references`."""
    dtype = dtype_of_tokens(tokenizer.size)
    seen: set[bytes] = set()
    with RecordWriter(folder, shards, ["tokens.bin", "table.bin"]) as writer:
        for document, pieces in cut:
            name = hashlib.blake2b(document.id.encode(), digest_size=12).digest()
            if name in seen:
                raise TextError(
                    f"duplicate keys in the knowledge base: document id {document.id!r} occurs"
                    f" twice (again at {document.source or 'an unnamed source'}); make ids unique"
                )
            seen.add(name)
            for n, piece in enumerate(pieces):
                names = f"{document.id}#{n}", document.title, document.source
                _write(writer, Reference(*names, **vars(piece)), dtype)
        if not seen:
            raise TextError("the knowledge base is empty: no documents; give at least one")
        if not writer.count:
            raise TextError(
                f"the knowledge base has no usable tokens: its {len(seen)} documents are white"
                " space only; give documents with text"
            )
        _finish(writer, tokenizer.fingerprint, dtype, length, len(seen))
        return writer.count


def copy_references(
    source: ReferenceReader, ids: Sequence[int] | np.ndarray, folder: str | Path
) -> None:
    """Writes the references with these ids (at least one), in their order, as a set of its own."""
    ids, dtype, gaps = np.asarray(ids), source.dtype, False
    next_numbers: dict[str, int] = {}  # of every document, as far as it was written
    with RecordWriter(folder, 1, ["tokens.bin", "table.bin"]) as writer:
        for low in range(0, len(ids), _BLOCK):
            for item in source.read(ids[low : low + _BLOCK]):
                document, _, number = item.key.rpartition("#")
                gaps |= int(number) != next_numbers.get(document, 0)
                next_numbers[document] = int(number) + 1
                _write(writer, item, dtype)
        numbers = {"numbers": max(next_numbers.values())} if gaps else {}
        documents = len(next_numbers)
        _finish(writer, source.tokenizer_fingerprint, dtype, source.length, documents, **numbers)


def _write(writer: RecordWriter, item: Reference, dtype: np.dtype) -> None:
    record = {name: value for name, value in vars(item).items() if name != "tokens"}
    data = item.tokens.astype(dtype).tobytes()
    row = np.array((_hash(item.key.encode()), _hash(data), len(item.tokens)), _ROW)
    writer.write(record, tokens=data, table=row.tobytes())


def _finish(
    writer: RecordWriter, tokenizer: str, dtype: np.dtype, length: int, documents: int, **more: int
) -> None:
    content = {"tokenizer": tokenizer, "dtype": dtype.str, "length": length, "documents": documents}
    writer.finish(_KIND, content | more)


def _cut_all(
    documents: Iterable[Document], tokenizer: Tokenizer, length: int
) -> Iterator[tuple[Document, list[Piece]]]:
    """Yields every document with its pieces, cut in threads, as tokenizing takes most time."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        for batch in in_batches(documents):
            pieces = pool.map(lambda document: cut_references(document, tokenizer, length), batch)
            yield from zip(batch, pieces, strict=True)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class References(ReferenceReader):
    """Reads a knowledge base of R references at random. Safe to use from several threads.

    Attributes: those of `ReferenceReader`.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        manifest = records.manifest
        table = np.fromfile(records.folder / "table.bin", _ROW)
        self.length: int = manifest["length"]
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer_fingerprint: str = manifest["tokenizer"]
        self.lengths: Int32[np.ndarray, " R"] = table["length"].astype(np.int32)
        self.record_hashes: UInt64[np.ndarray, " R"] = table["content"].copy()
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        self.dtype = np.dtype(manifest["dtype"])
        # One more than the largest number in a key, where some numbers are missing.
        self._numbers: int = manifest.get("numbers", 0)
        self._tokens = np.memmap(records.folder / "tokens.bin", self.dtype, "r")
        self._order = np.argsort(table["key"], kind="stable")
        self._sorted_keys = table["key"][self._order]
        self._documents: Int32[np.ndarray, " R"] | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> References:
        """Opens what `write_references` wrote; raises `TextError` for an unfinished or cut set."""
        return cls(Records(folder, _KIND))

    def verify(self) -> None:
        self._records.verify()

    @property
    def folder(self) -> Path:
        """Returns the folder of the references."""
        return self._records.folder

    @property
    def live(self) -> Int64[np.ndarray, " R"]:
        return np.arange(len(self))

    def live_keys(self) -> list[str]:
        blocks = (range(i, min(i + 4096, len(self))) for i in range(0, len(self), 4096))
        return [record["key"] for block in blocks for record in self._records.read(block)]

    def documents(self) -> Int32[np.ndarray, " R"]:
        if self._documents is None:
            names = [key.rpartition("#")[0] for key in self.live_keys()]
            begins = [i > 0 and name != names[i - 1] for i, name in enumerate(names)]
            self._documents = np.cumsum(begins, dtype=np.int32)
        return self._documents

    def info(self) -> str:
        counts = f"{len(self)} references of {self._records.manifest['documents']} documents"
        mean = self.lengths.mean()
        return f"{counts}, {int(self._ends[-1])} tokens, {mean:.1f} of {self.length} on average"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int | np.integer) -> Reference:
        return self.read([int(i)])[0]

    def read(self, ids: Sequence[int] | np.ndarray) -> list[Reference]:
        rows = zip(self._records.read(ids), self.tokens(ids), ids, strict=True)
        return [Reference(**record, tokens=row[: self.lengths[i]]) for record, row, i in rows]

    def _record(self, i: int | np.integer) -> dict[str, Any]:
        return self._records.read([int(i)])[0]

    def texts(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        return [record["text"] for record in self._records.read(ids)]

    def tokens(self, ids: Sequence[int] | np.ndarray) -> Int32[np.ndarray, "n W"]:
        ids = self._records.check(ids)
        offsets = np.arange(self.length)
        real = offsets < self.lengths[ids][:, None]
        places = (self._ends[ids] - self.lengths[ids])[:, None] + offsets
        return np.where(real, self._tokens[np.where(real, places, 0)], PAD).astype(np.int32)

    def lookup(self, key: str) -> int | None:
        hashed = np.uint64(_hash(key.encode()))
        first = np.searchsorted(self._sorted_keys, hashed, "left")
        last = np.searchsorted(self._sorted_keys, hashed, "right")
        for i in self._order[first:last].tolist():
            if self._record(i)["key"] == key:
                return i
        return None

    def of_document(self, document: str) -> list[int]:
        """Returns the ids of a document's references, some of whose numbers may be missing."""
        ids = []
        for n in itertools.count():
            row = self.lookup(f"{document}#{n}")
            if row is not None:
                ids.append(row)
            elif n + 1 >= self._numbers:
                return ids
        raise AssertionError

    def find_or_removed(self, key: str) -> int:
        return self.find(key)

    def find(self, key: str) -> int:
        id_ = self.lookup(key)
        if id_ is None:
            raise TextError(
                f"no reference has the key {key!r} in {self.folder} ({len(self)} references; the"
                f" first is {self._record(0)['key']!r})"
            )
        return id_
