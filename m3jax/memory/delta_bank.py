"""A bank in layers: the first one, and what edits added to it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from m3jax.errors import BankError
from m3jax.memory import codec as codecs
from m3jax.memory.bank import Bank, Binding
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.numbering import Numbering


class LayeredBank:
    """`Bank` over several banks of one writer, without the removed memories.

    Attributes: those of `Bank` that readers use, and
      layers: the banks.
      numbering: ids over them.
    """

    def __init__(self, layers: Sequence[Bank], removed: np.ndarray, references: str) -> None:
        """Joins banks.

        Args:
          layers: of one writer, tokenizer and layout, stored alike.
          removed: ids whose memories are not to be read.
          references: fingerprint of the layered references.

        Raises:
          BankError: a layer was written by something else, or is stored differently.
        """
        first = layers[0]
        for layer in layers[1:]:
            own = layer.binding.references
            expected = Binding(
                first.binding.writer, first.binding.tokenizer, own, first.binding.layout
            )
            layer.require(expected)
            if not codecs.same(layer.codec, first.codec):
                raise BankError(
                    f"bank {layer.folder} is stored with {layer.codec.name!r} or other codebooks"
                    f" than {first.folder} ({first.codec.name!r}); write it with --base of that one"
                )
            layer.shards.cache = first.shards.cache  # one limit for all
        self.layers, self.folder, self.codec = list(layers), first.folder, first.codec
        self.numbering = Numbering([layer.size for layer in layers], removed)
        self.binding = Binding(
            first.binding.writer, first.binding.tokenizer, references, first.binding.layout
        )
        self.lengths = np.concatenate([np.asarray(layer.lengths, np.int32) for layer in layers])
        self.writer = first.writer

    @property
    def size(self) -> int:
        """Ids, removed ones included."""
        return self.numbering.size

    @property
    def bytes(self) -> int:
        """Bytes of all keys and values, as they are stored."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def record_hashes(self) -> np.ndarray:
        """Hash of all tokens that shaped each memory; of removed ones, one that fits nothing."""
        hashes = np.concatenate([layer.record_hashes for layer in self.layers])
        for i in self.numbering.tombstones:
            digest = hashlib.blake2b(f"removed {i}".encode(), digest_size=8).digest()
            hashes[i] = int.from_bytes(digest, "little")
        return hashes

    def require(self, expect: Binding) -> None:
        """Raises `BankError`, naming every part that differs, unless `expect` wrote this bank."""
        different = expect.differences(self.binding)
        if different:
            raise BankError(f"bank {self.folder} does not fit: {'; '.join(different)}")

    def read_stored(self, ids: Int[np.ndarray, "*shape"]) -> ExplicitMemory:
        """As `Bank.read_stored`; raises `BankError` for a removed id, too."""
        flat = np.asarray(ids).reshape(-1)
        wrong = (flat < -1) | (flat >= self.size) | self.numbering.is_removed(flat)
        if wrong.any():
            raise BankError(
                f"reference id {flat[wrong][0]} is not in this version of bank {self.folder}: it"
                f" was removed, or is none of 0 … {self.size - 1}"
            )
        real = np.flatnonzero(flat >= 0)
        shape = (flat.size, *self.layers[0].manifest["shape"][2:])
        keys, values = (np.zeros(shape, self.layers[0].dtype) for _ in range(2))
        length = np.zeros(flat.size, np.int32)
        for layer, places, rows in self.numbering.split(flat[real]):
            found = self.layers[layer].read_stored(rows)
            place = real[places]
            keys[place], values[place], length[place] = found.keys, found.values, found.length
        parts: list[Any] = [x.reshape((*ids.shape, *x.shape[1:])) for x in (keys, values, length)]
        return ExplicitMemory(*parts)

    def read(self, ids: Int[np.ndarray, "*shape"]) -> ExplicitMemory:
        """As `read_stored`, decoded: keys and values `(*shape, L, K, P, H)`."""
        stored = self.read_stored(ids)
        if self.codec.plain:
            return stored
        return jax.tree.map(np.asarray, jax.jit(self.codec.decode)(stored))

    def report(self) -> dict[str, int]:
        """As `Bank.report`, of the cache that the layers share."""
        return self.layers[0].report()

    def verify(self) -> list[str]:
        """Files of damaged or missing shards of all layers, each with the reason."""
        return [problem for layer in self.layers for problem in layer.verify()]


AnyBank = Bank | LayeredBank
