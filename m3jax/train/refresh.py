"""Rewrites a bank's memories with a checkpoint's own weights, as a new version of the knowledge."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.checkpoint import restore_params
from m3jax.config import format_counts, memory_layers, prefix_tokens, slot_counts
from m3jax.knowledge.edit import end_killed, refresh
from m3jax.knowledge.memory_writer import MemoryWriter
from m3jax.knowledge.versions import Version, open_version
from m3jax.make_model import make_model
from m3jax.memory import codec as codecs
from m3jax.memory.bank import Bank
from m3jax.memory.binding import slots_of, writer_fingerprint
from m3jax.memory.document_context import writer_settings
from m3jax.memory.encode import Encoder, ReferenceSet
from m3jax.mirror import Mirror
from m3jax.model.attention_mask import ExplicitMemory, KeyValues
from m3jax.model.slots import SlotLayout
from m3jax.model.transformer import Model
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer

_TINY = np.finfo(np.float32).tiny  # a layer without memories has norm 0


def rewrite(
    config: ConfigDict, workdir: str | Path, checkpoint: str | Path, *, share: float = 1.0
) -> Version:
    """Rewrites the current version's memories with a checkpoint's own weights, as a new version.

    Args:
      config: a validated config of the checkpoint's stage.
      workdir: a prepared workdir with a bank.
      checkpoint: stage folder or `checkpoints/<step>`.
      share: share of the references to rewrite, with the largest errors of their stored memories in
        the first memory layer; other memories are copied.

    Returns:
      The new version, or the current version if the checkpoint has already written its memories.

    Raises:
      CheckpointError, BankError, VersionError, TextError: a part of the workdir is missing, or does
        not fit the other parts.
    """
    write = MemoryWriter(config, workdir, checkpoint, itself=True, like_base=True)
    Mirror.of(workdir).fetch("tokenizer")
    tokenizer = Tokenizer.load(Path(workdir) / "tokenizer").fingerprint
    writer = write.restore(tokenizer)
    fingerprint, current = writer_fingerprint(writer.params, config.memory), open_version(workdir)
    if current.has_bank:
        bank = Bank.open(current.banks[0])
        whole = not bank.manifest["info"].get("foreign", 0)
        if bank.binding.writer == fingerprint and (whole or share < 1):
            end_killed(current)
            return current

    def write_layer(references: References, folder: Path | str, bank: Bank) -> None:
        keep = np.zeros(0, np.int64)
        if share < 1:
            errors = _first_layer_errors(config, checkpoint, references, bank, tokenizer)
            keep = np.sort(np.argsort(-errors, kind="stable")[round(share * len(errors)) :])
        write(references, folder, bank, keep)

    what = f"{fingerprint} {share}"
    said = f"memories by {writer.folder.name} step {writer.step}" + (
        "" if share == 1 else f", {share:.0%} of them"
    )
    return refresh(workdir, what, write=write_layer, note=said)


def _first_layer_errors(
    config: ConfigDict,
    checkpoint: str | Path,
    references: ReferenceSet,
    bank: Bank,
    tokenizer: str,
) -> Float[np.ndarray, " R"]:
    """Computes the relative squared error of every stored memory in the first memory layer.

    Encodes the references up to that layer only, at a fraction of the cost of a rewrite, and reads
    the whole bank.
    """
    probe = config.copy_and_resolve_references()
    counts = slot_counts(config.model, config.memory)
    depth = int(np.argmax(counts.any(1))) + 1  # up to the first layer that has slots
    with probe.unlocked():
        probe.memory.layers, probe.memory.heads = depth, ""
        probe.memory.counts = format_counts(counts[:depth], memory_layers(probe.memory))
        probe.writer.update(writer_settings(bank.binding.layout))
    model = make_model(probe, prefix_tokens(probe))
    params, _ = restore_params(checkpoint, model, tokenizer_fingerprint=tokenizer)
    ids = np.arange(bank.size)
    squares, _ = compare_memories(probe, model, params, references, bank, ids, True)
    return squares.relative[:, -1]


class Squares(NamedTuple):
    """Sums of squares of keys and of values (axis 0) by reference and layer, `(2, n, L)`."""

    distances: Any  # between stored and fresh memories
    norms: Any  # of fresh memories

    @property
    def errors(self) -> Float[np.ndarray, "2 L"]:
        """Returns the relative errors of keys and of values in every layer, over all references."""
        norms = np.maximum(self.norms.sum(1), _TINY)
        return np.sqrt(self.distances.sum(1) / norms)

    @property
    def relative(self) -> Float[np.ndarray, "n L"]:
        """Returns relative squared errors by reference and layer, of keys plus of values."""
        return (self.distances / np.maximum(self.norms, _TINY)).sum(0)


@jax.jit
def _squares(stored: KeyValues, fresh: KeyValues, real_nLKP: jax.Array) -> Squares:
    """Sums the squares of differences of stored and fresh memories, and those of fresh ones.

    Both are `(L, n, K, P, H)`; the sums are those of each layer and memory, over the `real_nLKP`
    slots, which hold a token. A memory is an unordered set of slots: a stored slot is compared with
    the fresh slot with the nearest key. So another selection of tokens counts as an error, another
    order of the slots does not.
    """
    stored_pair, fresh_pair = (  # keys and values, (2, n, L, K, P, H)
        jnp.moveaxis(jnp.stack(memory).astype(jnp.float32), 1, 2) for memory in (stored, fresh)
    )
    keys, fresh_keys = stored_pair[0], fresh_pair[0]
    pairs = jnp.einsum("nlkph,nlkqh->nlkpq", keys, fresh_keys, precision="highest")
    norms = jnp.square(fresh_keys).sum(-1)
    apart = jnp.square(keys).sum(-1)[..., None] + norms[..., None, :] - 2 * pairs
    apart = jnp.where(real_nLKP[..., None, :], apart, jnp.inf)
    nearest = jnp.take_along_axis(fresh_pair, apart.argmin(-1)[None, ..., None], axis=4)

    def total(x: jax.Array) -> jax.Array:
        return jnp.where(real_nLKP[None, ..., None], jnp.square(x), 0).sum((3, 4, 5))

    return Squares(total(stored_pair - nearest), total(fresh_pair))


def _layers_first(both: Any, length: Any) -> ExplicitMemory:
    """Makes memories, layers first, of keys and values in a bank's axes `(n, 2, L, K, P, H)`."""
    return ExplicitMemory(jnp.moveaxis(both[:, 0], 1, 0), jnp.moveaxis(both[:, 1], 1, 0), length)


