"""Knowledge base: references cut from documents, each traceable to its text."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt64

from m3jax.errors import TextError
from m3jax.files import digest, hash64, open_array
from m3jax.numbering import Numbering
from m3jax.text.documents import Document, in_batches, with_unique_ids
from m3jax.text.records import Records, RecordWriter, dtype_of_tokens, told_losses
from m3jax.text.reference_splitter import Piece, cut_references
from m3jax.text.tokenizer import PAD, Tokenizer

Ids = Sequence[int] | np.ndarray
_Item = TypeVar("_Item")

_KIND = "references"
_BLOCK = 1024  # references read at a time
# A row of table.bin, one per reference: hash of its key, hash of its tokens, their number.
_ROW = np.dtype([("key", "<u8"), ("content", "<u8"), ("length", "<i4")])


@dataclass(frozen=True)
class Reference:
    """Holds a reference: `text` is characters `[start, end)` of its document's text.

    `key` is `<document id>#<n>`; n counts the references cut from the document from 0, including
    references that were filtered out later. `tokens` (at most W) hold neither prefix nor padding.
    `title` and `source` are the document's.
    """

    key: str
    title: str
    source: str
    start: int
    end: int
    text: str
    tokens: Int32[np.ndarray, " W"]

    def as_document(self) -> Document:
        """Returns the reference as a document: its id is the key, its source the title, if any."""
        return Document(self.key, self.text, self.title, self.title or self.source)


def write_references(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    length: int,
) -> int:
    """Writes documents as references of at most `length` tokens; returns the number of references.

    Replaces the content of `folder`: records; `tokens.bin` (the tokens of all references,
    concatenated); `table.bin` (hashes and lengths); `manifest.json` last. Raises `TextError` if
    there are no documents, all are white space, two have the same id, or `length` < 4.
    """
    return write_pieces(_cut_all(documents, tokenizer, length), tokenizer, folder, length)


def write_pieces(
    cut: Iterable[tuple[Document, list[Piece]]],
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    length: int,
) -> int:
    """Writes references of documents that are already cut; returns their number."""
    read = 0
    losses: Counter[str] = Counter()
    with _Writer(folder, dtype_of_tokens(tokenizer.size)) as writer:
        for document, pieces in with_unique_ids(cut, lambda item: item[0]):
            read += 1
            for n, piece in enumerate(pieces):
                if lost := tokenizer.lost(piece.text):
                    losses.update(lost_characters=lost, lossy_references=1)
                names = f"{document.id}#{n}", document.title, document.source
                writer.append(Reference(*names, **vars(piece)))
        if not read:
            raise TextError("the knowledge base is empty: no documents; give at least one")
        if not writer.count:
            raise TextError(
                f"the knowledge base has no usable tokens: its {read} documents are white"
                " space only; give documents with text"
            )
        writer.commit(tokenizer.fingerprint, length, read, **losses)
        return writer.count


def copy_references(source: References, ids: Ids, folder: str | Path) -> None:
    """Copies the references `ids` (at least one), in that order, to a new set in `folder`."""
    ids, gaps = np.asarray(ids), False
    next_numbers: dict[str, int] = {}  # by document: n after its last copied reference
    with _Writer(folder, source.dtype) as writer:
        for low in range(0, len(ids), _BLOCK):
            for item in source.read(ids[low : low + _BLOCK]):
                document, _, number = item.key.rpartition("#")
                gaps |= int(number) != next_numbers.get(document, 0)
                next_numbers[document] = int(number) + 1
                writer.append(item)
        numbers = {"numbers": max(next_numbers.values())} if gaps else {}
        writer.commit(source.tokenizer_fingerprint, source.length, len(next_numbers), **numbers)


class _Writer(RecordWriter):
    def __init__(self, folder: str | os.PathLike[str], dtype: np.dtype) -> None:
        super().__init__(folder, 1, ["tokens.bin", "table.bin"])
        self._dtype = dtype

    def append(self, item: Reference) -> None:
        record = {name: value for name, value in vars(item).items() if name != "tokens"}
        data = item.tokens.astype(self._dtype).tobytes()
        row = np.array((hash64(item.key.encode()), hash64(data), len(item.tokens)), _ROW)
        self.write(record, tokens=data, table=row.tobytes())

    def commit(self, tokenizer: str, length: int, documents: int, **more: int) -> None:
        content = {"tokenizer": tokenizer, "dtype": self._dtype.str, "length": length}
        self.finish(_KIND, content | {"documents": documents} | more)


def _cut_all(
    documents: Iterable[Document], tokenizer: Tokenizer, length: int
) -> Iterator[tuple[Document, list[Piece]]]:
    """Yields every document with its pieces; cuts in threads, as most time is tokenization."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        for batch in in_batches(documents):
            pieces = pool.map(lambda document: cut_references(document, tokenizer, length), batch)
            yield from zip(batch, pieces, strict=True)


