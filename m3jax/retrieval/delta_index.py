"""An index in layers: the first one, and what edits added to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64

from m3jax.errors import RetrievalError
from m3jax.files import digest
from m3jax.numbering import Numbering
from m3jax.retrieval.index import Index


class LayeredIndex:
    """`Index` over several indices of one embedder, without the removed references.

    Attributes: those of `Index`, and
      layers: the indices.
      numbering: ids over them.
    """

    def __init__(self, layers: Sequence[Index], removed: np.ndarray, references: str) -> None:
        """Joins indices; `references` is the fingerprint of the layered references."""
        # The last one knows the words of all layers.
        self.layers, self.embedder = list(layers), layers[-1].embedder
        for layer in layers[:-1]:
            if layer.embedder.family != self.embedder.family:
                raise RetrievalError(
                    "the layers of the index were made by different embedders; collect them into"
                    " one with launch/edit_bank.py collect"
                )
        self.numbering = Numbering([layer.size for layer in layers], removed)
        self.size, self.kind, self.dimension = (
            self.numbering.size,
            layers[0].kind,
            layers[0].dimension,
        )
        self.references_fingerprint = references
        self.fingerprint = digest(*(layer.fingerprint for layer in layers), references)
        ids = self.numbering.split(self.numbering.removed)
        self._removed_in = {layer: len(rows) for layer, _, rows in ids}

    def search(
        self, embeddings: Float32[np.ndarray, "n E"], k: int
    ) -> tuple[Int64[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
        """As `Index.search`; never returns a removed reference."""
        found = [self._search_layer(i, embeddings, k) for i in range(len(self.layers))]
        ids, scores = (np.concatenate(part, axis=1) for part in zip(*found, strict=True))
        order = np.lexsort((np.where(ids < 0, np.iinfo(np.int64).max, ids), -scores), axis=1)
        order = order[:, :k]
        return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)

    def _search_layer(
        self, layer: int, embeddings: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best of a layer in use.

        Asks for more, twice as many each time, where removed ones took places.
        """
        index, gone = self.layers[layer], self._removed_in.get(layer, 0)
        wanted = k
        while True:
            ids, scores = index.search(embeddings, wanted)
            ids = np.where(ids < 0, -1, ids + self.numbering.first(layer))
            dead = (ids >= 0) & self.numbering.is_removed(ids)
            enough = wanted >= min(k + gone, index.size)
            if enough or ((wanted - dead.sum(axis=1)) >= k).all():
                break
            wanted = min(2 * wanted, k + gone, max(index.size, k))
        scores = np.where(dead, -np.inf, scores).astype(np.float32)
        ids = np.where(dead, -1, ids)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
