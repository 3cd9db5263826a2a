"""Cold start: writes a memory when its reference is first retrieved (Memory³ §3.5)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from m3jax.errors import BankError
from m3jax.memory.cache import MemoryCache
from m3jax.memory.codec import plain
from m3jax.memory.encode import Clock, Encoder, ReferenceSet, memory_lengths
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model


class ColdMemories:
    """Writes memories when they are first read and caches them; a reader like `Bank`.

    Attributes:
      codec: they are kept as they are.
      written: memories that were written since the start.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: Model,
        params: Params,
        references: ReferenceSet,
        limit: int,
        grows: bool = False,
    ) -> None:
        """Prepares the writer.

        Args:
          config: a validated config; `writer.batch_references` are encoded by one call.
          model: of the writer.
          params: the writer's parameters.
          references: what is retrieved.
          limit: bytes of memories that are kept; those read longest ago are written again.
          grows: whether references may be added later; there may be none yet.

        Raises:
          BankError: nothing to write, or memories that depend on more than their reference.
        """
        if config.writer.document_context:
            raise BankError(
                "config.writer.document_context = True: a cold start encodes references alone;"
                " write a bank (launch/write_bank.py)"
            )
        model_, memory = config.model, config.memory
        self.codec = plain(model_.head_dim, memory.dtype)
        self._shape = (memory.layers, model_.kv_heads, memory.kept_tokens, model_.head_dim)
        self._dtype = np.dtype(jnp.dtype(memory.dtype))
        self._config, self._references = config, references
        self._lengths: Any = np.zeros(0, np.int32)
        self._encoder = Encoder(config, model, params, references, self.codec)
        self._cache, self._clock = MemoryCache(limit), Clock()
        self.written = 0
        if not grows:
            self._lengths = memory_lengths(config, references)

    @property
    def size(self) -> int:
        """Number of references; their set may grow."""
        return len(self._references)

    def read_stored(self, ids: Int[np.ndarray, "*shape"]) -> ExplicitMemory:
        """Reads like `Bank.read_stored`; writes memories that are not cached."""
        unique, places = np.unique(ids, return_inverse=True)
        if len(unique) and not -1 <= unique[0] <= unique[-1] < self.size:
            raise BankError(f"reference id {unique[-1]} is not among the {self.size} references")
        memories = dict(zip(unique.tolist(), self._cache.find(unique.tolist()), strict=True))
        missing = np.array([i for i, memory in memories.items() if memory is None and i >= 0], int)
        if len(missing):
            batches = np.concatenate(list(self._encoder.batches(missing, self._clock)))
            self.written += len(missing)
            for i, memory in zip(missing.tolist(), batches, strict=True):
                memories[i] = memory
                self._cache.keep(i, memory)
        if len(self._lengths) < self.size:
            self._lengths = memory_lengths(self._config, self._references)
        nothing = np.zeros((2, *self._shape), self._dtype)
        stacked = np.stack([nothing if (m := memories[i]) is None else m for i in unique.tolist()])
        both = stacked[places.reshape(-1)].reshape(*ids.shape, *stacked.shape[1:])
        keys, values = np.moveaxis(both, ids.ndim, 0)
        length: Any = np.append(self._lengths, 0)[ids]  # −1 is the last
        return ExplicitMemory(keys, values, length.astype(np.int32))

    def report(self) -> dict[str, int]:
        """Returns the counters of the cache, and `written`."""
        return {**self._cache.report(), "written": self.written}
