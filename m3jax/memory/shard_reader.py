"""Reading memories from the shard files of a bank, straight into arrays.

TensorStore copies a memory three times on its way: out of the page cache, into its own cache, into
the array. Here the kernel writes it into a small buffer that stays in the processor's cache, where
its checksum is compared, and from there it goes to its place in the array; from a server or a
bucket come the bytes of the memory and no others. What is unusual (a missing or damaged file) is
left to TensorStore, which names it.
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
from jaxtyping import Bool, Int, Shaped

from m3jax.memory.storage import IO_THREADS, SECONDS, is_url, shard_key, store

_SHARDS = 8192  # shard indexes kept, 4 kB each at 256 memories a shard
_CHECKSUM = 4  # bytes


class Chunk(NamedTuple):
    """Place of a memory in the file of a shard, and the bytes `(2, L, K, P, width)` it goes to."""

    shard: int
    offset: int
    target: np.ndarray

    def fill(self, data: Any) -> bool:
        """Copies a memory and its checksum into the target; returns False where it is damaged."""
        memory, stored = memoryview(data)[:-_CHECKSUM], data[-_CHECKSUM:]
        if crc32c.crc32c(memory) != int.from_bytes(stored, "little"):
            return False
        self.target[...] = np.frombuffer(memory, np.uint8).reshape(self.target.shape)
        return True


class DirectReader:
    """Reads chunks of a bank's zarr3 shards at random. Safe to use from several threads."""

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
        selected: Bool[np.ndarray, " n"],
        memories: Shaped[np.ndarray, "n 2 L K P width"],
    ) -> bool:
        """Reads memories; arguments as in `Shards.read`.

        Returns:
          Whether all were there and intact. If not, the array holds anything.
        """
        order = np.argsort(ids, kind="stable")
        order = order[selected[order]]
        targets = memories.view(np.uint8)

        def read(group: np.ndarray) -> bool:
            try:
                return self._load([self._chunk(int(ids[i]), targets[i]) for i in group])
            except (OSError, ValueError, IndexError):
                return False

        step = max(-(-len(order) // self.threads), -(-self.task // max(1, targets[0].nbytes)))
        groups = [order[i : i + step] for i in range(0, len(order), step)]
        # To the last one: a group still under way would write into arrays that others fill again.
        return all(list(self._pool.map(read, groups)))

    def _chunk(self, memory: int, target: np.ndarray) -> Chunk:
        shard, row = divmod(memory, self._shard)
        offset, size = self._index(shard)[row].tolist()
        if size != target.nbytes + _CHECKSUM:
            raise ValueError(f"{size} bytes of another memory")
        return Chunk(shard, offset, target)

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
        """Fills the targets of chunks; returns True if all were there and intact.

        Raises:
          OSError, ValueError: one cannot be read.
        """
        raise NotImplementedError

    def _end(self, shard: int, size: int) -> bytes:
        """The last bytes of a shard's file; raises as `_load`."""
        raise NotImplementedError


class FileReader(DirectReader):
    """Reads from a local folder, on a system that reads into a given buffer."""

    def _load(self, chunks: list[Chunk]) -> bool:
        with contextlib.ExitStack() as files:
            shards = {chunk.shard for chunk in chunks}
            opened = {shard: files.enter_context(self._open(shard)).fileno() for shard in shards}
            for chunk in chunks:
                _announce(opened[chunk.shard], chunk)
            data = bytearray(chunks[0].target.nbytes + _CHECKSUM)
            return all(
                os.preadv(opened[chunk.shard], [data], chunk.offset) == len(data)
                and chunk.fill(data)
                for chunk in chunks
            )

    def _open(self, shard: int) -> FileIO:
        return FileIO(Path(self._folder) / shard_key(shard))

    def _end(self, shard: int, size: int) -> bytes:
        with self._open(shard) as file:
            file.seek(-size, os.SEEK_END)
            return file.read()


class RangeReader(DirectReader):
    """Reads from any store that TensorStore knows, with as many requests as threads."""

    threads, task = IO_THREADS, 1

    def __init__(self, folder: str | Path, manifest: dict[str, Any]):
        super().__init__(folder, manifest)
        self._store = store(folder)

    def _load(self, chunks: list[Chunk]) -> bool:
        return all(
            chunk.fill(
                self._range(
                    chunk.shard,
                    slice(chunk.offset, chunk.offset + chunk.target.nbytes + _CHECKSUM),
                )
            )
            for chunk in chunks
        )

    def _end(self, shard: int, size: int) -> bytes:
        return self._range(shard, slice(-size, None))

    def _range(self, shard: int, span: slice) -> bytes:
        future = self._store.read(shard_key(shard), byte_range=span)
        result = future.result(timeout=SECONDS)  # TimeoutError is an OSError
        if result.state != "value":
            raise FileNotFoundError(shard_key(shard))
        return bytes(result.value)


def _announce(descriptor: int, chunk: Chunk) -> None:
    """Tells the disk what will be read: it looks for all of it at once, not for one at a time."""
    if hasattr(os, "posix_fadvise"):
        size = chunk.target.nbytes + _CHECKSUM
        os.posix_fadvise(descriptor, chunk.offset, size, os.POSIX_FADV_WILLNEED)


def open_reader(folder: str | Path, manifest: dict[str, Any]) -> DirectReader:
    """Returns the fastest reader of a bank's shards."""
    local = not is_url(folder) and hasattr(os, "preadv")
    return (FileReader if local else RangeReader)(folder, manifest)
