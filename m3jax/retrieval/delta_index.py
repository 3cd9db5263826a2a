"""An index as a base and the deltas that edits added to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from m3jax.errors import RetrievalError
from m3jax.files import digest
from m3jax.numbering import Numbering
from m3jax.retrieval.index import Index
from m3jax.retrieval.search import SearchIndex, SearchResult, merge


class DeltaIndex(SearchIndex):
    """Searches several indices of one embedder as one index without tombstones.

    Attributes: those of `SearchIndex`, and
      indices: the base, then the deltas.
      numbering: ids over them.
    """

    def __init__(self, indices: Sequence[Index], tombstones: np.ndarray, references: str) -> None:
        """Joins indices; `references` is the fingerprint of the `DeltaReferences`."""
        # The last one knows the words of all.
        self.indices, self.embedder = list(indices), indices[-1].embedder
        if any(index.embedder.family != self.embedder.family for index in indices):
            raise RetrievalError(
                "the base and the deltas of the index were made by different embedders; make one"
                " index of them with launch/edit_bank.py compact"
            )
        self.numbering = Numbering([index.size for index in indices], tombstones)
        self.size = self.numbering.size
        self.kind, self.dimension = indices[0].kind, indices[0].dimension
        self.references_fingerprint = references
        self.fingerprint = digest(*(index.fingerprint for index in indices), references)
        split = self.numbering.split(self.numbering.tombstones)
        self._tombstones_of = {part: len(rows) for part, _, rows in split}

    def search(self, embeddings: Float32[np.ndarray, "n E"], k: int) -> SearchResult:
        """Searches as `Index.search`; never returns a tombstone."""
        return merge([self._search_part(i, embeddings, k) for i in range(len(self.indices))])

    def _search_part(self, part: int, embeddings: np.ndarray, k: int) -> SearchResult:
        """Finds the k best of a part in use.

        Searches for more, twice as many each time, where tombstones took places.
        """
        index, tombstones = self.indices[part], self._tombstones_of.get(part, 0)
        count = k
        while True:
            ids, scores = index.search(embeddings, count)
            ids = np.where(ids < 0, -1, ids + self.numbering.first(part))
            removed = (ids >= 0) & self.numbering.is_removed(ids)
            enough = count >= min(k + tombstones, index.size)
            if enough or ((count - removed.sum(axis=1)) >= k).all():
                break
            count = min(2 * count, k + tombstones, max(index.size, k))
        scores = np.where(removed, -np.inf, scores).astype(np.float32)
        ids = np.where(removed, -1, ids)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
