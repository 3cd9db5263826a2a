"""Reads memories from shard files: deduplicates ids, uses a cache, names damaged files.

TensorStore copies a memory three times: out of the page cache, into its own cache, into the array.
This reader lets the kernel copy it into a small buffer that stays in the processor's cache,
verifies its checksum there, which must be the one that the bank has for this memory, and copies it
to its place in the array. From a server or a bucket it requests only the bytes of each memory, and
not even the shard's index first: memories have one size and lie in order, and the checksum tells.
After a failure, TensorStore finds out which files are missing or damaged.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import tensorstore as ts
from jaxtyping import Int, Shaped, UInt32

from m3jax.errors import BankError
from m3jax.failures import raise_if_machine
from m3jax.memory import storage
from m3jax.memory.cache import MemoryCache
from m3jax.private_apis import is_damaged, is_missing, reason_of

_ATTEMPTS = 3  # attempts per read, because some faults are temporary
_INDEXES = 8192  # shard indexes kept in RAM: 4 kB each at 256 memories per shard
_CHECKSUM_BYTES = 4
_ELSEWHERE = "holds other memories than were written there, of another place or bank"


def _is_intact(data: bytes | bytearray, expected: int | None = None) -> bool:
    """Returns True if the last four bytes are the CRC-32C checksum of the bytes before them.

    If `expected` is not None, it must be the checksum, too.
    """
    stored = int.from_bytes(data[-_CHECKSUM_BYTES:], "little")
    same = expected is None or expected == stored
    return same and crc32c.crc32c(memoryview(data)[:-_CHECKSUM_BYTES]) == stored


class _Files:
    """Reads shard files of a local folder, on systems with `preadv`."""

    threads = 16
    task = 1 << 21  # least bytes per task: with smaller tasks, threads mostly wait for the GIL
    _files = 32  # open files per thread: the limit of a process is often 1024

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder

    def load(
        self,
        shards: list[int],
        offsets: list[int],
        expected: Sequence[int | None],
        targets: list[np.ndarray],
    ) -> bool:
        """Reads memory i at byte `offsets[i]` of shard `shards[i]` (ascending) into `targets[i]`.

        `expected` are the checksums of the memories, if they are known. Targets are uint8, all of
        one shape. Returns False at the first memory that is truncated or fails its checksum; its
        target and later ones are then as they were.
        """
        data = bytearray(targets[0].nbytes + _CHECKSUM_BYTES)
        memory = np.frombuffer(data, np.uint8, targets[0].nbytes).reshape(targets[0].shape)
        places = list(zip(shards, offsets, expected, targets, strict=True))
        firsts = [i for i, shard in enumerate(shards) if i == 0 or shard != shards[i - 1]]
        for low, high in itertools.pairwise([*firsts[:: self._files], len(shards)]):
            part = places[low:high]
            with contextlib.ExitStack() as files:
                numbers = {shard for shard, *_ in part}
                opened = {i: files.enter_context(self._open(i)).fileno() for i in numbers}
                if hasattr(os, "posix_fadvise"):  # ask the kernel to read all ahead
                    for shard, offset, *_ in part:
                        os.posix_fadvise(opened[shard], offset, len(data), os.POSIX_FADV_WILLNEED)
                for shard, offset, known, target in part:
                    read = os.preadv(opened[shard], [data], offset)
                    if read != len(data) or not _is_intact(data, known):
                        return False
                    target[...] = memory
        return True

    def end(self, shard: int, size: int) -> bytes:
        """Reads the last bytes of a shard's file."""
        with self._open(shard) as file:
            file.seek(-size, os.SEEK_END)
            return file.read()

    def _open(self, shard: int) -> FileIO:
        return FileIO(f"{self._folder}/{storage.shard_key(shard)}")


