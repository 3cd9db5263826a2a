"""The bank: explicit memories of all references on disk, bound to the model that wrote them."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from m3jax.errors import BankError
from m3jax.files import digest, json_text
from m3jax.memory import codec as codecs
from m3jax.memory.binding import Binding
from m3jax.memory.buffer_pool import Buffers
from m3jax.memory.codec import Codec
from m3jax.memory.reader import MemoryReader
from m3jax.memory.shard_reader import ShardReader
from m3jax.memory.storage import (
    CHECKSUMS,
    CODEBOOK,
    COMPLETE,
    HASHES,
    LENGTHS,
    MANIFEST,
    complete_stamp,
    is_sealed,
    memory_bytes,
    read_checked,
    read_checksums,
    read_file,
    read_manifest,
    read_side_file,
    replaced,
    require_served,
    write_again,
)
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.numbering import Numbering


class Bank(MemoryReader):
    """Reads the memories of R references in any order. Safe to use from several threads.

    Attributes:
      folder, manifest: location and parsed manifest of the bank, or of its base if it has deltas.
      binding: model weights, tokenizer, references and config that wrote the bank.
      codec: format in which keys and values are stored.
      dtype: dtype of the stored array.
      lengths: number of used token slots of every memory, (R,).
      numbering: maps an id to its part (base or delta) and its row there.
      parts: one shard reader for the base and one for each delta.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: dict[str, Any],
        lengths: np.ndarray,
        checksums: np.ndarray | None,
        cache_bytes: int,
    ) -> None:
        self.folder, self.manifest, self.lengths = folder, manifest, lengths
        self.binding = Binding(**manifest["binding"])
        self.dtype = jnp.dtype(manifest["dtype"])
        self.codec = _read_codec(folder, manifest, self.binding)
        self.numbering = Numbering(manifest["shape"][:1], np.zeros(0, np.int64))
        self.parts = [ShardReader(folder, manifest, checksums, cache_bytes)]
        self._buffers = Buffers()

    @classmethod
    def open(cls, folder: str | Path, cache_bytes: int = 0, finished: bool = True) -> Bank:
        """Opens a finished bank.

        Args:
          folder: folder, or URL of a bucket (`gs://…/`) or of a folder on an HTTP server that
            supports range requests (`http://…`, `https://…`).
          cache_bytes: size limit of the cache in RAM, which all threads share and which evicts the
            least recently used memories; 0 = no cache.
          finished: False also opens one whose missing shards are being written again.

        Raises:
          BankError: there is no bank; it is unfinished, damaged or of another format; its codebooks
            belong to another model; or the server cannot be reached or gives no ranges of bytes.
        """
        require_served(folder)
        stamp, text = read_file(folder, COMPLETE), read_file(folder, MANIFEST)
        if stamp is not None and text is not None and not is_sealed(stamp, text):
            raise _changed(folder, MANIFEST)
        manifest = read_manifest(folder)
        if manifest is None or text is None or (stamp is None and finished):
            what = "holds no bank" if manifest is None else "is not finished: COMPLETE is missing"
            raise BankError(
                f"{folder} {what}; run {write_again(folder)}, which resumes where it stopped"
            )
        read = None
        if stamp != complete_stamp(text):  # which an older version wrote, without checksums
            read = read_checksums(folder, manifest)
            whole = read is not None and stamp == complete_stamp(text, read[1])
            if stamp is not None and not whole:
                raise _changed(folder, CHECKSUMS)
        checksums = None if read is None else read[0]
        lengths = read_side_file(folder, manifest, LENGTHS)
        return cls(folder, manifest, lengths, checksums, cache_bytes)

    def require(self, expect: Binding) -> None:
        """Raises `BankError`, naming every difference, unless the bank's binding is `expect`."""
        different = expect.differences(self.binding)
        if different:
            raise BankError(
                f"bank {self.folder} does not fit: {'; '.join(different)}. Write one that fits with"
                f" {write_again(self.folder)}, or use the checkpoint, tokenizer, references and"
                " config that wrote it"
            )

    @property
    def size(self) -> int:
        """Returns the number of ids R, tombstones included."""
        return self.numbering.size

    @property
    def live(self) -> Int[np.ndarray, " n"]:
        """Returns the ids in use, ascending."""
        return self.numbering.live

    @property
    def bytes(self) -> int:
        """Returns the size of all stored keys and values in bytes, tombstones included."""
        return self.size * memory_bytes(self.manifest)

    @property
    def writer(self) -> dict[str, Any]:
        """Returns the checkpoint that wrote the bank or its base: `hash`, `path`, `step`, `run`.

        Its path when it wrote; its `run` is "" if the bank was written by an earlier version.
        """
        info = self.manifest["info"]
        step, path, run = info["writer_step"], info["writer_path"], info.get("writer_run", "")
        return {"hash": self.binding.writer, "path": path, "step": step, "run": run}

    @property
    def fingerprint(self) -> str:
        """Returns the hex digest of all that the memories of all parts depend on."""
        manifests = [part.manifest for part in self.parts]
        parts = [{**manifest, "info": manifest["info"].get("foreign", 0)} for manifest in manifests]
        return digest(json_text(parts, sort_keys=True), self.numbering.fingerprint)

    @property
    def record_hashes(self) -> np.ndarray:
        """Reads from disk the hash of all tokens that each memory depends on, uint64 (R,).

        Tombstones have hashes, too; mask them with `live`.
        """
        parts = [read_side_file(part.folder, part.manifest, HASHES) for part in self.parts]
        return np.concatenate(parts)

    def read_stored(self, ids: Int[np.ndarray, "*shape"]) -> ExplicitMemory:
        """Reads memories without dequantizing them; see `MemoryReader.read_stored`."""
        flat = ids.reshape(-1)
        wrong = (flat < -1) | (flat >= self.size)
        if self.numbering.tombstones.size:
            wrong |= self.numbering.is_removed(flat)
        if wrong.any():
            removed = flat[wrong][0] in self.numbering.tombstones
            why = "index, references and bank were made from different sets"
            raise BankError(
                f"reference id {flat[wrong][0]} is not in bank {self.folder}, which holds 0 …"
                f" {self.size - 1}: {'an edit removed it' if removed else why}"
            )
        _, layers, *item = self.manifest["shape"][1:]
        # Layers first, as the scan over layers needs them, so that no step begins with a transpose.
        buffer = self._buffers.take((2, layers, flat.size, *item), self.dtype)
        memories = np.moveaxis(buffer.reshape(2 * layers, flat.size, math.prod(item)), 1, 0)
        memories[flat < 0] = 0
        real = np.flatnonzero(flat >= 0)
        for part, positions, rows in self.numbering.split(flat[real]):
            self.parts[part].read(rows, real[positions], memories)
        length: Any = np.where(flat < 0, 0, self.lengths[np.maximum(flat, 0)]).astype(np.int32)
        keys, values = buffer.reshape(2, layers, *ids.shape, *item)
        return ExplicitMemory(keys, values, length.reshape(ids.shape))

    def verify(self) -> list[str]:
        """Reads all files; returns one message for each that is damaged or missing."""
        problems = [problem for part in self.parts for _, problem in part.damaged()]
        try:
            _ = self.record_hashes
        except BankError as error:
            problems.append(str(error))
        return problems

    def report(self) -> dict[str, int]:
        """Returns the cache's counters: `cache_hits`, `cache_misses` and current `cache_bytes`."""
        return self.parts[0].cache.report()


