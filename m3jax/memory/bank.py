"""The bank: explicit memories of all references on disk, bound to what wrote them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from m3jax.errors import BankError
from m3jax.files import checksum
from m3jax.memory import codec as codecs
from m3jax.memory import head_subset
from m3jax.memory.buffer_pool import Buffers
from m3jax.memory.cached_reader import Shards
from m3jax.memory.codec import Codec
from m3jax.memory.document_context import UNSTATED, layout_entries
from m3jax.memory.http_probe import require_served
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


@dataclasses.dataclass(frozen=True)
class Binding:
    """What wrote a bank. Memories mean something only to a reader that fits all of it.

    Attributes:
      writer: `writer_fingerprint` of the weights.
      tokenizer: fingerprint of the tokenizer.
      references: fingerprint of the reference set.
      layout: `layout_of` the config: all other things that shape the memories.
    """

    writer: str
    tokenizer: str
    references: str
    layout: dict[str, Any]

    @property
    def owner(self) -> str:
        """What codebooks belong to: weights and layout, whatever the references."""
        return checksum(json.dumps([self.writer, self.layout], sort_keys=True).encode())

    def differences(self, bank: Binding) -> list[str]:
        """Each part in which a bank's binding differs from this, the expected one, in words."""
        found = []
        for part, words in (
            ("writer", "written by other weights"),
            ("tokenizer", "written with another tokenizer"),
            ("references", "written from other references"),
        ):
            ours, theirs = getattr(self, part), getattr(bank, part)
            if ours != theirs:
                found.append(f"{words}: bank {theirs[:12]}, here {ours[:12]}")
        for name in sorted({*self.layout, *bank.layout}):
            default = UNSTATED.get(name)
            ours, theirs = self.layout.get(name, default), bank.layout.get(name, default)
            if ours != theirs:
                found.append(f"written with {name} = {theirs!r}, here {ours!r}")
        return found