class _Ranges:
    """Reads shard files of any store that TensorStore supports, each thread some requests ahead.

    A thread for each request is no faster, and takes a third more processor time.
    """

    threads, task = 4, 1
    _ahead = 12  # requests of a thread; of all threads some more than there are connections

    def __init__(self, folder: str | Path) -> None:
        self._store = storage.store(folder)

    def load(
        self,
        shards: list[int],
        offsets: list[int],
        expected: Sequence[int | None],
        targets: list[np.ndarray],
    ) -> bool:
        """Reads memories as `_Files.load` does."""
        size = targets[0].nbytes + _CHECKSUM_BYTES
        rest = zip(shards, offsets, strict=True)

        def begin(count: int) -> Iterator[ts.Future]:
            return (self._begin(i, at, at + size) for i, at in itertools.islice(rest, count))

        pending = deque(begin(self._ahead))
        for known, target in zip(expected, targets, strict=True):
            data = self._done(pending.popleft())
            pending.extend(begin(1))
            if not _is_intact(data, known):
                return False
            target[...] = np.frombuffer(data, np.uint8, target.nbytes).reshape(target.shape)
        return True

    def end(self, shard: int, size: int) -> bytes:
        """Reads the last bytes of a shard's file."""
        return self._done(self._begin(shard, -size, None))

    def _begin(self, shard: int, start: int, stop: int | None) -> ts.Future:
        return self._store.read(storage.shard_key(shard), byte_range=slice(start, stop))

    def _done(self, future: ts.Future) -> bytes:
        result = future.result(timeout=storage.SECONDS)  # TimeoutError is an OSError
        if result.state != "value":
            raise FileNotFoundError("a shard")
        return result.value


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Returns the threads of all readers: a bank has a reader for each of its edits."""
    return ThreadPoolExecutor(threads, thread_name_prefix="memories")


class ShardReader:
    """Reads memories from a bank's shards in stored form. Safe to use from several threads.

    Attributes:
      folder, manifest: location and parsed manifest of the bank.
      checksums: CRC-32C of every memory (R,); None for a bank that an older version wrote, whose
        shards are not told apart.
      cache: LRU cache of memories in RAM; base and deltas of a bank share one.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: dict[str, Any],
        checksums: UInt32[np.ndarray, " R"] | None,
        cache_bytes: int,
    ) -> None:
        """Opens a bank; raises `BankError` if its array is missing or does not fit the manifest."""
        storage.open_array(folder, manifest)
        self.folder, self.manifest, self.checksums = folder, manifest, checksums
        self.cache = MemoryCache(cache_bytes)
        local = not storage.is_url(folder) and hasattr(os, "preadv")
        self._source = _Files(folder) if local else _Ranges(folder)
        self._shard = manifest["shard_memories"]
        self._index = functools.lru_cache(maxsize=_INDEXES)(self._read_index)

    def read(
        self,
        ids: Int[np.ndarray, " n"],
        places: Int[np.ndarray, " n"],
        memories: Shaped[np.ndarray, "m parts numbers"],
    ) -> None:
        """Reads memory `ids[i]` into `memories[places[i]]`; repeated ids are read once.

        Args:
          ids: ids of memories in the bank.
          places: row of `memories` for each id; other rows are not changed.
          memories: output; stored keys, then values, of every layer (`parts` = 2 L), contiguous on
            the last axis.

        Raises:
          BankError: a shard file, which the message names, is damaged, missing or cannot be read,
            or the server cannot be reached.
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
        if not self._try_shards(ids, places, memories):
            storage.require_served(self.folder)
            self._index.cache_clear()  # a shard may have been rewritten
            self._read_slowly(ids, places, memories)

    def _read_slowly(self, ids: np.ndarray, places: np.ndarray, memories: np.ndarray) -> None:
        """Reads memories through TensorStore, or names the damaged shards.

        Some faults are temporary, also those that the search for damaged shards meets.
        """
        shards = ids // self._shard
        for _ in range(_ATTEMPTS):
            array = storage.open_array(self.folder, self.manifest)
            try:
                stored = array[ids].read().result()
                self._compare(stored, ids)
            except ValueError as error:
                numbers = np.unique(shards).tolist()
                each = (self._problem(array, i, ids[shards == i]) for i in numbers)
                problems, cause = "; ".join(filter(None, each)), error
            else:
                memories[places] = stored.reshape(len(ids), *memories.shape[1:])
                return
        script = storage.write_again(self.folder)
        remedy = f"Move the damaged file elsewhere and run {script}"
        if storage.is_http(self.folder):
            remedy = f"If it is so on the server, move the file elsewhere and run {script}"
        raise BankError(
            f"bank {self.folder}: {problems or f'unreadable: {reason_of(cause)}'}. {remedy}: it"
            " writes only shards that are missing"
        ) from cause

    def _compare(self, stored: Shaped[np.ndarray, "n ..."], ids: Int[np.ndarray, " n"]) -> None:
        """Raises `ValueError` if a memory is not the one that was written with its id."""
        if self.checksums is None:
            return
        if (storage.checksums_of(stored) != self.checksums[ids]).any():
            raise ValueError(_ELSEWHERE)

    def _try_shards(self, ids: np.ndarray, places: np.ndarray, memories: np.ndarray) -> bool:
        """Reads memories once; returns False, with rows undefined, if any is missing or damaged."""
        targets = memories.view(np.uint8)
        size = targets[0].nbytes + _CHECKSUM_BYTES
        remote = isinstance(self._source, _Ranges)

        def load(start: int) -> bool:
            part = slice(start, start + step)
            shards, rows = np.divmod(ids[part], self._shard)
            into = [targets[i] for i in places[part]]
            known: Sequence[int | None] = [None] * len(into)
            if self.checksums is not None:
                known = self.checksums[ids[part]].tolist()

            def at(offsets: np.ndarray) -> bool:
                return self._source.load(shards.tolist(), offsets.tolist(), known, into)

            try:
                if remote and self.checksums is not None and at(rows * size):
                    return True
                indexes = {i: self._index(i) for i in np.unique(shards).tolist()}
                chunks = [indexes[i][row] for i, row in zip(shards, rows, strict=True)]
                offsets, sizes = np.array(chunks).T
                if (sizes == size).all() and at(offsets):
                    return True
            except (OSError, ValueError, IndexError) as error:
                raise_if_machine(error)
            return False

        step = max(-(-len(ids) // self._source.threads), -(-self._source.task // size))
        # Wait for all tasks: a running one would write into rows that the next attempt fills.
        return all(list(_pool(self._source.threads).map(load, range(0, len(ids), step))))

    def _read_index(self, shard: int) -> np.ndarray:
        """Reads offset and size in bytes of each memory of a shard, from the end of its file."""
        data = self._source.end(shard, 16 * self._shard + _CHECKSUM_BYTES)
        if not _is_intact(data):
            raise ValueError("the shard's index is damaged")
        return np.frombuffer(data[:-_CHECKSUM_BYTES], "<u8").reshape(-1, 2)

    def damaged(self) -> list[tuple[str, str]]:
        """Reads all shards; returns file and description of each damaged or missing shard.

        Raises `BankError` if a shard may be whole, but cannot be opened.
        """
        array = storage.open_array(self.folder, self.manifest)
        shards = range(storage.shards_of(self.manifest))
        problems = ((storage.shard_key(shard), self._problem(array, shard)) for shard in shards)
        return [(name, problem) for name, problem in problems if problem]

    def _problem(
        self, array: ts.TensorStore, shard: int, ids: np.ndarray | None = None
    ) -> str | None:
        """Reads a shard, or some of its memories; returns a description of the fault, or None."""
        low, high = storage.shard_span(self.manifest, shard)
        name = f"shard file {self.folder}/{storage.shard_key(shard)} (memories {low} … {high - 1})"
        part = array[low:high] if ids is None else array[ids]
        try:
            self._compare(part.read().result(), np.arange(low, high) if ids is None else ids)
        except ValueError as error:
            raise_if_machine(error)
            if str(error) == _ELSEWHERE:
                return f"{name} {_ELSEWHERE}"
            if is_missing(error):
                return f"{name} is missing"
            if is_damaged(error):
                return f"{name} is damaged (checksum differs)"
            what = "cannot be read" if storage.is_http(self.folder) else "is damaged"
            return f"{name} {what} ({reason_of(error)})"
        return None
