"""Writes the bank: encodes or copies the memories of missing shards; a killed build resumes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
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

import m3jax
from m3jax.config import slot_counts
from m3jax.distributed import first_alone, first_writes, meet
from m3jax.errors import BankError, StoreError, UserError
from m3jax.files import checksum, json_text
from m3jax.memory import codec as codecs
from m3jax.memory import storage
from m3jax.memory.bank import Bank
from m3jax.memory.binding import Binding, layout_of, writer_fingerprint
from m3jax.memory.codec import Codec
from m3jax.memory.encode import Encoder, ReferenceSet, memory_hashes, memory_lengths
from m3jax.memory.storage import WRITE_AGAIN
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.parameters import Params
from m3jax.model.slots import SlotLayout
from m3jax.model.transformer import Model
from m3jax.private_apis import is_disk_full
from m3jax.store import is_bucket, unreachable

_WRITERS = 4  # threads that write shards
_WAITING = 2 * _WRITERS  # most shards in RAM, being written or waiting for a thread


def write_bank(
    config: ConfigDict,
    model: Model,
    params: Params,
    references: ReferenceSet,
    folder: str | Path,
    *,
    writer_path: str = "",
    writer_step: int = 0,
    writer_run: str = "",
    progress: bool = True,
    base: Bank | None = None,
    keep: Int[np.ndarray, " n"] | None = None,
) -> dict[str, Any]:
    """Writes a bank with the memories of all references; existing shards are kept.

    A killed build resumes where it stopped; deleted shards of a finished bank are written again.
    Several processes (`m3jax.distributed`) call this together, each with a model on its own devices
    and with a shared folder; each encodes and writes its share of the missing shards.

    Args:
      config: a validated config; the sections `model`, `memory` and `writer` are read.
      model: the writer, with the prefix tokens of `<s>Reference:`.
      params: the writer's parameters.
      references: the knowledge base.
      folder: local folder, which is made if it is missing, or URL of a bucket.
      writer_path, writer_step, writer_run: checkpoint of the parameters; recorded, not compared.
      progress: show a progress bar.
      base: an older bank with the same writer, tokenizer and layout. Memories of references with
        the same tokens (and the same document context) are copied instead of encoded.
      keep: ids to copy from a `base` with the same references but another writer; all other
        memories are encoded.

    Returns:
      Counts over all processes: `references`, and memories that were `kept` (in existing shards),
      `encoded` and `copied`; `seconds` until all processes have written, without compilation;
      `compile_seconds`; `memories_per_second`; `encode_share` (fraction of the seconds that this
      process spent waiting for the encoder); `bytes` of all memories.

    Raises:
      BankError: there are no references, none has tokens, or one is too long; the folder holds a
        bank with another binding or layout, or is on an HTTP server, or is not shared by all
        processes; the base has another writer, tokenizer or layout; the batch does not split over
        the devices; a memory is not finite; a reference contains token 0, the padding; the disk is
        full or a file cannot be written.
      QuantizerError: the codebooks cannot be fitted (see `codec.train_codec`).
      LockError: another process is writing the folder; in a bucket nothing is locked.
    """
    storage.require_writable(folder)
    lengths = memory_lengths(config, references)
    binding = Binding(
        writer_fingerprint(params, config.memory),
        references.tokenizer_fingerprint,
        references.fingerprint,
        layout_of(config, model.prefix_tokens),
    )
    info = {
        "name": config.name,
        "writer_path": str(writer_path),
        "writer_step": int(writer_step),
        "writer_run": writer_run,
        "m3jax": m3jax.__version__,
        "foreign": 0 if keep is None else len(keep),  # number of memories by another writer
    }
    hashes = memory_hashes(config, references)
    itself = base is not None and Path(base.folder) == Path(folder)  # whose shards are missing
    sources = _sources(None if itself else base, keep, binding, lengths, hashes)

    def prepare() -> tuple[Codec, dict[str, Any], list[int]]:
        codec = _make_codec(config, model, params, references, folder, binding, base)
        return codec, *prepare_folder(folder, config, binding, info, codec, lengths, hashes)

    with contextlib.nullcontext() if storage.is_url(folder) else first_writes(folder):
        codec, manifest, missing = first_alone(prepare, lambda: _check_seen(folder))
        build = Build(folder, manifest, missing, sources, base, codec)
        report = build.run(config, model, params, references, progress)
        if jax.process_index() == 0:
            finish(folder, manifest)
        meet("bank complete")
    return report


def _check_seen(folder: str | Path) -> None:
    if storage.read_manifest(folder) is None:
        raise BankError(
            f"process {jax.process_index()} does not see what process 0 writes in {folder}; put the"
            " bank in a bucket or on a disk that all processes share"
        )


def finish(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Marks a bank as complete after all processes have written; raises if shards are missing."""
    missing = storage.missing_shards(folder, manifest) if jax.process_count() > 1 else []
    if missing:
        raise BankError(
            f"{len(missing)} shards of bank {folder} are not there, the first is"
            f" {storage.shard_key(missing[0])}, though all processes have written: run the same"
            " command again, which writes them"
        )
    storage.remove_locks(folder)
    checksums = storage.join_checksums(folder, manifest)
    text = storage.read_file(folder, storage.MANIFEST) or b""
    storage.write_file(folder, storage.COMPLETE, storage.complete_stamp(text, checksums))
    storage.remove_shard_checksums(folder)