def writer_fingerprint(params: dict[str, Any], memory: ConfigDict) -> str:
    """Hash of the weights that write memories: embedding and layers up to the last memory layer.

    Args:
      params: parameters of `Model`; layers above the memory layers and the head do not count.
      memory: the section `memory` of the config, which decides which layers those are.

    Returns:
      Hex BLAKE2b over name, dtype, shape and bytes of every array.
    """
    total = hashlib.blake2b(digest_size=16)
    ranges = f"{memory.first_layer}+{memory.layers}"
    total.update(ranges.encode())
    leaves = jax.tree_util.tree_leaves_with_path(writer_params(params))
    for path, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        values = np.ascontiguousarray(leaf)
        total.update(f"{path} {values.dtype.name} {values.shape}\n".encode())
        total.update(values.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def writer_params(params: dict[str, Any]) -> dict[str, Any]:
    """The part of the parameters that writes memories."""
    return {name: params[name] for name in ("embedding", "lower", "memory") if name in params}


def layout_of(config: ConfigDict, prefix_tokens: tuple[int, ...]) -> dict[str, Any]:
    """All but weights, tokenizer and references that shapes the memories; plain JSON values."""
    model, memory = config.model, config.memory
    return {
        "first_layer": memory.first_layer,
        "layers": memory.layers,
        "query_heads": model.query_heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "kept_tokens": memory.kept_tokens,
        "selection": memory.selection,
        "reference_length": memory.reference_length,
        "prefix_tokens": [int(token) for token in prefix_tokens],
        "rope_base": float(model.rope_base),
        "norm_epsilon": float(model.norm_epsilon),
        "embedding_scale": float(model.embedding_scale),
        "compute_dtype": model.compute_dtype,
        "dtype": memory.dtype,
        **layout_entries(config),
        **head_subset.layout_entries(config),
    }


def make_binding(
    config: ConfigDict,
    *,
    writer: str,
    tokenizer: str,
    references: str,
    prefix_tokens: tuple[int, ...],
) -> Binding:
    """The binding of a bank that a writer with this fingerprint and config writes."""
    return Binding(writer, tokenizer, references, layout_of(config, prefix_tokens))


class Bank:
    """Random access to the memories of R references. Safe to use from several threads.

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
    def bytes(self) -> int:
        """Bytes of all keys and values, as they are stored."""
        return int(np.prod(self.manifest["shape"], dtype=np.int64)) * self.dtype.itemsize

    @property
    def writer(self) -> dict[str, Any]:
        """Whose weights wrote it: `hash`, and `path` and `step` of their checkpoint."""
        info = self.manifest["info"]
        step, path = info["writer_step"], info["writer_path"]
        return {"hash": self.binding.writer, "path": path, "step": step}

    @property
    def record_hashes(self) -> np.ndarray:
        """Hash of all tokens that shaped each memory, uint64 (R,); read from disk at every call."""
        return read_side_file(self.folder, self.manifest, HASHES)

    def read(self, ids: Int[np.ndarray, "*shape"]) -> ExplicitMemory:
        """Memories of references, decoded: keys and values `(*shape, L, K, P, H)`.

        Arguments and errors as in `read_stored`, which is what a step reads that decodes itself.
        """
        stored = self.read_stored(ids)
        if self.codec.plain:
            return stored
        return jax.tree.map(np.asarray, jax.jit(self.codec.decode)(stored))

    def read_stored(self, ids: Int[np.ndarray, "*shape"]) -> ExplicitMemory:
        """Memories of references as they are stored, as NumPy arrays.

        Args:
          ids: reference ids of any shape; −1 is no memory: zeros, length 0. One that occurs more
            than once is read once.

        Returns:
          Keys and values `(*shape, L, K, P, width)`, in a bank of some heads `(*shape, 1, S, P,
          width)`, for `codec.decode`; length `shape` int32.

        Raises:
          BankError: an id outside −1 … R − 1; a damaged or missing shard, naming its file.
        """
        flat = ids.reshape(-1)
        real = flat >= 0
        if flat.size and not -1 <= flat.min() <= flat.max() < self.size:
            wrong = flat[(flat < -1) | (flat >= self.size)][0]
            raise BankError(
                f"reference id {wrong} is not in bank {self.folder}, which holds 0 …"
                f" {self.size - 1}: index, references and bank were made from different sets"
            )
        both = self._buffers.take((2, flat.size, *self.manifest["shape"][2:]), self.dtype)
        both[:, ~real] = 0
        if real.any():
            self.shards.read(flat, real, both)
        length: Any = np.where(real, self.lengths[np.where(real, flat, 0)], 0).astype(np.int32)
        keys, values = both.reshape(2, *ids.shape, *both.shape[2:])
        return ExplicitMemory(keys, values, length.reshape(ids.shape))

    def verify(self) -> list[str]:
        """Reads everything; returns files of damaged or missing shards, each with the reason."""
        return [problem for _, problem in self.damaged_shards()]

    def damaged_shards(self) -> list[tuple[str, str]]:
        """Reads everything; returns files of damaged or missing shards, and the reasons."""
        return self.shards.damaged()

    def report(self) -> dict[str, int]:
        """Counters of the cache: `cache_hits`, `cache_misses`, and `cache_bytes` it holds now."""
        return self.shards.cache.report()


def _read_codec(folder: str | Path, manifest: dict[str, Any], binding: Binding) -> Codec:
    head_dim, dtype = binding.layout["head_dim"], binding.layout["dtype"]
    chosen = head_subset.heads_of_layout(binding.layout)
    if manifest["codec"] != codecs.VECTOR:
        return Codec(manifest["codec"], head_dim, dtype, heads=chosen)
    codec, owner = codecs.from_bytes(read_checked(folder, manifest, CODEBOOK), dtype)
    if owner != binding.owner or codec.width != manifest["shape"][-1]:
        raise BankError(
            f"{folder}/{CODEBOOK} belongs to memories of another model; delete the folder and run"
            f" {write_again(folder)}"
        )
    return dataclasses.replace(codec, heads=chosen)
