"""Pool of reusable host buffers for batches of explicit memories.

A batch of a large model takes tens to hundreds of megabytes. The kernel zeroes each page of a new
allocation, which takes as long as reading the batch from the page cache; a reused buffer avoids
this cost.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque

import numpy as np

_SMALL = 1 << 20  # bytes; smaller arrays are simply allocated
_KEPT = 2  # most unused buffers that the pool holds


class Buffers:
    """Pools page-aligned buffers for arrays. Safe to use from several threads."""

    def __init__(self) -> None:
        """Makes an empty pool."""
        self._free: deque[mmap.mmap] = deque(maxlen=_KEPT)

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Returns an uninitialized array.

        Its buffer returns to the pool when the array and all its views are garbage-collected, also
        if JAX holds one: on a CPU, JAX uses a page-aligned array without copying it.
        """
        size = math.prod(shape) * dtype.itemsize
        if size < _SMALL:
            return np.empty(shape, dtype)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = _mapped(size)
        if len(memory) < size:
            memory = _mapped(size)
        array = np.frombuffer(memory, np.uint8, size)
        # NumPy views keep `array` alive as their base, because the buffer below it is no array.
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.view(dtype).reshape(shape)


def _mapped(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
