"""Knowledge base of a base and the deltas that edits added to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from m3jax.errors import TextError
from m3jax.files import digest
from m3jax.numbering import Numbering
from m3jax.text.references import Reference, ReferenceReader, References


class DeltaReferences(ReferenceReader):
    """Reads a base and its deltas as one knowledge base without tombstones. Thread-safe.

    Attributes: those of `ReferenceReader`, and
      sets: the base, then the deltas.
      numbering: ids over them.
    """

    def __init__(self, sets: Sequence[References], tombstones: np.ndarray) -> None:
        """Joins sets; raises `TextError` unless one tokenizer made all."""
        self.sets = list(sets)
        self.numbering = Numbering([len(part) for part in sets], tombstones)
        self.length = max(part.length for part in sets)
        self.tokenizer_fingerprint = sets[0].tokenizer_fingerprint
        other = [s.folder for s in sets if s.tokenizer_fingerprint != self.tokenizer_fingerprint]
        if other:
            raise TextError(f"{other[0]} was cut with another tokenizer than {sets[0].folder}")
        self.dtype = sets[0].dtype
        self.lengths: Int32[np.ndarray, " R"] = np.concatenate([part.lengths for part in sets])
        self.record_hashes: UInt64[np.ndarray, " R"] = np.concatenate(
            [part.record_hashes for part in sets]
        )
        parts = [part.fingerprint for part in sets]
        self.fingerprint = digest(*parts, self.numbering.fingerprint)

    @property
    def live(self) -> Int64[np.ndarray, " n"]:
        return self.numbering.live

    def live_keys(self) -> list[str]:
        keys = [key for part in self.sets for key in part.live_keys()]
        return [keys[i] for i in self.live]

    def documents(self) -> Int64[np.ndarray, " R"]:
        """Numbers every reference's document; a document of two sets counts as two."""
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

    def __getitem__(self, i: int | np.integer) -> Reference:
        return self.read([int(i)])[0]

    def read(self, ids: Sequence[int] | np.ndarray) -> list[Reference]:
        ids = self._check(ids)
        references: dict[int, Reference] = {}
        for part, positions, rows in self.numbering.split(ids):
            references.update(zip(positions.tolist(), self.sets[part].read(rows), strict=True))
        return [references[position] for position in range(len(ids))]

    def texts(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        ids = self._check(ids)
        texts = [""] * len(ids)
        for part, positions, rows in self.numbering.split(ids):
            for position, text in zip(positions, self.sets[part].texts(rows), strict=True):
                texts[position] = text
        return texts

    def tokens(self, ids: Sequence[int] | np.ndarray) -> Int32[np.ndarray, "n W"]:
        ids = self._check(ids)
        tokens = np.zeros((len(ids), self.length), np.int32)
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
        """Returns ids in use of a document's references, whose keys count from 0 in every set."""
        ids = [
            self.numbering.first(number) + row
            for number, part in enumerate(self.sets)
            for row in part.of_document(document)
        ]
        return [i for i in ids if not self.numbering.is_removed(np.array(i))]

    def _check(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, np.int64).reshape(-1)
        wrong = (ids < 0) | (ids >= len(self)) | self.numbering.is_removed(ids)
        if wrong.any():
            raise IndexError(
                f"reference {ids[wrong][0]} is removed, or none of 0 … {len(self) - 1}"
            )
        return ids
