"""A knowledge base in layers: the first one, and what edits added to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from m3jax.errors import TextError
from m3jax.files import digest
from m3jax.numbering import Numbering
from m3jax.text.references import Reference, References


class LayeredReferences:
    """`References` over several sets, without the removed ones. Safe for several threads.

    Attributes: those of `References`, and
      layers: the sets.
      numbering: ids over them.
    """

    def __init__(self, layers: Sequence[References], removed: np.ndarray) -> None:
        """Joins sets that one tokenizer made."""
        self.layers = list(layers)
        self.numbering = Numbering([len(layer) for layer in layers], removed)
        self.length = max(layer.length for layer in layers)
        self.tokenizer_fingerprint = layers[0].tokenizer_fingerprint
        other = [r.folder for r in layers if r.tokenizer_fingerprint != self.tokenizer_fingerprint]
        if other:
            raise TextError(f"{other[0]} was cut with another tokenizer than {layers[0].folder}")
        self.dtype = layers[0].dtype
        self.lengths: Int32[np.ndarray, " R"] = np.concatenate([r.lengths for r in layers])
        self.record_hashes: UInt64[np.ndarray, " R"] = np.concatenate(
            [r.record_hashes for r in layers]
        )
        parts = [layer.fingerprint for layer in layers]
        self.fingerprint = digest(*parts, self.numbering.fingerprint)

    @property
    def keys(self) -> list[str]:
        """Keys of the references in use, in the order of their ids."""
        found = [key for layer in self.layers for key in layer.keys]
        return [found[i] for i in self.numbering.live]

    def documents(self) -> Int64[np.ndarray, " R"]:
        """Number of every reference's document; its references of two layers count as two."""
        numbers, first = [], 0
        for layer in self.layers:
            found = layer.documents()
            numbers.append(first + found)
            first += int(found.max(initial=-1)) + 1
        return np.concatenate(numbers)

    def info(self) -> str:
        """Counts, in words."""
        count, layers = len(self.numbering.live), len(self.layers)
        return f"{count} references in use, {layers} layers, {len(self.numbering.removed)} removed"

    def __len__(self) -> int:
        return self.numbering.size

    def __getitem__(self, i: int | np.integer) -> Reference:
        return self.read([int(i)])[0]

    def read(self, ids: Sequence[int] | np.ndarray) -> list[Reference]:
        """References, in the order of `ids`."""
        ids = self._check(ids)
        found: dict[int, Reference] = {}
        for layer, places, rows in self.numbering.split(ids):
            found.update(zip(places.tolist(), self.layers[layer].read(rows), strict=True))
        return [found[place] for place in range(len(ids))]

    def texts(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Texts of references, in the order of `ids`."""
        ids = self._check(ids)
        texts = [""] * len(ids)
        for layer, places, rows in self.numbering.split(ids):
            for place, text in zip(places, self.layers[layer].texts(rows), strict=True):
                texts[place] = text
        return texts

    def tokens(self, ids: Sequence[int] | np.ndarray) -> Int32[np.ndarray, "n W"]:
        """Tokens of references, one row each, filled up with PAD."""
        ids = self._check(ids)
        tokens = np.zeros((len(ids), self.length), np.int32)
        for layer, places, rows in self.numbering.split(ids):
            found = self.layers[layer].tokens(rows)
            tokens[places, : found.shape[1]] = found
        return tokens

    def lookup(self, key: str) -> int | None:
        """Id of the reference in use with this key; None where there is none."""
        for number in reversed(range(len(self.layers))):
            row = self.layers[number].lookup(key)
            if row is not None:
                found = self.numbering.first(number) + row
                if not self.numbering.is_removed(np.array(found)):
                    return found
        return None

    def find(self, key: str) -> int:
        """Id of the reference in use with this key.

        Raises:
          TextError: no reference in use has it.
        """
        found = self.lookup(key)
        if found is None:
            raise TextError(f"no reference in use has the key {key!r} ({self.info()})")
        return found

    def _check(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, np.int64).reshape(-1)
        wrong = (ids < 0) | (ids >= len(self)) | self.numbering.is_removed(ids)
        if wrong.any():
            raise IndexError(
                f"reference {ids[wrong][0]} is removed, or none of 0 … {len(self) - 1}"
            )
        return ids


AnyReferences = References | LayeredReferences


def live_ids(references: AnyReferences) -> np.ndarray:
    """Ids of the references in use, ascending."""
    if isinstance(references, LayeredReferences):
        return references.numbering.live
    return np.arange(len(references))


def find_or_removed(references: AnyReferences, key: str) -> int:
    """Id of the reference with this key; −1 where it was removed.

    Raises:
      TextError: no reference has had it.
    """
    found = references.lookup(key)
    if found is not None:
        return found
    layers = references.layers if isinstance(references, LayeredReferences) else []
    if any(layer.lookup(key) is not None for layer in layers):
        return -1
    return references.find(key)
