"""Reading memories from the shard files of a local bank, straight into arrays.

TensorStore copies a memory three times on its way: out of the page cache, into its own cache, into
the array. Here the kernel writes it into the array, and a second look compares its checksum. What
is unusual (a missing or damaged file) is left to TensorStore, which names it; the page cache of the
system is the cache.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
from jaxtyping import Bool, Int

from m3jax.memory.storage import shard_key

_THREADS = 16
_GROUP = 4  # memories a task: fewer would cost more in Python, more would wait for each other
_SHARDS = 8192  # shard indexes kept, 4 kB each at 256 memories a shard
_CHECKSUM = 4  # bytes


class DirectReader:
    """Random access to the chunks of a bank's zarr3 shards. Safe to use from several threads."""

    def __init__(self, folder: str | Path, manifest: dict[str, Any]):
        """Opens nothing yet; see `usable`."""
        self._folder, self._shard = Path(folder), manifest["shard_memories"]
        self._index = functools.lru_cache(maxsize=_SHARDS)(self._read_index)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="memories")

    @staticmethod
    def usable(folder: str | Path) -> bool:
        """Whether a bank is a local folder on a system that reads into several buffers at once."""
        return "://" not in str(folder) and hasattr(os, "preadv")

    def read(
        self,
        ids: Int[np.ndarray, " n"],
        wanted: Bool[np.ndarray, " n"],
        keys: np.ndarray,
        values: np.ndarray,
    ) -> bool:
        """Reads memories.

        Args:
          ids: which; those wanted are in the bank.
          wanted: which of them; the others' places are not touched.
          keys, values: contiguous arrays `(n, …)` of the stored dtype, filled here.

        Returns:
          Whether all were there and intact. If not, the arrays hold anything.
        """
        order = np.argsort(ids, kind="stable")
        order = order[wanted[order]]
        groups = [order[i : i + _GROUP] for i in range(0, len(order), _GROUP)]

        def read(group: np.ndarray) -> bool:
            return all(self._one(int(ids[i]), keys[i], values[i]) for i in group)

        return all(self._pool.map(read, groups))

    def _one(self, memory: int, keys: np.ndarray, values: np.ndarray) -> bool:
        shard, row = divmod(memory, self._shard)
        k, v = _bytes(keys), _bytes(values)
        stored = bytearray(_CHECKSUM)
        expected = len(k) + len(v) + _CHECKSUM
        try:
            offset, size = self._index(shard)[row].tolist()
            if size != expected:
                return False
            descriptor = os.open(self._folder / shard_key(shard), os.O_RDONLY)
            try:
                if os.preadv(descriptor, [k, v, stored], offset) != expected:
                    return False
            finally:
                os.close(descriptor)
        except (OSError, ValueError, IndexError):
            return False
        return crc32c.crc32c(v, crc32c.crc32c(k)) == int.from_bytes(stored, "little")

    def _read_index(self, shard: int) -> np.ndarray:
        """Place and size of every chunk of a shard, from the end of its file.

        Raises:
          ValueError: it is damaged.
        """
        size = 16 * self._shard
        with (self._folder / shard_key(shard)).open("rb") as file:
            file.seek(-(size + _CHECKSUM), os.SEEK_END)
            data = file.read()
        if crc32c.crc32c(data[:size]) != int.from_bytes(data[size:], "little"):
            raise ValueError("the shard's index is damaged")
        return np.frombuffer(data[:size], "<u8").reshape(-1, 2)


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
