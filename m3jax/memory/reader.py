"""Interfaces of what gives the memories of references."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int

from m3jax.memory.codec import Codec
from m3jax.model.attention_mask import ExplicitMemory

Dequantize = Callable[[ExplicitMemory], ExplicitMemory]


@runtime_checkable
class MemoryReader(Protocol):
    """Interface of what gives memories by id: `Bank` or `ColdMemories`.

    Attributes:
      codec: how keys and values are stored.
    """

    codec: Codec

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Number of ids."""

    @abc.abstractmethod
    def read_stored(self, ids: Int[np.ndarray, "*shape"]) -> ExplicitMemory:
        """Reads memories of references as they are stored, into NumPy arrays.

        Args:
          ids: reference ids of any shape; −1 is no memory: zeros, length 0. One that occurs more
            than once is read once.

        Returns:
          Keys and values `(L, *shape, K, P, width)`, with some heads only `(1, *shape, S, P,
          width)`, for `codec.dequantize`; length `shape` int32.

        Raises:
          BankError: an id that is not there; a damaged or missing shard, naming its file.
        """

    @abc.abstractmethod
    def report(self) -> dict[str, int]:
        """Returns counters since the start."""

    @property
    def dequantize(self) -> Dequantize | None:
        """Dequantizes stored memories; None if they are plain keys and values."""
        return None if self.codec.plain else self.codec.dequantize

    def read(self, ids: Int[np.ndarray, "*shape"]) -> ExplicitMemory:
        """Reads memories of references, dequantized: keys and values `(L, *shape, K, P, H)`.

        Arguments and errors as in `read_stored`, whose result a step dequantizes itself.
        """
        stored = self.read_stored(ids)
        if self.codec.plain:
            return stored
        return jax.tree.map(np.asarray, self._compiled(stored))

    @functools.cached_property
    def _compiled(self) -> Dequantize:
        return jax.jit(self.codec.dequantize)  # compiled once a reader