class References:
    """Reads a set of R references (a knowledge base) by id, in any order. Thread-safe.

    Attributes:
      folder: folder of the set.
      length: W, most tokens of a reference.
      lengths: number of tokens of every reference; int32 (R,).
      record_hashes: hash of every reference's tokens; uint64 (R,). If a reference's hash differs
        between two sets made with one tokenizer, its memory must be written again.
      fingerprint: hex hash of all references, the length and the tokenizer.
      tokenizer_fingerprint: fingerprint of the tokenizer that the references were made with.
      dtype: dtype of the stored tokens.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens a set that `write_references` wrote; raises `TextError` as `Records`."""
        self._records, self.folder = Records(folder, _KIND), Path(folder)
        manifest = self._records.manifest
        table = self._records.side_file("table.bin", _ROW)
        self.length: int = manifest["length"]
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer_fingerprint: str = manifest["tokenizer"]
        self.lengths: Int32[np.ndarray, " R"] = table["length"].astype(np.int32)
        self.record_hashes: UInt64[np.ndarray, " R"] = table["content"].copy()
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        self.dtype = np.dtype(manifest["dtype"])
        # One more than the largest n of a key if some n are missing, else 0.
        self._numbers: int = manifest.get("numbers", 0)
        self._tokens = open_array(self.folder / "tokens.bin", self.dtype)
        self._verified = np.zeros(len(table), bool)  # references whose tokens were compared
        self._order = np.argsort(table["key"], kind="stable")
        self._sorted_keys = table["key"][self._order]
        self._documents: Int32[np.ndarray, " R"] | None = None

    def verify(self) -> None:
        """Reads all bytes and compares checksums; raises `TextError` naming a damaged file."""
        self._records.verify()

    @property
    def live(self) -> Int64[np.ndarray, " n"]:
        """Returns the ids of the references in use (not tombstones), ascending."""
        return np.arange(len(self))

    def live_keys(self) -> list[str]:
        """Returns the keys of the references in use, in the order of ids; reads every record."""
        starts = range(0, len(self), _BLOCK)
        blocks = (range(i, min(i + _BLOCK, len(self))) for i in starts)
        return [record["key"] for block in blocks for record in self._records.read(block)]

    def documents(self) -> Int[np.ndarray, " R"]:
        """Returns every reference's document index, 0, 1, …; a document's ids are consecutive."""
        if self._documents is None:
            names = [key.rpartition("#")[0] for key in self.live_keys()]
            begins = [i > 0 and name != names[i - 1] for i, name in enumerate(names)]
            self._documents = np.cumsum(begins, dtype=np.int32)
        return self._documents

    def info(self) -> str:
        """Formats the counts of references, documents and tokens."""
        manifest = self._records.manifest
        return (
            f"{len(self)} references of {manifest['documents']} documents,"
            f" {int(self._ends[-1])} tokens, {self.lengths.mean():.1f} of {self.length} on average"
            f"{told_losses(manifest, 'references')}"
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int | np.integer) -> Reference:
        return self.read([int(i)])[0]

    def read(self, ids: Ids) -> list[Reference]:
        """Reads references in the order of `ids`; raises as `Records.read`."""
        rows = zip(self._records.read(ids), self.tokens(ids), ids, strict=True)
        return [Reference(**record, tokens=row[: self.lengths[i]]) for record, row, i in rows]

    def texts(self, ids: Ids) -> list[str]:
        """Reads the texts of references in the order of `ids`; raises as `Records.read`."""
        return [record["text"] for record in self._records.read(ids)]

    def tokens(self, ids: Ids) -> Int32[np.ndarray, "n W"]:
        """Returns the tokens of references, one row per id, padded with PAD, without prefix.

        The tokens of a reference are compared with its hash when they are first read. Raises
        `IndexError` for an id outside 0 … R − 1, `TextError` if they are damaged.
        """
        ids = self._records.check(ids)
        self._verify_tokens(ids[~self._verified[ids]])
        offsets = np.arange(self.length)
        real = offsets < self.lengths[ids][:, None]
        places = (self._ends[ids] - self.lengths[ids])[:, None] + offsets
        return np.where(real, self._tokens[np.where(real, places, 0)], PAD).astype(np.int32)

    def _verify_tokens(self, ids: Int64[np.ndarray, " n"]) -> None:
        """Compares the tokens of references with their hashes in the table."""
        ends, hashes = self._ends[ids], self.record_hashes[ids].tolist()
        starts = (ends - self.lengths[ids]).tolist()
        for i, start, end, expected in zip(
            ids.tolist(), starts, ends.tolist(), hashes, strict=True
        ):
            if hash64(self._tokens[start:end].tobytes()) != expected:
                path = self.folder / "tokens.bin"
                raise self._records.damaged(path, f"is damaged (tokens of reference {i})")
        self._verified[ids] = True

    def lookup(self, key: str) -> int | None:
        """Returns the id of the reference in use with this key, or None."""
        hashed = np.uint64(hash64(key.encode()))
        first = np.searchsorted(self._sorted_keys, hashed, "left")
        last = np.searchsorted(self._sorted_keys, hashed, "right")
        same = self._order[first:last].tolist()
        records = zip(same, self._records.read(same), strict=True)
        return next((i for i, record in records if record["key"] == key), None)

    def of_document(self, document: str) -> list[int]:
        """Returns the ids in use of a document's references, in the order of their keys."""
        ids: list[int | None] = []
        while not ids or ids[-1] is not None or len(ids) < self._numbers:
            ids.append(self.lookup(f"{document}#{len(ids)}"))
        return [i for i in ids if i is not None]

    def ids_of(self, name: str) -> list[int]:
        """Returns the id in use of the reference with this key, or those of a document's
        references.

        Raises `TextError` if the name is both a key and the id of a document; [] if it is neither.
        """
        id_, ids = self.lookup(name), self.of_document(name)
        if id_ is None:
            return ids
        if ids:
            raise TextError(
                f"{name!r} is the key of a reference of document {name.rpartition('#')[0]!r} and"
                f" the id of a document; name that document's references, {name}#0 …, or give one"
                " of the documents another id"
            )
        return [id_]

    def find_named(self, name: str) -> int:
        """Returns the id of the reference that a document names, −1 if it is removed.

        `name` is its key, or the id of a document that is a single reference. Raises `TextError` if
        there is none, or the document has several.
        """
        if "#" in name:
            return self.find_or_removed(name)
        ids = self.of_document(name)
        if len(ids) > 1:
            raise TextError(
                f"document {name!r} has {len(ids)} references; name the one that is meant by its"
                f" key, {name}#0 … {name}#{len(ids) - 1}"
            )
        return ids[0] if ids else self.find_or_removed(f"{name}#0")

    def find_or_removed(self, key: str) -> int:
        """Returns the id of the reference with this key, −1 if it is removed; raises as `find`."""
        return self.find(key)

    def find(self, key: str) -> int:
        """Returns the id of the reference in use with this key, or raises `TextError`."""
        id_ = self.lookup(key)
        if id_ is None:
            raise TextError(
                f"no reference has the key {key!r} in {self.folder} ({len(self)} references; the"
                f" first is {self._records.read([0])[0]['key']!r})"
            )
        return id_


