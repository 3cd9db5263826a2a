"""One run over the missing shards of a bank: encode or copy memories, write whole shards."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jaxtyping import Int, Shaped
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.distributed import meet
from m3jax.errors import BankError
from m3jax.memory import codec as codecs
from m3jax.memory import storage
from m3jax.memory.bank import Bank
from m3jax.memory.codec import Codec
from m3jax.memory.encode import Clock, Encoder, ReferenceSet
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.private_apis import is_disk_full

_WRITERS = 4  # threads that write shards
_WAITING = 2 * _WRITERS  # most shards held in memory, written or waiting for a thread


class Build:
    """One run over the missing shards of a bank, of which each process writes some."""

    def __init__(
        self,
        folder: str | Path,
        manifest: dict[str, Any],
        missing: list[int],
        sources: Int[np.ndarray, " R"],
        base: Bank | None,
        codec: Codec,
    ):
        self.folder, self.manifest, self.missing = folder, manifest, missing
        self.sources, self.base, self.codec = sources, base, codec
        self.size, self.shard = manifest["shape"][0], manifest["shard_memories"]
        self.part = missing[jax.process_index() :: jax.process_count()]
        self.ids = self.members(missing)
        own = self.members(self.part)
        self.encoded = own[sources[own] < 0]
        self.recode = jax.jit(codec.quantize)

    def span(self, shard: int) -> tuple[int, int]:
        """Returns first and last-plus-one memory of a shard."""
        return shard * self.shard, min((shard + 1) * self.shard, self.size)

    def members(self, shards: list[int]) -> Int[np.ndarray, " n"]:
        """Returns the ids of the memories of shards."""
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(*self.span(i)) for i in shards)])

    def run(
        self,
        config: ConfigDict,
        model: Model,
        params: Params,
        references: ReferenceSet,
        progress: bool,
    ) -> dict[str, Any]:
        """Encodes, copies and writes; returns the report of `write_bank`."""
        progress = progress and jax.process_index() == 0
        self.check_space(progress)
        compiling = time.perf_counter()
        encoder = None
        if self.encoded.size:
            encoder = Encoder(config, model, params, references, self.codec)
        compile_seconds = time.perf_counter() - compiling
        clock = Clock()
        batches = iter(()) if encoder is None else encoder.batches(self.encoded, clock)
        done = self.size - self.ids.size
        bar = tqdm(
            total=done + len(self.members(self.part)),
            initial=done,
            unit=" memories",
            desc="bank" if jax.process_count() == 1 else "bank, share of process 0",
            disable=not progress,
        )
        with bar:
            self.write(self.shards(batches), bar)
        meet("bank written")
        seconds = clock.seconds()
        encoded = int((self.sources[self.ids] < 0).sum())
        item = np.dtype(jnp.dtype(self.manifest["dtype"])).itemsize
        return {
            "references": self.size,
            "kept": done,
            "encoded": encoded,
            "copied": self.ids.size - encoded,
            "seconds": seconds,
            "compile_seconds": compile_seconds,
            "memories_per_second": self.ids.size / seconds,
            "encode_share": clock.encode / seconds,
            "bytes": int(np.prod(self.manifest["shape"], dtype=np.int64)) * item,
        }

    def shards(self, batches: Iterator[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields every shard of this process with its stored memories, copied or encoded."""
        dtype = np.dtype(jnp.dtype(self.manifest["dtype"]))
        batch = np.zeros((0, *self.manifest["shape"][1:]), dtype)
        for shard in self.part:
            low, high = self.span(shard)
            sources = self.sources[low:high]
            memories = np.empty((high - low, *batch.shape[1:]), dtype)
            copied, rows = np.flatnonzero(sources >= 0), np.flatnonzero(sources < 0)
            if copied.size:
                memories[copied] = self.copy(sources[copied])
            while rows.size:
                if not len(batch):
                    batch = next(batches)
                memories[rows[: len(batch)]] = batch[: len(rows)]
                rows, batch = rows[len(batch) :], batch[len(rows) :]
            yield shard, memories

    def copy(self, ids: np.ndarray) -> np.ndarray:
        """Reads memories of the base as this bank stores them."""
        assert self.base is not None
        if codecs.same(self.base.codec, self.codec):
            return _items(self.base.read_stored(ids))
        padded = np.pad(ids, (0, self.shard - len(ids)), constant_values=-1)  # one shape, one jit
        return np.asarray(self.recode(_items(self.base.read(padded))))[: len(ids)]

    def write(self, shards: Iterator[tuple[int, np.ndarray]], bar: tqdm) -> None:
        """Writes shards in parallel, each whole and in one call."""
        array = storage.open_array(self.folder, self.manifest)
        running: collections.deque[tuple[int, Future[None]]] = collections.deque()
        pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="bank")

        def write_one(shard: int, memories: np.ndarray) -> None:
            low, high = self.span(shard)
            view = ts.array(memories)
            array[low:high].write(view, can_reference_source_data_indefinitely=True).result()

        def wait_for_oldest() -> None:
            shard, future = running.popleft()
            try:
                future.result()
            except (OSError, ValueError) as error:
                pool.shutdown(wait=True, cancel_futures=True)
                raise self.failure(shard, error) from error
            low, high = self.span(shard)
            bar.update(high - low)

        try:
            for shard, memories in shards:
                running.append((shard, pool.submit(write_one, shard, memories)))
                while running and (len(running) >= _WAITING or running[0][1].done()):
                    wait_for_oldest()
            while running:
                wait_for_oldest()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def check_space(self, progress: bool) -> None:
        """Refuses to start where the disk cannot hold what is still to be written."""
        free, needed = storage.free_bytes(self.folder), self.needed_bytes()
        size = storage.readable_size
        if progress and self.ids.size:
            shown = "" if free is None else f", {size(free)} free"
            print(
                f"bank {self.folder}: {self.ids.size} of {self.size} memories to write,"
                f" {size(needed)}{shown}"
            )
        if free is not None and free < needed:
            raise BankError(
                f"bank {self.folder} needs {size(needed)} for {len(self.missing)} missing shards,"
                f" but the disk has {size(free)} free: make room for {size(needed - free)} more and"
                " run the same command again; what is written is kept"
            )

    def failure(self, shard: int, error: Exception) -> BankError:
        """Explains a failed write of a shard; this process writes nothing else."""
        if jax.process_count() == 1:
            storage.remove_locks(self.folder)
        name = f"{self.folder}/{storage.shard_key(shard)}"
        if is_disk_full(error):
            self.missing = storage.missing_shards(self.folder, self.manifest)
            free, needed = storage.free_bytes(self.folder) or 0, self.needed_bytes()
            size = storage.readable_size
            return BankError(
                f"the disk is full: shard file {name} could not be written. {len(self.missing)}"
                f" shards are still missing, {size(needed)}, and {size(free)} are free: make room"
                f" for {size(max(needed - free, 0))} more and run the same command again,"
                " which resumes"
            )
        return BankError(
            f"shard file {name} could not be written: {error}. Run the same command again, which"
            " resumes"
        )

    def needed_bytes(self) -> int:
        """Returns the bytes of the missing shards' files: memories, checksums and index."""
        item = int(np.prod(self.manifest["shape"][1:]))
        item = item * np.dtype(jnp.dtype(self.manifest["dtype"])).itemsize + 4
        spans = [self.span(shard) for shard in self.missing]
        blocks = [(high - low) * item + 16 * self.shard + 4 for low, high in spans]
        return sum(-(-block // 4096) * 4096 for block in blocks)


def _items(memory: ExplicitMemory) -> Shaped[np.ndarray, "n 2 L K P width"]:
    """Returns memories `(L, n, K, P, width)` in the order of the bank's array."""
    return np.stack([np.moveaxis(np.asarray(x), 0, 1) for x in memory[:2]], axis=1)
