"""Numbering of items over a base and its deltas: first the base's ids, then each delta's.

An edit of a knowledge base adds a delta and turns the ids that it deletes or replaces into
tombstones; all ids stay valid until a compaction. The references, index and bank of a version share
one numbering.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int


class Numbering:
    """Assigns ids 0 … size − 1 to the items of the *parts*: the base, the first delta, ….

    Raises `ValueError` for tombstones outside 0 … size − 1.

    Attributes:
      sizes: number of items in each part.
      tombstones: ids that were deleted or replaced, ascending.
      size: number of ids, tombstones included.
    """

    def __init__(self, sizes: Sequence[int], tombstones: Int[np.ndarray, " n"]) -> None:
        self.sizes, self.tombstones = tuple(sizes), np.unique(np.asarray(tombstones, np.int64))
        self._starts = np.cumsum([0, *self.sizes])
        self.size = int(self._starts[-1])
        if self.tombstones.size and not 0 <= self.tombstones[0] <= self.tombstones[-1] < self.size:
            raise ValueError(f"tombstones must be in 0 … {self.size - 1}")

    @property
    def live(self) -> Int[np.ndarray, " n"]:
        """Returns the ids that are not tombstones, ascending."""
        return np.setdiff1d(np.arange(self.size), self.tombstones, assume_unique=True)

    @property
    def fingerprint(self) -> str:
        """Returns the hex digest of the tombstones."""
        return hashlib.blake2b(self.tombstones.tobytes(), digest_size=16).hexdigest()

    def is_removed(self, ids: Int[np.ndarray, "*n"]) -> Bool[np.ndarray, "*n"]:
        """Returns True where an id is a tombstone."""
        return np.isin(ids, self.tombstones)

    def first(self, part: int) -> int:
        """Returns the id of the first item of a part (part 0 is the base)."""
        return int(self._starts[part])

    def split(
        self, ids: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[int, Int[np.ndarray, " m"], Int[np.ndarray, " m"]]]:
        """Groups ids by part: yields (part, positions in `ids`, rows within the part)."""
        ids = np.asarray(ids)
        parts = np.searchsorted(self._starts, ids, side="right") - 1
        for part in np.unique(parts):
            positions = np.flatnonzero(parts == part)
            yield int(part), positions, ids[positions] - self._starts[part]