class DeltaReferences(References):
    """Reads a base and its deltas (`sets`, in this order) as one knowledge base, less tombstones.

    Thread-safe. `numbering` maps ids to the sets and the rows within them.
    """

    def __init__(self, sets: Sequence[References], tombstones: np.ndarray) -> None:
        """Joins sets made with the same tokenizer; `tombstones` are ids over all of them."""
        self.sets, self.folder = list(sets), sets[0].folder
        self.numbering = Numbering([len(part) for part in sets], tombstones)
        self.length = max(part.length for part in sets)
        self.tokenizer_fingerprint, self.dtype = sets[0].tokenizer_fingerprint, sets[0].dtype
        self.lengths = np.concatenate([part.lengths for part in sets])
        self.record_hashes = np.concatenate([part.record_hashes for part in sets])
        self.fingerprint = digest(*(s.fingerprint for s in sets), self.numbering.fingerprint)

    @property
    def live(self) -> Int64[np.ndarray, " n"]:
        return self.numbering.live

    def live_keys(self) -> list[str]:
        keys = [key for part in self.sets for key in part.live_keys()]
        return [keys[i] for i in self.live]

    def documents(self) -> Int[np.ndarray, " R"]:
        """Returns the index of every reference's document; a document in two sets has two."""
        numbers, first = [], 0
        for part in self.sets:
            inside = part.documents()
            numbers.append(first + inside)
            first += int(inside.max(initial=-1)) + 1
        return np.concatenate(numbers)

    def info(self) -> str:
        deltas, tombstones = len(self.sets) - 1, len(self.numbering.tombstones)
        return f"{len(self.live)} references in use, {deltas} deltas, {tombstones} tombstones"

    def verify(self) -> None:
        for part in self.sets:
            part.verify()

    def __len__(self) -> int:
        return self.numbering.size

    def read(self, ids: Ids) -> list[Reference]:
        return self._gather(ids, References.read)

    def texts(self, ids: Ids) -> list[str]:
        return self._gather(ids, References.texts)

    def _gather(
        self, ids: Ids, read: Callable[[References, np.ndarray], list[_Item]]
    ) -> list[_Item]:
        ids = self._check(ids)
        items: dict[int, _Item] = {}
        for part, positions, rows in self.numbering.split(ids):
            items.update(zip(positions.tolist(), read(self.sets[part], rows), strict=True))
        return [items[position] for position in range(len(ids))]

    def tokens(self, ids: Ids) -> Int32[np.ndarray, "n W"]:
        ids = self._check(ids)
        tokens = np.full((len(ids), self.length), PAD, np.int32)
        for part, positions, rows in self.numbering.split(ids):
            own = self.sets[part].tokens(rows)
            tokens[positions, : own.shape[1]] = own
        return tokens

    def lookup(self, key: str) -> int | None:
        for number in reversed(range(len(self.sets))):
            row = self.sets[number].lookup(key)
            if row is not None:
                id_ = self.numbering.first(number) + row
                if not self.numbering.is_removed(np.array(id_)):
                    return id_
        return None

    def find(self, key: str) -> int:
        id_ = self.lookup(key)
        if id_ is None:
            raise TextError(f"no reference in use has the key {key!r} ({self.info()})")
        return id_

    def find_or_removed(self, key: str) -> int:
        id_ = self.lookup(key)
        if id_ is None and any(part.lookup(key) is not None for part in self.sets):
            return -1
        return self.find(key) if id_ is None else id_

    def of_document(self, document: str) -> list[int]:
        """Returns the ids in use of a document's references, set by set, in the order of keys."""
        ids = [
            self.numbering.first(number) + row
            for number, part in enumerate(self.sets)
            for row in part.of_document(document)
        ]
        return [i for i in ids if not self.numbering.is_removed(np.array(i))]

    def _check(self, ids: Ids) -> np.ndarray:
        ids = np.asarray(ids, np.int64).reshape(-1)
        wrong = (ids < 0) | (ids >= len(self)) | self.numbering.is_removed(ids)
        if wrong.any():
            what = f"reference {ids[wrong][0]} is removed"
            raise IndexError(f"{what}, or none of 0 … {len(self) - 1}")
        return ids
