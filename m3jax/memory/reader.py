"""Interface of sources of explicit memories."""

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
    """Interface of sources of memories by reference id: `Bank` or `ColdMemories`.

    Attributes:
      codec: format in which keys and values are stored.
    """

    codec: Codec

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Returns the number of ids."""

    @abc.abstractmethod
    def read_stored(self, ids: Int[np.ndarray, "*shape"]) -> ExplicitMemory:
        """Reads memories of references in stored form, into NumPy arrays.

        Args:
          ids: reference ids of any shape; −1 gives an empty memory of zeros and length 0. Repeated
            ids are read once.

        Returns:
          Keys and values `(L, *shape, K, P, width)`, or `(1, *shape, S, P, width)` if only S heads
          are stored, for `codec.dequantize`; length `shape` int32.

        Raises:
          BankError: an id does not exist or was removed, or a shard file, which the message names,
            is damaged, missing or cannot be read.
        """

    @abc.abstractmethod
    def report(self) -> dict[str, int]:
        """Returns counters of reads since the start, by name."""

    @property
    def dequantize(self) -> Dequantize | None:
        """Returns the function that dequantizes stored memories; None if they are stored plain."""
        return None if self.codec.plain else self.codec.dequantize

    def read(self, ids: Int[np.ndarray, "*shape"]) -> ExplicitMemory:
        """Reads and dequantizes memories of references: keys and values `(L, *shape, K, P, H)`.

        Arguments and errors as in `read_stored`, which is used instead if the step dequantizes.
        """
        stored = self.read_stored(ids)
        if self.codec.plain:
            return stored
        return jax.tree.map(np.asarray, self._compiled(stored))

    @functools.cached_property
    def _compiled(self) -> Dequantize:
        return jax.jit(self.codec.dequantize)  # compiled once per reader