def _make_codec(
    config: ConfigDict,
    model: Model,
    params: Params,
    references: ReferenceSet,
    folder: str | Path,
    binding: Binding,
    base: Bank | None,
) -> Codec:
    """Returns the codec of `writer.compression`, with the folder's, base's or new codebooks."""
    writer, dtype, head_dim = config.writer, config.memory.dtype, config.model.head_dim
    if writer.compression != codecs.VECTOR:
        return Codec(writer.compression, head_dim, dtype)
    written = storage.read_file(folder, storage.CODEBOOK)
    if written is not None:  # by a killed build or a finished bank
        with contextlib.suppress(codecs.QuantizerError):
            codec, owner = codecs.from_bytes(written, dtype)
            if owner == binding.owner:
                return codec
    if base is not None and base.codec.codebooks and base.binding.writer == binding.writer:
        storage.link_file(base.folder, folder, storage.CODEBOOK)  # megabytes, which are the same
        return base.codec
    ids = _sample(config, references)
    print(f"bank {folder}: training codebooks on {len(ids)} references", flush=True)
    uncompressed = Codec(codecs.NONE, head_dim, dtype)
    encoder = Encoder(config, model, params, references, uncompressed)
    memories = np.concatenate(list(encoder.batches(ids)))
    real = model.slots.real(np.asarray(references.lengths)[ids])
    codec = codecs.train_codec(memories, real, dtype, writer.coarse_bits, writer.fine_bits)
    storage.write_file(folder, storage.CODEBOOK, codecs.to_bytes(codec, binding.owner))
    return codec


def _sample(config: ConfigDict, references: ReferenceSet) -> Int[np.ndarray, " n"]:
    """Samples references uniformly until they have `writer.codebook_vectors` keys, if possible."""
    order = np.random.default_rng(0).permutation(len(references))
    counts = slot_counts(config.model, config.memory).ravel()
    shortened = np.minimum(np.arange(config.memory.reference_length + 1)[:, None], counts).sum(1)
    vectors = np.cumsum(shortened[np.asarray(references.lengths)[order]])
    enough = int(np.searchsorted(vectors, config.writer.codebook_vectors)) + 1
    return np.sort(order[:enough])


