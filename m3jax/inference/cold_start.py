"""Writes memories when their references are first read, and caches them (Memory³ §3.5)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from m3jax.errors import BankError
from m3jax.memory.cache import MemoryCache
from m3jax.memory.codec import NONE, Codec
from m3jax.memory.encode import Encoder, ReferenceTokens, memory_lengths
from m3jax.memory.reader import MemoryReader
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model


class ColdMemories(MemoryReader):
    """Reader of memories that writes each memory when it is first read, without a bank.

    Attributes:
      codec: format in which memories are stored.
      written: number of memories written since the start.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: Model,
        params: Params,
        references: ReferenceTokens,
        limit: int = 0,
        codec: Codec | None = None,
    ) -> None:
        """Prepares the writer.

        Args:
          config: a validated config; one call encodes `writer.batch_references` references.
          model: of the writer.
          params: the writer's parameters.
          references: the knowledge base; it may grow, also from empty.
          limit: most bytes of cached memories; the least recently read are dropped and written
            again.
          codec: format in which memories are stored; default uncompressed.

        Raises:
          BankError: references without tokens, or longer than `memory.reference_length`.
        """
        memory = config.memory
        self.codec = Codec(NONE, config.model.head_dim, memory.dtype) if codec is None else codec
        self._nothing = np.zeros(
            (2, *self.codec.item_shape(model.slots)), jnp.dtype(self.codec.stored_dtype)
        )
        self._config, self._references = config, references
        self._encoder = Encoder(config, model, params, references, self.codec)
        self._cache = MemoryCache(limit)
        self.written = 0
        self._lengths: Any = memory_lengths(config, references) if self.size else []

    @property
    def size(self) -> int:
        """Number of references, which may grow."""
        return len(self._references)

    def read_stored(self, ids: Int[np.ndarray, "*shape"]) -> ExplicitMemory:
        """Reads memories as they are stored, and writes the memories that are not cached.

        Shapes as of `MemoryReader.read_stored`. Raises `BankError` for an id that is not a
        reference.
        """
        unique = np.unique(ids)
        if len(unique) and not -1 <= unique[0] <= unique[-1] < self.size:
            raise BankError(f"reference id {unique[-1]} is not among the {self.size} references")
        memories = dict(zip(unique.tolist(), self._cache.find(unique.tolist()), strict=True))
        missing = np.array([i for i, memory in memories.items() if memory is None and i >= 0], int)
        if len(missing):
            batches = np.concatenate(list(self._encoder.batches(missing)))
            self.written += len(missing)
            for i, memory in zip(missing.tolist(), batches, strict=True):
                memories[i] = memory
                self._cache.keep(i, memory)
        if len(self._lengths) < self.size:
            self._lengths = memory_lengths(self._config, self._references)
        two, layers, *item = self._nothing.shape
        both = np.empty((two, layers, ids.size, *item), self._nothing.dtype)
        for place, i in enumerate(ids.reshape(-1).tolist()):
            memory = memories[i]
            both[:, :, place] = self._nothing if memory is None else memory
        keys, values = both.reshape(two, layers, *ids.shape, *item)
        length: Any = np.append(self._lengths, 0)[ids]  # index −1, no memory, reads the appended 0
        return ExplicitMemory(keys, values, length.astype(np.int32))

    def report(self) -> dict[str, int]:
        """Returns the counters of the cache, and `written`."""
        return {**self._cache.report(), "written": self.written}
