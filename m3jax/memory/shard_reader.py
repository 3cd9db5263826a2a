"""Reading memories from the shard files of a bank, straight into arrays.

TensorStore copies a memory three times on its way: out of the page cache, into its own cache, into
the array. Here the kernel writes it into the array, and a second look compares its checksum; from
a server or a bucket come the bytes of the memory and no others. What is unusual (a missing or
damaged file) is left to TensorStore, which names it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import crc32c
import numpy as np
from jaxtyping import Bool, Int

from m3jax.memory.storage import IO_THREADS, SECONDS, is_url, shard_key, store

_SHARDS = 8192  # shard indexes kept, 4 kB each at 256 memories a shard
_CHECKSUM = 4  # bytes


class Chunk(NamedTuple):
    """A memory's place in the file of a shard, and where it is wanted."""

    shard: int
    offset: int
    keys: memoryview
    values: memoryview


class DirectReader:
    """Random access to the chunks of a bank's zarr3 shards. Safe to use from several threads."""

    threads = 16
    task = 1 << 21  # least bytes a task: threads that only wait for Python are slower than one

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
        keys, values = (part.reshape(len(ids), -1).view(np.uint8) for part in (keys, values))

        def read(group: np.ndarray) -> bool:
            try:
                chunks = [self._chunk(int(ids[i]), keys[i].data, values[i].data) for i in group]
                return self._load(chunks)
            except (OSError, ValueError, IndexError):
                return False

        step = max(-(-len(order) // self.threads), -(-self.task // (2 * keys.shape[1])))
        groups = [order[i : i + step] for i in range(0, len(order), step)]
        # To the last one: a group still under way would write into arrays that others fill again.
        return all(list(self._pool.map(read, groups)))

    def _chunk(self, memory: int, keys: memoryview, values: memoryview) -> Chunk:
        shard, row = divmod(memory, self._shard)
        offset, size = self._index(shard)[row].tolist()
        if size != len(keys) + len(values) + _CHECKSUM:
            raise ValueError(f"{size} bytes of another memory")
        return Chunk(shard, offset, keys, values)

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

    def _load(self, chunks: list[Chunk]) -> bool:
        """Fills the buffers of chunks; whether all were there and intact.

        Raises:
          OSError, ValueError: one cannot be read.
        """
        raise NotImplementedError

    def _end(self, shard: int, size: int) -> bytes:
        """The last bytes of a shard's file; raises as `_load`."""
        raise NotImplementedError


class FileReader(DirectReader):
    """Of a local folder, on a system that reads into several buffers at once."""

    def _load(self, chunks: list[Chunk]) -> bool:
        with contextlib.ExitStack() as files:
            shards = {chunk.shard for chunk in chunks}
            opened = {shard: files.enter_context(self._open(shard)).fileno() for shard in shards}
            for chunk in chunks:
                _announce(opened[chunk.shard], chunk)
            return all(_load_from(opened[chunk.shard], chunk) for chunk in chunks)

    def _open(self, shard: int) -> FileIO:
        return FileIO(Path(self._folder) / shard_key(shard))

    def _end(self, shard: int, size: int) -> bytes:
        with self._open(shard) as file:
            file.seek(-size, os.SEEK_END)
            return file.read()


class RangeReader(DirectReader):
    """Of a server, a bucket or any store that TensorStore knows: as many requests as threads."""

    threads, task = IO_THREADS, 1

    def __init__(self, folder: str | Path, manifest: dict[str, Any]):
        super().__init__(folder, manifest)
        self._store = store(folder)

    def _load(self, chunks: list[Chunk]) -> bool:
        return all(map(self._load_one, chunks))

    def _load_one(self, chunk: Chunk) -> bool:
        keys, size = len(chunk.keys), len(chunk.keys) + len(chunk.values)
        data = self._range(chunk.shard, slice(chunk.offset, chunk.offset + size + _CHECKSUM))
        if crc32c.crc32c(data[:size]) != int.from_bytes(data[size:], "little"):
            return False
        chunk.keys[:], chunk.values[:] = data[:keys], data[keys:size]
        return True

    def _end(self, shard: int, size: int) -> bytes:
        return self._range(shard, slice(-size, None))

    def _range(self, shard: int, span: slice) -> bytes:
        future = self._store.read(shard_key(shard), byte_range=span)
        found = future.result(timeout=SECONDS)  # TimeoutError is an OSError
        if found.state != "value":
            raise FileNotFoundError(shard_key(shard))
        return bytes(found.value)


def _announce(descriptor: int, chunk: Chunk) -> None:
    """Tells the disk what will be read: it looks for all of it at once, not for one at a time."""
    if hasattr(os, "posix_fadvise"):
        size = len(chunk.keys) + len(chunk.values) + _CHECKSUM
        os.posix_fadvise(descriptor, chunk.offset, size, os.POSIX_FADV_WILLNEED)


def _load_from(descriptor: int, chunk: Chunk) -> bool:
    stored, (_, offset, keys, values) = bytearray(_CHECKSUM), chunk
    found = os.preadv(descriptor, [keys, values, stored], offset)
    if found != len(keys) + len(values) + _CHECKSUM:
        return False
    return crc32c.crc32c(values, crc32c.crc32c(keys)) == int.from_bytes(stored, "little")


def open_reader(folder: str | Path, manifest: dict[str, Any]) -> DirectReader:
    """The fastest reader of a bank's shards."""
    local = not is_url(folder) and hasattr(os, "preadv")
    return (FileReader if local else RangeReader)(folder, manifest)
