"""LRU cache of explicit memories in RAM (Memory³ §3.2: neighbouring chunks share references)."""

from __future__ import annotations

import collections
import threading
from collections.abc import Hashable, Sequence

import numpy as np


class MemoryCache:
    """Caches stored memories, evicting the least recently used. Safe to use from several threads.

    Attributes:
      limit: most bytes of memories in the cache; 0 = caches nothing.
      hits, misses: look-ups of memories that were in the cache, and that were not.
      bytes: current size of the cached memories.
    """

    def __init__(self, limit: int) -> None:
        """Makes an empty cache."""
        self.limit = limit
        self.hits = self.misses = self.bytes = 0
        self._kept: collections.OrderedDict[Hashable, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def find(self, names: Sequence[Hashable]) -> list[np.ndarray | None]:
        """Looks memories up; None for each that is not cached. Callers must not write to them."""
        with self._lock:
            memories = [self._kept.get(name) for name in names]
            for name, memory in zip(names, memories, strict=True):
                if memory is not None:
                    self._kept.move_to_end(name)
            hits = sum(memory is not None for memory in memories)
            self.hits, self.misses = self.hits + hits, self.misses + len(memories) - hits
        return memories

    def keep(self, name: Hashable, memory: np.ndarray) -> None:
        """Caches a memory, which must not change any more; evicts least recently used memories."""
        if memory.nbytes > self.limit:
            return
        with self._lock:
            before = self._kept.pop(name, None)
            self._kept[name] = memory
            self.bytes += memory.nbytes - (0 if before is None else before.nbytes)
            while self.bytes > self.limit:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes

    def report(self) -> dict[str, int]:
        """Returns `cache_hits` and `cache_misses` since the start and the current `cache_bytes`."""
        with self._lock:
            return {
                "cache_hits": self.hits,
                "cache_misses": self.misses,
                "cache_bytes": self.bytes,
            }
