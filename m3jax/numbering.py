"""Numbers of things that lie in layers: those of the first layer, then those of the second, ….

An edit of a knowledge base adds a layer and removes numbers; a number keeps its meaning until the
layers are collected into one. References, index and bank of a version share one numbering.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int


class Numbering:
    """Numbers 0 … size − 1 over layers, some of them removed.

    Attributes:
      sizes: things in each layer.
      removed: numbers that were deleted or replaced, ascending.
      size: numbers in use or removed.
    """

    def __init__(self, sizes: Sequence[int], removed: Int[np.ndarray, " n"]) -> None:
        self.sizes, self.removed = tuple(sizes), np.unique(np.asarray(removed, np.int64))
        self._starts = np.cumsum([0, *self.sizes])
        self.size = int(self._starts[-1])
        if self.removed.size and not 0 <= self.removed[0] <= self.removed[-1] < self.size:
            raise ValueError(f"removed numbers must be in 0 … {self.size - 1}")

    @property
    def live(self) -> Int[np.ndarray, " n"]:
        """Numbers in use, ascending."""
        return np.setdiff1d(np.arange(self.size), self.removed, assume_unique=True)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the removed numbers."""
        return hashlib.blake2b(self.removed.tobytes(), digest_size=16).hexdigest()

    def is_removed(self, ids: Int[np.ndarray, "*n"]) -> np.ndarray:
        """Which of the numbers are removed."""
        return np.isin(ids, self.removed)

    def first(self, layer: int) -> int:
        """The number of a layer's row 0."""
        return int(self._starts[layer])

    def split(
        self, ids: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[int, Int[np.ndarray, " m"], Int[np.ndarray, " m"]]]:
        """For each layer that numbers are in: the layer, their places in `ids`, rows there."""
        ids = np.asarray(ids)
        layers = np.searchsorted(self._starts, ids, side="right") - 1
        for layer in np.unique(layers):
            places = np.flatnonzero(layers == layer)
            yield int(layer), places, ids[places] - self._starts[layer]
