"""Reads memories from shard files: deduplicates ids, serves cached ones, names damaged files.

TensorStore copies a memory three times on its way: out of the page cache, into its own cache, into
the array. Here the kernel writes it into a small buffer that stays in the processor's cache, where
its checksum is compared, and from there it goes to its place in the array; from a server or a
bucket come the bytes of the memory and no others. TensorStore names what is missing or damaged.
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
import tensorstore as ts
from jaxtyping import Int, Shaped

from m3jax.errors import BankError
from m3jax.memory.cache import MemoryCache
from m3jax.memory.http_probe import require_served
from m3jax.memory.storage import (
    IO_THREADS,
    SECONDS,
    WRITE_AGAIN,
    is_http,
    is_url,
    open_array,
    shard_key,
    shards_of,
    store,
)
from m3jax.private_apis import is_damaged, is_missing, reason_of

_ATTEMPTS = 3  # at memories whose fault passes
_INDEXES = 8192  # of shards, kept: 4 kB each at 256 memories a shard
_CHECKSUM = 4  # bytes


class _Chunk(NamedTuple):
    """Place of a memory in the file of a shard, and the bytes `(2, L, K, P, width)` it goes to."""

    shard: int
    offset: int
    target: np.ndarray

    @property
    def size(self) -> int:
        return self.target.nbytes + _CHECKSUM

    def fill(self, data: Any) -> bool:
        """Copies a memory and its checksum into the target; returns False where it is damaged."""
        memory = memoryview(data)[:-_CHECKSUM]
        if not _intact(memory, data[-_CHECKSUM:]):
            return False
        self.target[...] = np.frombuffer(memory, np.uint8).reshape(self.target.shape)
        return True


def _intact(data: Any, checksum: bytes | bytearray) -> bool:
    return crc32c.crc32c(data) == int.from_bytes(checksum, "little")


class _Files:
    """Reads shards of a local folder, on a system that reads into an existing buffer."""

    threads = 16
    task = 1 << 21  # least bytes a task: threads that only wait for Python are slower than one

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder

    def load(self, chunks: list[_Chunk]) -> bool:
        """Fills the targets of chunks of one size; returns True if all were intact."""
        with contextlib.ExitStack() as files:
            shards = {chunk.shard for chunk in chunks}
            opened = {shard: files.enter_context(self._open(shard)).fileno() for shard in shards}
            if hasattr(os, "posix_fadvise"):  # the disk looks for all of it at once
                for shard, offset, target in chunks:
                    size = target.nbytes + _CHECKSUM
                    os.posix_fadvise(opened[shard], offset, size, os.POSIX_FADV_WILLNEED)
            data = bytearray(chunks[0].size)
            return all(
                os.preadv(opened[chunk.shard], [data], chunk.offset) == len(data)
                and chunk.fill(data)
                for chunk in chunks
            )

    def end(self, shard: int, size: int) -> bytes:
        """Reads the last bytes of a shard's file."""
        with self._open(shard) as file:
            file.seek(-size, os.SEEK_END)
            return file.read()

    def _open(self, shard: int) -> FileIO:
        return FileIO(Path(self._folder) / shard_key(shard))


class _Ranges:
    """Reads shards of any store that TensorStore knows, with as many requests as threads."""

    threads, task = IO_THREADS, 1

    def __init__(self, folder: str | Path) -> None:
        self._store = store(folder)

    def load(self, chunks: list[_Chunk]) -> bool:
        """Fills the targets of chunks; returns True if all were intact."""
        return all(c.fill(self._read(c.shard, c.offset, c.offset + c.size)) for c in chunks)

    def end(self, shard: int, size: int) -> bytes:
        """Reads the last bytes of a shard's file."""
        return self._read(shard, -size, None)

    def _read(self, shard: int, start: int, stop: int | None) -> bytes:
        future = self._store.read(shard_key(shard), byte_range=slice(start, stop))
        result = future.result(timeout=SECONDS)  # TimeoutError is an OSError
        if result.state != "value":
            raise FileNotFoundError(shard_key(shard))
        return bytes(result.value)


