"""Writing the bank: what it is to hold, its codec, what is copied; killed, it goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

import m3jax
from m3jax.config import stored_heads
from m3jax.distributed import first_alone, meet
from m3jax.errors import BankError
from m3jax.files import checksum
from m3jax.memory import codec as codecs
from m3jax.memory import storage
from m3jax.memory.bank import Bank
from m3jax.memory.binding import Binding, make_binding, writer_fingerprint
from m3jax.memory.build import Build
from m3jax.memory.codec import Codec
from m3jax.memory.encode import Clock, Encoder, ReferenceSet, memory_hashes, memory_lengths
from m3jax.memory.head_subset import heads_of
from m3jax.memory.storage import WRITE_AGAIN
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model


def write_bank(
    config: ConfigDict,
    model: Model,
    params: Params,
    references: ReferenceSet,
    folder: str | Path,
    *,
    tokenizer_fingerprint: str,
    prefix_tokens: tuple[int, ...],
    writer_path: str = "",
    writer_step: int = 0,
    progress: bool = True,
    base: Bank | None = None,
    keep: Int[np.ndarray, " n"] | None = None,
) -> dict[str, Any]:
    """Writes the memories of all references, or what is missing of them.

    A killed build goes on where it stopped; a finished bank gets back the shards that were deleted.
    Several processes (`m3jax.distributed`) call this together, each with a model on its own devices
    and a folder that all of them see; each encodes and writes its share of the missing shards.

    Args:
      config: a validated config; `writer` and `memory` say how.
      model: the writer, with the same prefix tokens.
      params: the writer's parameters.
      references: the knowledge base.
      folder: where to write; made when missing.
      tokenizer_fingerprint: of the tokenizer that made the references.
      prefix_tokens: tokens of `<s>Reference:`.
      writer_path, writer_step: where the parameters come from; recorded, not compared.
      progress: show a progress bar.
      base: an older bank of the same writer, tokenizer and layout: memories of references with the
        same tokens (and, with `writer.document_context`, the same before them) are copied, not
        encoded.
      keep: the base is a bank of the same references by another writer: memories that are copied
        all the same; all others are encoded.

    Returns:
      `references` in the set; `kept` (there before), `encoded` and `copied` memories, by all
      processes; `seconds` without compiling, until all have written; `compile_seconds`,
      `memories_per_second`, `encode_share` (share of the seconds in which this writer did nothing
      but wait for the encode), `bytes` of all memories.

    Raises:
      BankError: no usable tokens, an unfinished bank of something else in the folder, a base of
        another writer, a full disk, a folder on an HTTP server or one that not all processes see.
    """
    storage.require_writable(folder)
    if tuple(prefix_tokens) != model.prefix_tokens:
        raise BankError(
            f"prefix_tokens {tuple(prefix_tokens)} are not the model's {model.prefix_tokens}"
        )
    lengths = memory_lengths(config, references)
    binding = make_binding(
        config,
        writer=writer_fingerprint(params, config.memory),
        tokenizer=tokenizer_fingerprint,
        references=references.fingerprint,
        prefix_tokens=prefix_tokens,
    )
    info = {
        "name": config.name,
        "writer_path": str(writer_path),
        "writer_step": int(writer_step),
        "m3jax": m3jax.__version__,
        "foreign": 0 if keep is None else len(keep),  # memories by another writer
    }
    hashes = memory_hashes(config, references)
    if keep is None:
        sources = _copies(base, binding, lengths, hashes)
    else:
        sources = _kept(base, binding, len(lengths), keep)

    def prepare() -> tuple[Codec, list[int]]:
        codec = _make_codec(config, model, params, references, folder, binding, base)
        sides = {
            storage.LENGTHS: storage.npy_bytes(lengths),
            storage.HASHES: storage.npy_bytes(hashes),
        }
        if codec.codebooks is not None:
            sides[storage.CODEBOOK] = codecs.to_bytes(codec, binding.owner)
        manifest = make_manifest(config, binding, info, len(lengths), codec, sides)
        return codec, prepare_folder(folder, manifest, sides)

    codec, missing = first_alone(prepare, lambda: _check_seen(folder))
    there = storage.read_manifest(folder)
    assert there is not None
    build = Build(folder, there, missing, sources, base, codec)
    report = build.run(config, model, params, references, progress)
    if jax.process_index() == 0:
        finish(folder, there)
    meet("bank complete")
    return report


def _check_seen(folder: str | Path) -> None:
    if storage.read_manifest(folder) is None:
        raise BankError(
            f"process {jax.process_index()} does not see what process 0 writes in {folder}; put the"
            " bank in a bucket or on a disk that all processes share"
        )


def finish(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Marks a bank as complete; no process writes any more."""
    missing = storage.missing_shards(folder, manifest) if jax.process_count() > 1 else []
    if missing:
        raise BankError(
            f"{len(missing)} shards of bank {folder} are not there, the first is"
            f" {storage.shard_key(missing[0])}, though all processes have written: run the same"
            " command again, which writes them"
        )
    storage.remove_locks(folder)
    stamp = storage.read_file(folder, storage.MANIFEST) or b""
    storage.write_file(folder, storage.COMPLETE, storage.complete_stamp(stamp))