def prepare_folder(
    folder: str | Path,
    config: ConfigDict,
    binding: Binding,
    info: dict[str, Any],
    codec: Codec,
    lengths: np.ndarray,
    hashes: np.ndarray,
) -> tuple[dict[str, Any], list[int]]:
    """Writes manifest and side files of a bank, or checks that the existing files are the same.

    `lengths` and `hashes`: used slots of each memory, and hash of all tokens that it depends on.
    Returns the manifest and the missing shards; raises `BankError` if the folder holds another bank
    or cannot be written.
    """
    sides = {
        storage.LENGTHS: storage.npy_bytes(lengths),
        storage.HASHES: storage.npy_bytes(hashes),
    }
    if codec.codebooks is not None:
        sides[storage.CODEBOOK] = codecs.to_bytes(codec, binding.owner)
    manifest = {
        "format": storage.FORMAT,
        "binding": vars(binding),
        "info": info,
        "codec": codec.name,
        "shape": [len(lengths), 2, *codec.item_shape(SlotLayout.of(config.model, config.memory))],
        "dtype": codec.stored_dtype,
        "shard_memories": min(config.writer.shard_memories, len(lengths)),
        "checksums": {name: checksum(data) for name, data in sides.items()},
    }
    storage.remove_locks(folder)
    text = (json_text(manifest, indent=2, sort_keys=True) + "\n").encode()
    stamp, written = (storage.read_file(folder, n) for n in (storage.COMPLETE, storage.MANIFEST))
    sealed = storage.is_sealed(stamp, written)
    if not sealed and storage.is_sealed(stamp, text):  # the manifest is damaged or lost
        storage.write_file(folder, storage.MANIFEST, text)
    there = storage.read_manifest(folder)
    if there is not None:
        _check_same(folder, manifest, there)
    for name, data in sides.items():
        if storage.read_file(folder, name) != data:
            storage.write_file(folder, name, data)
    if there is None:
        storage.open_array(folder, manifest, create=True)
        storage.write_file(folder, storage.MANIFEST, text)
    elif not sealed:  # who wrote it, and where, may have been damaged
        storage.write_file(folder, storage.MANIFEST, text)
    missing = storage.missing_shards(folder, manifest)
    if missing:
        storage.delete_file(folder, storage.COMPLETE)
    return manifest, missing


def _check_same(folder: str | Path, ours: dict[str, Any], there: dict[str, Any]) -> None:
    different = Binding(**ours["binding"]).differences(Binding(**there["binding"]))
    if not different:  # compare the fields that are not part of the binding
        different = [
            f"written with {words} = {there[name]!r}, here {ours[name]!r}"
            for name, words in (
                ("codec", "config.writer.compression"),
                ("shape", "shape"),
                ("shard_memories", "config.writer.shard_memories"),
                ("checksums", "lengths, record hashes and codebooks"),
            )
            if there[name] != ours[name]
        ]
    if different:
        raise BankError(
            f"{folder} holds a bank of something else: {'; '.join(different)}. Write to another"
            " folder, or move this one elsewhere"
        )


def _sources(
    base: Bank | None,
    keep: Int[np.ndarray, " n"] | None,
    binding: Binding,
    lengths: np.ndarray,
    hashes: np.ndarray,
) -> Int[np.ndarray, " R"]:
    """Returns for each reference the id in `base` of the memory to copy; −1 = encode it."""
    sources = np.full(len(lengths), -1, np.int64)
    if base is None:
        return sources
    if keep is not None:
        base.require(dataclasses.replace(binding, writer=base.binding.writer))
        sources[keep] = keep
        return sources
    anything = dataclasses.replace(binding, references=base.binding.references)
    different = anything.differences(base.binding)
    if different:
        raise BankError(
            f"memories cannot be copied from the base bank {base.folder}: {'; '.join(different)}."
            f" Run {WRITE_AGAIN} without --base"
        )
    live, written = base.live, base.record_hashes
    order = live[np.argsort(written[live], kind="stable")]
    candidates = order[np.minimum(np.searchsorted(written[order], hashes), len(order) - 1)]
    same = (written[candidates] == hashes) & (base.lengths[candidates] == lengths)
    return np.where(same, candidates, sources)