def _by_layer(slots: SlotLayout, memory: ExplicitMemory, layers: int, P: int) -> KeyValues:
    """Lays memories of `slots` out as `(L, n, K, P, H)` of the first `layers` layers."""
    keys, values = (jnp.asarray(slots.padded(jnp.asarray(x)))[:layers] for x in memory[:2])
    more = [(0, 0)] * 3 + [(0, P - slots.largest), (0, 0)]
    return KeyValues(jnp.pad(keys, more), jnp.pad(values, more))


def compare_memories(
    config: ConfigDict,
    model: Model,
    params: Any,
    references: ReferenceSet,
    bank: Bank,
    ids: Int[np.ndarray, " n"],
    progress: bool,
) -> tuple[Squares, Squares | None]:
    """Compares stored memories of the references `ids` with fresh memories, written by `params`.

    Returns the squares of stored against fresh memories, and of quantized against plain fresh
    memories (the error of the codec alone; None if the bank is not quantized or has other layers).
    """
    plain = codecs.Codec(codecs.NONE, config.model.head_dim, config.memory.dtype)
    encoder = Encoder(config, model, params, references, plain)
    own, stored_slots = model.slots, slots_of(bank.binding.layout)
    L, P = len(own.counts), stored_slots.largest
    squares, floors = [], []
    quantize = jax.jit(bank.codec.quantize)
    done = 0
    with tqdm(total=len(ids), unit=" memories", desc="compared", disable=not progress) as bar:
        for both in encoder.batches(ids):
            part = ids[done : done + len(both)]
            done += len(part)
            bar.update(len(part))
            stored = bank.read(part)
            real = stored_slots.in_counts(np.asarray(stored.length))[:, :L]
            fresh = _by_layer(own, _layers_first(both, stored.length), L, P)
            first = _by_layer(stored_slots, stored, L, P)
            squares.append(jax.device_get(_squares(first, fresh, real)))
            if bank.codec.name != codecs.NONE and own == stored_slots:
                coded = quantize(both)
                again = bank.codec.dequantize(_layers_first(coded, stored.length))
                coarse = _by_layer(own, again, L, P)
                floors.append(jax.device_get(_squares(coarse, fresh, real)))

    def joined(parts: list[Squares]) -> Squares:
        return Squares(*(np.concatenate(side, axis=1) for side in zip(*parts, strict=True)))

    return joined(squares), joined(floors) if floors else None
