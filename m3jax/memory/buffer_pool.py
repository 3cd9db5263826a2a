"""Buffers for batches of memories, used again and again.

A batch of memories of a large model takes tens to hundreds of megabytes. The pages of fresh memory
are zeroed by the kernel one by one, which takes as long as reading the batch out of the page cache;
a buffer that an earlier batch has left costs nothing.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque

import numpy as np

_SMALL = 1 << 20  # bytes; below, malloc does as well
_KEPT = 2  # buffers that wait for another batch


class Buffers:
    """Memory for arrays. Safe to use from several threads."""

    def __init__(self) -> None:
        """Holds nothing yet."""
        self._free: deque[mmap.mmap] = deque(maxlen=_KEPT)

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array that holds anything.

        Its memory comes back by itself when neither the array nor a view of it is in use any more,
        be it by JAX: on a CPU it computes with the array itself, for it begins at a page.
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
        # All views hold on to `array`: what is below it is no array.
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.view(dtype).reshape(shape)


def _mapped(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
