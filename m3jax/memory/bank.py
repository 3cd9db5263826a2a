"""The bank: explicit memories of all references on disk, bound to what wrote them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from m3jax.errors import BankError
from m3jax.files import checksum
from m3jax.memory import codec as codecs
from m3jax.memory.binding import Binding
from m3jax.memory.buffer_pool import Buffers
from m3jax.memory.cached_reader import Shards
from m3jax.memory.codec import Codec
from m3jax.memory.head_subset import heads_of_layout
from m3jax.memory.http_probe import require_served
from m3jax.memory.reader import BankReader
from m3jax.memory.storage import (
    CODEBOOK,
    COMPLETE,
    HASHES,
    LENGTHS,
    MANIFEST,
    read_checked,
    read_file,
    read_manifest,
    read_side_file,
    write_again,
)
from m3jax.model.attention_mask import ExplicitMemory


class Bank(BankReader):
    """Reads the memories of R references at random. Safe to use from several threads.

    Attributes:
      folder: where it is.
      manifest: the parsed manifest.
      binding: what wrote it.
      codec: how keys and values are stored.
      dtype: of what is stored.
      lengths: real slots of every memory; uint16 or int32 (R,).
      shards: their memories, and the cache.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: dict[str, Any],
        lengths: np.ndarray,
        cache_bytes: int = 0,
    ):
        self.folder, self.manifest, self.lengths = folder, manifest, lengths
        self.binding = Binding(**manifest["binding"])
        self.dtype = np.dtype(jax.numpy.dtype(manifest["dtype"]))
        self.codec = _read_codec(folder, manifest, self.binding)
        self.shards = Shards(folder, manifest, cache_bytes)
        self._buffers = Buffers()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        expect: Binding | None = None,
        cache_bytes: int = 0,
    ) -> Bank:
        """Opens a finished bank.

        Args:
          folder: folder, or URL of a bucket (`gs://…/`) or of a folder on an HTTP server that gives
            ranges of bytes (`http://…`, `https://…`).
          expect: what must have written it; None accepts anything.
          cache_bytes: of memories that were read last, kept in RAM and shared by threads; least
            recently used leaves first; 0 keeps none.

        Raises:
          BankError: no bank, an unfinished or damaged one, one that something else wrote, naming
            every part that differs, or a server that does not give it.
        """
        require_served(folder)
        manifest = read_manifest(folder)
        stamp = read_file(folder, COMPLETE)
        if manifest is None or stamp is None:
            what = "holds no bank" if manifest is None else "is not finished: COMPLETE is missing"
            raise BankError(
                f"{folder} {what}; run {write_again(folder)}, which resumes where it stopped"
            )
        if stamp.decode().strip() != checksum(read_file(folder, MANIFEST) or b""):
            raise BankError(
                f"{folder}/{MANIFEST} was changed after the bank was finished; restore it, or"
                f" delete the folder and run {write_again(folder)}"
            )
        bank = cls(folder, manifest, read_side_file(folder, manifest, LENGTHS), cache_bytes)
        if expect is not None:
            bank.require(expect)
        return bank

    def require(self, expect: Binding) -> None:
        """Raises `BankError`, naming every part that differs, unless `expect` wrote this bank."""
        different = expect.differences(self.binding)
        if different:
            raise BankError(
                f"bank {self.folder} does not fit: {'; '.join(different)}. Write one that fits with"
                f" {write_again(self.folder)}, or use the checkpoint, tokenizer, references and"
                " config that wrote it"
            )

    @property
    def size(self) -> int:
        """Memories R."""
        return int(self.manifest["shape"][0])

    @property
    def live(self) -> Int[np.ndarray, " n"]:
        """All ids."""
        return np.arange(self.size)

    @property
    def bytes(self) -> int:
        """Bytes of all keys and values, as they are stored."""
        return int(np.prod(self.manifest["shape"], dtype=np.int64)) * self.dtype.itemsize

    @property
    def writer(self) -> dict[str, Any]:
        """Checkpoint that wrote it: `hash` of the weights, `path` and `step`."""
        info = self.manifest["info"]
        step, path = info["writer_step"], info["writer_path"]
        return {"hash": self.binding.writer, "path": path, "step": step}

    @property
    def record_hashes(self) -> np.ndarray:
        """Hash of all tokens that shaped each memory, uint64 (R,); read from disk at every call."""
        return read_side_file(self.folder, self.manifest, HASHES)

    def read_stored(self, ids: Int[np.ndarray, "*shape"]) -> ExplicitMemory:
        """Reads memories as they are stored; see `MemoryReader.read_stored`."""
        flat = ids.reshape(-1)
        real = flat >= 0
        if flat.size and not -1 <= flat.min() <= flat.max() < self.size:
            wrong = flat[(flat < -1) | (flat >= self.size)][0]
            raise BankError(
                f"reference id {wrong} is not in bank {self.folder}, which holds 0 …"
                f" {self.size - 1}: index, references and bank were made from different sets"
            )
        _, layers, *item = self.manifest["shape"][1:]
        # In the order in which the scan over layers takes them, so that no step begins with a copy.
        buffer = self._buffers.take((2, layers, flat.size, *item), self.dtype)
        buffer[:, :, ~real] = 0
        if real.any():
            self.shards.read(flat, real, np.moveaxis(buffer, 2, 0))
        length: Any = np.where(real, self.lengths[np.where(real, flat, 0)], 0).astype(np.int32)
        keys, values = buffer.reshape(2, layers, *ids.shape, *item)
        return ExplicitMemory(keys, values, length.reshape(ids.shape))

    def verify(self) -> list[str]:
        """Reads everything; returns files of damaged or missing shards, each with the reason."""
        return [problem for _, problem in self.damaged_shards()]

    def damaged_shards(self) -> list[tuple[str, str]]:
        """Reads everything; returns files of damaged or missing shards, and the reasons."""
        return self.shards.damaged()

    def report(self) -> dict[str, int]:
        """Returns counters of the cache: `cache_hits`, `cache_misses`, `cache_bytes` now."""
        return self.shards.cache.report()


def _read_codec(folder: str | Path, manifest: dict[str, Any], binding: Binding) -> Codec:
    head_dim, dtype = binding.layout["head_dim"], binding.layout["dtype"]
    heads = heads_of_layout(binding.layout)
    if manifest["codec"] != codecs.VECTOR:
        return Codec(manifest["codec"], head_dim, dtype, heads=heads)
    codec, owner = codecs.from_bytes(read_checked(folder, manifest, CODEBOOK), dtype)
    if owner != binding.owner or codec.width != manifest["shape"][-1]:
        raise BankError(
            f"{folder}/{CODEBOOK} belongs to memories of another model; delete the folder and run"
            f" {write_again(folder)}"
        )
    return dataclasses.replace(codec, heads=heads)