def _changed(folder: str | Path, name: str) -> BankError:
    return BankError(
        f"{folder}: {name} or {COMPLETE} was changed or lost after the bank was finished; restore"
        f" it from a copy, or run {write_again(folder)} again, which keeps the memories"
    )


def require_alike(bank: Bank, base: Bank) -> None:
    """Raises `BankError` unless both banks have the same writer, tokenizer, layout and codec."""
    bank.require(dataclasses.replace(base.binding, references=bank.binding.references))
    if not codecs.same(bank.codec, base.codec):
        raise BankError(
            f"bank {bank.folder} is stored with {bank.codec.name!r} or other codebooks than"
            f" {base.folder} ({base.codec.name!r}); write it with --base of that one"
        )


def join_banks(banks: Sequence[Bank], tombstones: np.ndarray, references: str) -> Bank:
    """Joins a base and its deltas to one bank, which refuses to read tombstones.

    Args:
      banks: base and deltas, with the same writer, tokenizer, layout and codec.
      tombstones: ids that were deleted or replaced.
      references: fingerprint of the joined reference set.

    Raises:
      BankError: a delta was written with another model, tokenizer or config than the base, or with
        another codec.
    """
    base = banks[0]
    for delta in banks[1:]:
        require_alike(delta, base)
        delta.parts[0].cache = base.parts[0].cache  # one size limit for all parts
    whole = copy.copy(base)
    whole.binding = dataclasses.replace(base.binding, references=references)
    whole.numbering = Numbering([bank.size for bank in banks], tombstones)
    whole.lengths = np.concatenate([bank.lengths for bank in banks])
    whole.parts = [bank.parts[0] for bank in banks]
    return whole


def _read_codec(folder: str | Path, manifest: dict[str, Any], binding: Binding) -> Codec:
    head_dim, dtype = binding.layout["head_dim"], binding.layout["dtype"]
    if manifest["codec"] != codecs.VECTOR:
        return Codec(manifest["codec"], head_dim, dtype)
    codec, owner = codecs.from_bytes(read_checked(folder, manifest, CODEBOOK), dtype)
    if owner != binding.owner or codec.width != manifest["shape"][-1]:
        raise BankError(
            f"{folder}/{CODEBOOK} belongs to memories of another model; {replaced(folder)}"
        )
    return codec