class Build:
    """Writes the missing shards of a bank, of which each process writes a share."""

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
        """Returns the range low, high of a shard's memories; high is exclusive."""
        return storage.shard_span(self.manifest, shard)

    def members(self, shards: list[int]) -> Int[np.ndarray, " n"]:
        """Returns the ids of all memories in these shards."""
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(*self.span(i)) for i in shards)])

    def run(
        self,
        config: ConfigDict,
        model: Model,
        params: Params,
        references: ReferenceSet,
        progress: bool,
    ) -> dict[str, Any]:
        """Encodes, copies and writes memories; returns the report of `write_bank`."""
        progress = progress and jax.process_index() == 0
        self.check_space(progress)
        compiling = time.perf_counter()
        encoder = None
        if self.encoded.size:
            encoder = Encoder(config, model, params, references, self.codec)
        compile_seconds = time.perf_counter() - compiling
        start = time.perf_counter()
        batches = iter(()) if encoder is None else encoder.batches(self.encoded)
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
        seconds = time.perf_counter() - start
        encoded = int((self.sources[self.ids] < 0).sum())
        return {
            "references": self.size,
            "kept": done,
            "encoded": encoded,
            "copied": self.ids.size - encoded,
            "seconds": seconds,
            "compile_seconds": compile_seconds,
            "memories_per_second": self.ids.size / seconds,
            "encode_share": 0.0 if encoder is None else encoder.seconds / seconds,
            "bytes": self.size * storage.memory_bytes(self.manifest),
        }

    def shards(self, batches: Iterator[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields each shard of this process with its memories in stored form, copied or encoded."""
        dtype = jnp.dtype(self.manifest["dtype"])
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
        """Reads memories of the base and converts them to the codec of this bank."""
        assert self.base is not None
        if codecs.same(self.base.codec, self.codec):
            return _items(self.base.read_stored(ids))
        padded = np.pad(ids, (0, self.shard - len(ids)), constant_values=-1)  # one shape, one jit
        return np.asarray(self.recode(_items(self.base.read(padded))))[: len(ids)]

    def write(self, shards: Iterator[tuple[int, np.ndarray]], bar: tqdm) -> None:
        """Writes shards in parallel threads, each with a single call of TensorStore."""
        array = storage.open_array(self.folder, self.manifest)
        running: collections.deque[tuple[int, Future[None]]] = collections.deque()

        def write_shard(shard: int, memories: np.ndarray) -> None:
            low, high = self.span(shard)
            storage.write_shard_checksums(self.folder, shard, memories)
            view = ts.array(memories)
            array[low:high].write(view, can_reference_source_data_indefinitely=True).result()

        def wait_for_oldest() -> None:
            shard, future = running.popleft()
            try:
                future.result()
            except (OSError, ValueError) as error:
                raise self.failure(shard, error) from error
            low, high = self.span(shard)
            bar.update(high - low)

        pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="bank")
        try:
            for shard, memories in shards:
                running.append((shard, pool.submit(write_shard, shard, memories)))
                while running and (len(running) >= _WAITING or running[0][1].done()):
                    wait_for_oldest()
            while running:
                wait_for_oldest()
        finally:
            pool.shutdown(cancel_futures=True)

    def check_space(self, progress: bool) -> None:
        """Raises `BankError` if the disk has too little space for the missing shards."""
        free, needed = storage.free_bytes(self.folder), self.needed_bytes()
        if progress and self.ids.size:
            shown = "" if free is None else f", {_size(free)} free"
            print(
                f"bank {self.folder}: {self.ids.size} of {self.size} memories to write,"
                f" {_size(needed)}{shown}"
            )
        if free is not None and free < needed:
            raise BankError(self.lacking_space(free))

    def lacking_space(self, free: int) -> str:
        """Returns the message that states how much space the missing shards need."""
        needed = self.needed_bytes()
        return (
            f"bank {self.folder} needs {_size(needed)} for {len(self.missing)} missing shards, but"
            f" the disk has {_size(free)} free: make room for {_size(max(needed - free, 0))} more"
            " and run the same command again; what is written is kept"
        )

    def failure(self, shard: int, error: Exception) -> UserError:
        """Returns the error for a failed write of a shard; this process writes no more."""
        if jax.process_count() == 1:
            storage.remove_locks(self.folder)
        name = f"{self.folder}/{storage.shard_key(shard)}"
        if is_bucket(self.folder):
            return error if isinstance(error, StoreError) else unreachable(name, error)
        if is_disk_full(error):
            self.missing = storage.missing_shards(self.folder, self.manifest)
            lacking = self.lacking_space(storage.free_bytes(self.folder) or 0)
            return BankError(f"the disk is full: shard file {name} could not be written; {lacking}")
        return BankError(
            f"shard file {name} could not be written: {error}. Run the same command again, which"
            " resumes"
        )

    def needed_bytes(self) -> int:
        """Returns the disk space of the missing shard files: memories, checksums and index."""
        item = storage.memory_bytes(self.manifest) + 4
        spans = [self.span(shard) for shard in self.missing]
        blocks = [(high - low) * item + 16 * self.shard + 4 for low, high in spans]
        return sum(-(-block // 4096) * 4096 for block in blocks)


def _items(memory: ExplicitMemory) -> Shaped[np.ndarray, "n 2 L K P width"]:
    """Converts memories `(L, n, K, P, width)` to the axes of the bank's array."""
    return np.stack([np.moveaxis(np.asarray(x), 0, 1) for x in memory[:2]], axis=1)


def _size(count: int) -> str:
    return tqdm.format_sizeof(count, "B")
