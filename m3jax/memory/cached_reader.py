"""Reads memories from shard files: deduplicates ids, serves cached ones, names damaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Bool, Int, Shaped

from m3jax.errors import BankError
from m3jax.memory.cache import MemoryCache
from m3jax.memory.http_probe import require_served
from m3jax.memory.shard_reader import open_reader
from m3jax.memory.storage import WRITE_AGAIN, is_http, open_array, shard_key, shards_of
from m3jax.private_apis import is_damaged, is_missing, reason_of

_ATTEMPTS = 3  # at memories whose fault passes


class Shards:
    """Reads memories as they are stored. Safe to use from several threads.

    Attributes:
      cache: memories read last, in RAM; the banks of a `DeltaBank` share one.
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any], cache_bytes: int):
        """Opens the array; raises `BankError` where it is missing or is not the manifest's."""
        self._folder, self._manifest = folder, manifest
        self.cache = MemoryCache(cache_bytes)
        self._array = open_array(folder, manifest)
        self._reader = open_reader(folder, manifest)

    def read(
        self,
        ids: Int[np.ndarray, " n"],
        selected: Bool[np.ndarray, " n"],
        memories: Shaped[np.ndarray, "n 2 L K P width"],
    ) -> None:
        """Reads memories; one that occurs more than once is read once.

        Args:
          ids: of memories in the bank, where they are selected.
          selected: which of them to read; the rows of others are not touched.
          memories: filled here; of the stored dtype and any strides but those of the last three
            axes, which are contiguous.

        Raises:
          BankError: a damaged or missing shard, naming its file, or a server that is gone.
        """
        _, first, copies = np.unique(ids, return_index=True, return_inverse=True)
        once = np.zeros_like(selected)
        once[first] = selected[first]
        if self.cache.limit:
            self._read_cached(ids, once, memories)
        else:
            self._read_files(ids, once, memories)
        again = np.flatnonzero(selected & ~once)
        if again.size:
            memories[again] = memories[first[copies[again]]]

    def _read_cached(self, ids: np.ndarray, selected: np.ndarray, memories: np.ndarray) -> None:
        places = np.flatnonzero(selected)
        names = [(self._folder, int(i)) for i in ids[places]]
        missing = np.zeros_like(selected)
        for place, memory in zip(places, self.cache.find(names), strict=True):
            if memory is None:
                missing[place] = True
            else:
                memories[place] = memory
        if not missing.any():
            return
        self._read_files(ids, missing, memories)
        for place, name in zip(places, names, strict=True):
            if missing[place]:
                self.cache.keep(name, memories[place].copy())

    def _read_files(self, ids: np.ndarray, selected: np.ndarray, memories: np.ndarray) -> None:
        if self._reader.read(ids, selected, memories):
            return
        require_served(self._folder)
        self._read_slowly(ids[selected], ts.array(memories)[np.flatnonzero(selected)])

    def _read_slowly(self, ids: np.ndarray, target: ts.TensorStore) -> None:
        """Reads memories into a TensorStore view of a buffer, or names what is damaged.

        A fault that a second look does not find has passed: the memories are read again.
        """
        shards = ids // self._manifest["shard_memories"]
        for _ in range(_ATTEMPTS):
            try:
                target.write(self._array[ids]).result()
                return
            except ValueError as error:
                # The slow way to the file's name: it does not depend on how messages are worded.
                array = open_array(self._folder, self._manifest)
                each = (
                    self._problem(array, i, ids[shards == i]) for i in np.unique(shards).tolist()
                )
                problems = "; ".join(filter(None, each))
                cause = error
            if problems:
                break
        remedy = f"Delete the damaged file and run {WRITE_AGAIN} again"
        if is_http(self._folder):
            remedy = f"If it is so on the server, delete the file and run {WRITE_AGAIN} there"
        raise BankError(
            f"bank {self._folder}: {problems or f'unreadable: {cause}'}. {remedy}: it writes only"
            " shards that are missing"
        ) from cause

    def damaged(self) -> list[tuple[str, str]]:
        """Reads everything; returns files of damaged or missing shards, and the reasons."""
        array = open_array(self._folder, self._manifest)
        shards = range(shards_of(self._manifest))
        problems = ((shard_key(shard), self._problem(array, shard)) for shard in shards)
        return [(name, problem) for name, problem in problems if problem]

    def _problem(
        self, array: ts.TensorStore, shard: int, ids: np.ndarray | None = None
    ) -> str | None:
        """Says what is wrong with a shard, or with some of its memories; None: nothing."""
        low = shard * self._manifest["shard_memories"]
        high = min(low + self._manifest["shard_memories"], self._manifest["shape"][0])
        name = f"shard file {self._folder}/{shard_key(shard)} (memories {low} … {high - 1})"
        try:
            (array[low:high] if ids is None else array[ids]).read().result()
        except ValueError as error:
            if is_missing(error):
                return f"{name} is missing"
            if is_damaged(error):
                return f"{name} is damaged (checksum differs)"
            what = "cannot be read" if is_http(self._folder) else "is damaged"
            return f"{name} {what} ({reason_of(error)})"
        return None
