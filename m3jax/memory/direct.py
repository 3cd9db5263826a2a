"""Reading memories from the shard files of a bank, straight into arrays.

TensorStore copies a memory three times on its way: out of the page cache, into its own cache, into
the array. Here the kernel writes it into the array, and a second look compares its checksum; from
a server or a bucket come the bytes of the memory and no others. What is unusual (a missing or
damaged file) is left to TensorStore, which names it.
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

from m3jax.memory.storage import IO_THREADS, SECONDS, is_url, shard_key, store

_SHARDS = 8192  # shard indexes kept, 4 kB each at 256 memories a shard
_CHECKSUM = 4  # bytes


class DirectReader:
    """Random access to the chunks of a bank's zarr3 shards. Safe to use from several threads."""

    threads = 16
    group = 4  # memories a task: fewer would cost more in Python, more would wait for each other

    def __init__(self, folder: str | Path, manifest: dict[str, Any]):
        """Reads nothing yet."""
        self._folder, self._shard = folder, manifest["shard_memories"]
        self._index = functools.lru_cache(maxsize=_SHARDS)(self._read_index)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="memories")

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
        groups = [order[i : i + self.group] for i in range(0, len(order), self.group)]

        def read(group: np.ndarray) -> bool:
            return all(self._one(int(ids[i]), keys[i], values[i]) for i in group)

        return all(self._pool.map(read, groups))

    def _one(self, memory: int, keys: np.ndarray, values: np.ndarray) -> bool:
        shard, row = divmod(memory, self._shard)
        k, v = (array.reshape(-1).view(np.uint8).data for array in (keys, values))
        try:
            offset, size = self._index(shard)[row].tolist()
            return size == len(k) + len(v) + _CHECKSUM and self._load(shard, offset, k, v)
        except (OSError, ValueError, IndexError):
            return False

    def _read_index(self, shard: int) -> np.ndarray:
        """Place and size of every chunk of a shard, from the end of its file.

        Raises:
          ValueError: it is damaged.
        """
        size = 16 * self._shard
        data = self._end(shard, size + _CHECKSUM)
        if crc32c.crc32c(data[:size]) != int.from_bytes(data[size:], "little"):
            raise ValueError("the shard's index is damaged")
        return np.frombuffer(data[:size], "<u8").reshape(-1, 2)

    def _load(self, shard: int, offset: int, keys: memoryview, values: memoryview) -> bool:
        """Copies a chunk of a shard's file, from `offset` on; whether it is there and intact.

        Raises:
          OSError, ValueError: it cannot be read.
        """
        raise NotImplementedError

    def _end(self, shard: int, size: int) -> bytes:
        """The last bytes of a shard's file; raises as `_load`."""
        raise NotImplementedError


class FileReader(DirectReader):
    """Of a local folder, on a system that reads into several buffers at once."""

    def _load(self, shard: int, offset: int, keys: memoryview, values: memoryview) -> bool:
        stored = bytearray(_CHECKSUM)
        descriptor = os.open(Path(self._folder) / shard_key(shard), os.O_RDONLY)
        try:
            expected = len(keys) + len(values) + _CHECKSUM
            if os.preadv(descriptor, [keys, values, stored], offset) != expected:
                return False
        finally:
            os.close(descriptor)
        return crc32c.crc32c(values, crc32c.crc32c(keys)) == int.from_bytes(stored, "little")

    def _end(self, shard: int, size: int) -> bytes:
        with (Path(self._folder) / shard_key(shard)).open("rb") as file:
            file.seek(-size, os.SEEK_END)
            return file.read()


class RangeReader(DirectReader):
    """Of a server, a bucket or any store that TensorStore knows: as many requests as threads."""

    threads, group = IO_THREADS, 1

    def __init__(self, folder: str | Path, manifest: dict[str, Any]):
        super().__init__(folder, manifest)
        self._store = store(folder)

    def _load(self, shard: int, offset: int, keys: memoryview, values: memoryview) -> bool:
        size = len(keys) + len(values)
        data = self._range(shard, slice(offset, offset + size + _CHECKSUM))
        if crc32c.crc32c(data[:size]) != int.from_bytes(data[size:], "little"):
            return False
        keys[:], values[:] = data[: len(keys)], data[len(keys) : size]
        return True

    def _end(self, shard: int, size: int) -> bytes:
        return self._range(shard, slice(-size, None))

    def _range(self, shard: int, span: slice) -> bytes:
        future = self._store.read(shard_key(shard), byte_range=span)
        found = future.result(timeout=SECONDS)  # TimeoutError is an OSError
        if found.state != "value":
            raise FileNotFoundError(shard_key(shard))
        return bytes(found.value)


def open_reader(folder: str | Path, manifest: dict[str, Any]) -> DirectReader:
    """The fastest reader of a bank's shards."""
    local = not is_url(folder) and hasattr(os, "preadv")
    return (FileReader if local else RangeReader)(folder, manifest)