class ShardReader:
    """Reads memories of a bank's zarr3 shards, as they are stored. Safe to use from several
    threads.

    Attributes:
      folder, manifest: of the bank.
      cache: memories read last, in RAM; the parts of a bank with deltas share one.
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any], cache_bytes: int) -> None:
        """Raises `BankError` where the array is missing or is not the manifest's."""
        open_array(folder, manifest)
        self.folder, self.manifest = folder, manifest
        self.cache = MemoryCache(cache_bytes)
        local = not is_url(folder) and hasattr(os, "preadv")
        self._source = _Files(folder) if local else _Ranges(folder)
        self._shard = manifest["shard_memories"]
        self._index = functools.lru_cache(maxsize=_INDEXES)(self._read_index)
        self._pool = ThreadPoolExecutor(self._source.threads, thread_name_prefix="memories")

    def read(
        self,
        ids: Int[np.ndarray, " n"],
        places: Int[np.ndarray, " n"],
        memories: Shaped[np.ndarray, "m 2 L K P width"],
    ) -> None:
        """Reads memories; one that occurs more than once is read once.

        Args:
          ids: of memories in the bank.
          places: row of `memories` that each goes to; others are not touched.
          memories: of the stored dtype and any strides but those of the last three axes, which are
            contiguous.

        Raises:
          BankError: a damaged or missing shard, naming its file, or a server that is gone.
        """
        unique, first, copies = np.unique(ids, return_index=True, return_inverse=True)
        if self.cache.limit:
            self._read_cached(unique, places[first], memories)
        else:
            self._read_shards(unique, places[first], memories)
        if len(unique) < len(ids):
            again = np.delete(np.arange(len(ids)), first)
            memories[places[again]] = memories[places[first[copies[again]]]]

    def _read_cached(self, ids: np.ndarray, places: np.ndarray, memories: np.ndarray) -> None:
        names = [(self.folder, i) for i in ids.tolist()]
        cached = self.cache.find(names)
        for place, memory in zip(places, cached, strict=True):
            if memory is not None:
                memories[place] = memory
        missing = [i for i, memory in enumerate(cached) if memory is None]
        if missing:
            self._read_shards(ids[missing], places[missing], memories)
        for i in missing:
            self.cache.keep(names[i], memories[places[i]].copy())

    def _read_shards(self, ids: np.ndarray, places: np.ndarray, memories: np.ndarray) -> None:
        for _ in range(_ATTEMPTS):
            if self._try_shards(ids, places, memories):
                return
            require_served(self.folder)
            self._index.cache_clear()  # a shard may have been written again
        shards = ids // self._shard
        array = open_array(self.folder, self.manifest)
        each = (self._problem(array, i, ids[shards == i]) for i in np.unique(shards).tolist())
        problems = "; ".join(filter(None, each)) or "its files cannot be read"
        remedy = f"Delete the damaged file and run {WRITE_AGAIN} again"
        if is_http(self.folder):
            remedy = f"If it is so on the server, delete the file and run {WRITE_AGAIN} there"
        raise BankError(
            f"bank {self.folder}: {problems}. {remedy}: it writes only shards that are missing"
        )

    def _try_shards(self, ids: np.ndarray, places: np.ndarray, memories: np.ndarray) -> bool:
        """Returns whether all memories were there and intact; if not, the rows hold anything."""
        targets = memories.view(np.uint8)

        def load(start: int) -> bool:
            part = slice(start, start + step)
            pairs = zip(ids[part].tolist(), places[part].tolist(), strict=True)
            try:
                return self._source.load([self._chunk(i, targets[place]) for i, place in pairs])
            except (OSError, ValueError, IndexError):
                return False

        least = -(-self._source.task // max(1, targets[0].nbytes))
        step = max(-(-len(ids) // self._source.threads), least)
        # To the last one: a task still under way would write into arrays that others fill again.
        return all(list(self._pool.map(load, range(0, len(ids), step))))

    def _chunk(self, memory: int, target: np.ndarray) -> _Chunk:
        shard, row = divmod(memory, self._shard)
        offset, size = self._index(shard)[row].tolist()
        if size != target.nbytes + _CHECKSUM:
            raise ValueError(f"{size} bytes of another memory")
        return _Chunk(shard, offset, target)

    def _read_index(self, shard: int) -> np.ndarray:
        """Reads place and size of every chunk of a shard from the end of its file."""
        size = 16 * self._shard
        data = self._source.end(shard, size + _CHECKSUM)
        if not _intact(data[:size], data[size:]):
            raise ValueError("the shard's index is damaged")
        return np.frombuffer(data[:size], "<u8").reshape(-1, 2)

    def damaged(self) -> list[tuple[str, str]]:
        """Reads everything; returns files of damaged or missing shards, and the reasons."""
        array = open_array(self.folder, self.manifest)
        shards = range(shards_of(self.manifest))
        problems = ((shard_key(shard), self._problem(array, shard)) for shard in shards)
        return [(name, problem) for name, problem in problems if problem]

    def _problem(
        self, array: ts.TensorStore, shard: int, ids: np.ndarray | None = None
    ) -> str | None:
        """Says what is wrong with a shard, or with some of its memories; None: nothing."""
        low = shard * self._shard
        high = min(low + self._shard, self.manifest["shape"][0])
        name = f"shard file {self.folder}/{shard_key(shard)} (memories {low} … {high - 1})"
        try:
            (array[low:high] if ids is None else array[ids]).read().result()
        except ValueError as error:
            if is_missing(error):
                return f"{name} is missing"
            if is_damaged(error):
                return f"{name} is damaged (checksum differs)"
            what = "cannot be read" if is_http(self.folder) else "is damaged"
            return f"{name} {what} ({reason_of(error)})"
        return None
