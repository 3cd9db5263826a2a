"""A bank with the deltas that edits added to it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from m3jax.errors import BankError
from m3jax.memory import codec as codecs
from m3jax.memory.bank import Bank
from m3jax.memory.binding import Binding
from m3jax.memory.reader import BankReader
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.numbering import Numbering


class DeltaBank(BankReader):
    """Reads several banks of one writer as one, without the memories of tombstones.

    Attributes: those of `BankReader`, and
      banks: the base and its deltas.
      numbering: ids over them.
    """

    def __init__(self, banks: Sequence[Bank], tombstones: np.ndarray, references: str) -> None:
        """Joins banks.

        Args:
          banks: base and deltas, of one writer, tokenizer and layout, stored alike.
          tombstones: ids whose memories are not to be read.
          references: fingerprint of all references.

        Raises:
          BankError: a delta was written by something else, or is stored differently.
        """
        base = banks[0]
        for delta in banks[1:]:
            delta.require(dataclasses.replace(base.binding, references=delta.binding.references))
            if not codecs.same(delta.codec, base.codec):
                raise BankError(
                    f"bank {delta.folder} is stored with {delta.codec.name!r} or other codebooks"
                    f" than {base.folder} ({base.codec.name!r}); write it with --base of that one"
                )
            delta.shards.cache = base.shards.cache  # one limit for all
        self.banks, self.folder, self.codec = list(banks), base.folder, base.codec
        self.numbering = Numbering([bank.size for bank in banks], tombstones)
        self.binding = dataclasses.replace(base.binding, references=references)
        self.lengths = np.concatenate([np.asarray(bank.lengths, np.int32) for bank in banks])

    @property
    def size(self) -> int:
        """Number of ids, tombstones included."""
        return self.numbering.size

    @property
    def live(self) -> Int[np.ndarray, " n"]:
        """Ids in use, ascending."""
        return self.numbering.live

    @property
    def bytes(self) -> int:
        """Bytes of all keys and values, as they are stored."""
        return sum(bank.bytes for bank in self.banks)

    @property
    def writer(self) -> dict[str, Any]:
        """Checkpoint that wrote the base: `hash` of the weights, `path` and `step`."""
        return self.banks[0].writer

    @property
    def record_hashes(self) -> np.ndarray:
        """Hash of all tokens that shaped each memory; of tombstones, one that fits nothing."""
        hashes = np.concatenate([bank.record_hashes for bank in self.banks])
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
        """Reads memories as they are stored; raises `BankError` for a tombstone, too."""
        flat = np.asarray(ids).reshape(-1)
        wrong = (flat < -1) | (flat >= self.size) | self.numbering.is_removed(flat)
        if wrong.any():
            raise BankError(
                f"reference id {flat[wrong][0]} is not in this version of bank {self.folder}: it"
                f" was removed, or is none of 0 … {self.size - 1}"
            )
        real = np.flatnonzero(flat >= 0)
        _, layers, *item = self.banks[0].manifest["shape"][1:]
        both = np.zeros((2, layers, flat.size, *item), self.banks[0].dtype)
        length: Any = np.zeros(flat.size, np.int32)
        for part, positions, rows in self.numbering.split(flat[real]):
            stored = self.banks[part].read_stored(rows)
            place = real[positions]
            both[0][:, place], both[1][:, place] = stored.keys, stored.values
            length[place] = stored.length
        keys, values = both.reshape(2, layers, *ids.shape, *item)
        return ExplicitMemory(keys, values, length.reshape(ids.shape))

    def report(self) -> dict[str, int]:
        """Returns counters of the cache that all banks share."""
        return self.banks[0].report()

    def verify(self) -> list[str]:
        """Reads everything; returns files of damaged or missing shards, each with the reason."""
        return [problem for bank in self.banks for problem in bank.verify()]