def make_manifest(
    config: ConfigDict,
    binding: Binding,
    info: dict[str, Any],
    references: int,
    codec: Codec,
    sides: dict[str, bytes],
) -> dict[str, Any]:
    item = (binding.layout[name] for name in ("layers", "kv_heads", "kept_tokens"))
    return {
        "format": storage.FORMAT,
        "binding": vars(binding),
        "info": info,
        "codec": codec.name,
        "shape": [references, 2, *codec.item_shape(*item)],
        "dtype": codec.stored_dtype,
        "shard_memories": min(config.writer.shard_memories, references),
        "checksums": {name: checksum(data) for name, data in sides.items()},
    }


def _make_codec(
    config: ConfigDict,
    model: Model,
    params: Params,
    references: ReferenceSet,
    folder: str | Path,
    binding: Binding,
    base: Bank | None,
) -> Codec:
    """The codec of `writer.compression`: this folder's or the base's, else a new one."""
    writer, dtype = config.writer, config.memory.dtype
    heads = heads_of(config)
    if writer.compression != codecs.VECTOR:
        return Codec(writer.compression, config.model.head_dim, dtype, heads=heads)
    written = storage.read_file(folder, storage.CODEBOOK)
    if written is not None:  # of a killed build, or of a finished bank
        with contextlib.suppress(codecs.QuantizerError):
            codec, owner = codecs.from_bytes(written, dtype)
            if owner == binding.owner:
                return dataclasses.replace(codec, heads=heads)
    theirs = None if base is None or base.codec.codebooks is None else base
    if theirs is not None and theirs.binding.writer == binding.writer:
        return dataclasses.replace(theirs.codec, heads=heads)
    ids = _sample(config, references)
    print(f"bank {folder}: training codebooks on {len(ids)} references", flush=True)
    whole = dataclasses.replace(codecs.plain(config.model.head_dim, dtype), heads=heads)
    encoder = Encoder(config, model, params, references, whole)
    memories = np.concatenate(list(encoder.batches(ids, Clock())))
    lengths = np.minimum(references.lengths[ids], config.memory.kept_tokens)
    codec = codecs.train_codec(
        codecs.VECTOR,
        memories,
        lengths,
        dtype,
        coarse_bits=writer.coarse_bits,
        fine_bits=writer.fine_bits,
        progress=True,
    )
    if not storage.is_url(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    storage.write_file(folder, storage.CODEBOOK, codecs.to_bytes(codec, binding.owner))
    return dataclasses.replace(codec, heads=heads)


def _sample(config: ConfigDict, references: ReferenceSet) -> Int[np.ndarray, " n"]:
    """References, uniformly sampled, with `writer.codebook_vectors` keys, or all there are."""
    order = np.random.default_rng(0).permutation(len(references))
    slots = np.minimum(references.lengths[order], config.memory.kept_tokens)
    vectors = np.cumsum(slots) * stored_heads(config.model, config.memory)
    enough = int(np.searchsorted(vectors, config.writer.codebook_vectors)) + 1
    return np.sort(order[:enough])


def prepare_folder(
    folder: str | Path, manifest: dict[str, Any], sides: dict[str, bytes]
) -> list[int]:
    """Makes the folder ready for shards, or checks that it is; returns the missing shards."""
    if not storage.is_url(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    storage.remove_locks(folder)
    there = storage.read_manifest(folder)
    if there is not None:
        _check_same(folder, manifest, there)
    for name, data in sides.items():
        if storage.read_file(folder, name) != data:
            storage.write_file(folder, name, data)
    if there is None:
        storage.open_array(folder, manifest, create=True)
        text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        storage.write_file(folder, storage.MANIFEST, text.encode())
    missing = storage.missing_shards(folder, manifest)
    if missing:
        storage.store(folder).write(storage.COMPLETE, None).result()
    return missing


def _check_same(folder: str | Path, ours: dict[str, Any], there: dict[str, Any]) -> None:
    different = Binding(**ours["binding"]).differences(Binding(**there["binding"]))
    if not different:  # what the binding does not hold
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
            f"{folder} holds a bank of something else: {'; '.join(different)}. Delete the folder or"
            " write to another one"
        )


def _copies(
    base: Bank | None, binding: Binding, lengths: np.ndarray, hashes: np.ndarray
) -> Int[np.ndarray, " R"]:
    """For every reference the memory of `base` from the same tokens, −1 where there is none."""
    if base is None:
        return np.full(len(lengths), -1, np.int64)
    anything = Binding(binding.writer, binding.tokenizer, base.binding.references, binding.layout)
    different = anything.differences(base.binding)
    if different:
        raise BankError(
            f"memories cannot be copied from the base bank {base.folder}: {'; '.join(different)}."
            f" Run {WRITE_AGAIN} without --base"
        )
    old = base.record_hashes
    order = np.argsort(old, kind="stable")
    place = np.minimum(np.searchsorted(old[order], hashes), len(old) - 1)
    candidates = order[place]
    same = (old[candidates] == hashes) & (base.lengths[candidates] == lengths)
    return np.where(same, candidates, -1).astype(np.int64)


def _kept(
    base: Bank | None, binding: Binding, size: int, keep: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " R"]:
    """As `_copies`, of memories that another writer wrote."""
    assert base is not None
    anyone = Binding(base.binding.writer, binding.tokenizer, binding.references, binding.layout)
    base.require(anyone)
    sources = np.full(size, -1, np.int64)
    sources[keep] = keep
    return sources
