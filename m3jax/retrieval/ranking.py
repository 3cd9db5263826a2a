"""Ranks candidate references by what the memory heads of the reader would look for in them.

Heads that keep most of a reference's tokens are heads that copy: the attention queries of a
question, in these heads, resemble the keys of the passage that answers it. No training is needed.
The score is a late interaction (ColBERT, arXiv 2004.12832) with keys that the bank holds anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, Int64

from m3jax.checkpoint import read_model
from m3jax.config import PREFIX_TOKENS
from m3jax.errors import CheckpointError, RetrievalError, TextError
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.memory.binding import layout_of, slots_of, writer_fingerprint, writer_params
from m3jax.mesh import local_mesh, replicated
from m3jax.model.layer import EncodedReferences
from m3jax.model.rope import Rope, rotate, turned_layers
from m3jax.model.slots import SlotLayout
from m3jax.retrieval.batches import by_rows, calls, run
from m3jax.retrieval.pooling import mean_of, unit, usable
from m3jax.text.references import References
from m3jax.text.tokenizer import PAD

SAMPLE = 16  # references whose attention queries give the mean query
Known = dict[str, Any]


def ranking_heads(slots: SlotLayout) -> tuple[Int[np.ndarray, " J"], Int[np.ndarray, " J"]]:
    """Returns layers and key-value heads that keep at least half as many tokens as any head."""
    layers_J, heads_J = np.nonzero(slots.counts_LK * 2 >= slots.largest)
    return layers_J, heads_J


class Ranking:
    """Scores candidate references by the match of a query's attention queries with stored keys.

    The score is a mean cosine, between −1 and 1: the mean over J heads (`ranking_heads`), their G
    query heads and the query's tokens of the largest cosine of the token's attention query and a
    kept key. Before, the mean attention query of references is subtracted from each query: it
    dominates all of them. RoPE rotates the queries to the middle position of a reference, so that
    no key is farther away than half a reference.

    Attributes:
      layers_J, heads_J: memory layer and key-value head of each of the J heads.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        bank: Bank,
        references: References,
        rows: int = 16,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        """Reads a checkpoint, and measures the mean attention query over up to 16 references.

        Args:
          checkpoint: the writer of the bank, as in `read_model`.
          bank, references: bank to read, and the references that it was written from.
          rows: queries that one device encodes at a time.
          devices: default: all devices of this process.

        Raises:
          RetrievalError: the checkpoint is missing or cannot be used, or it did not write the bank.
        """
        try:
            folder, config, params, _, self.tokenizer = read_model(checkpoint)
        except (CheckpointError, TextError) as error:
            raise RetrievalError(
                f"{error}; with config.retrieval.rerank, config.retrieval.checkpoint names the"
                " stage folder that wrote the bank (default WORKDIR/warmup)"
            ) from error
        stored = dict(bank.binding.layout)
        layout = {**layout_of(config, PREFIX_TOKENS), "dtype": stored["dtype"]}
        sides = {
            "weights": (writer_fingerprint(params, config.memory), bank.binding.writer),
            "tokenizer": (self.tokenizer.fingerprint, bank.binding.tokenizer),
            "layout": (_of_keys(layout), _of_keys(stored)),
        }
        differ = [part for part, (ours, theirs) in sides.items() if ours != theirs]
        if differ:
            raise RetrievalError(
                f"the bank {bank.folder} was not written by the checkpoint {folder}"
                f" ({', '.join(differ)} differ), whose attention queries would rank it; set"
                " config.retrieval.checkpoint to the bank's writer, or write the bank again with"
                " launch/write_bank.py"
            )
        self.bank, self.rows, self.longest = bank, rows, config.memory.reference_length
        self.slots = slots_of(stored)
        self.layers_J, self.heads_J = ranking_heads(self.slots)
        config.memory.selection = "received"  # which the queries do not depend on; needs no copy
        self.model = make_model(config, PREFIX_TOKENS)
        self.mesh = local_mesh(devices)
        self.known = jax.device_put({"params": writer_params(params)}, replicated(self.mesh))
        ids = references.live
        drawn = ids[np.linspace(0, len(ids) - 1, min(SAMPLE, len(ids))).astype(int)]
        mean = self._mean_query(references.tokens(drawn), np.asarray(references.lengths)[drawn])
        self.known["mean"] = jax.device_put(mean, replicated(self.mesh))
        self._program = by_rows(self.mesh, self._score)

    def __call__(
        self, queries: Sequence[str], ids: Int64[np.ndarray, "n c"]
    ) -> Float32[np.ndarray, "n c"]:
        """Scores candidates `ids` of each query; −inf for the id −1, 0 for a query without token.

        Queries are truncated to `memory.reference_length` tokens.
        """
        scores = np.where(ids < 0, -np.inf, 0).astype(np.float32)
        tokens = [row[: self.longest] for row in self.tokenizer.encode_batch(list(queries))]

        def batches() -> Iterator[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
            for places, call in calls(tokens, 1, self.rows, self.mesh.size, PAD):
                padded = np.full((len(call[1]), ids.shape[1]), -1, np.int64)
                padded[: len(places)] = ids[places]
                read = self.bank.read(padded)
                yield places, (*call, self._kept(np.asarray(read.keys)), np.asarray(read.length))

        program = functools.partial(self._program, self.known)
        for places, cosines in run(program, self.mesh, batches()):
            scores[places] = np.where(ids[places] < 0, -np.inf, cosines[: len(places)])
        return scores

    def _kept(self, keys: np.ndarray) -> Float[np.ndarray, "n c J P H"]:
        """Selects the keys of the ranking heads; slots that a head does not have are zeros."""
        counts = self.slots.counts_LK
        if self.slots.uniform:
            of_heads = keys[self.layers_J, ..., self.heads_J, :, :]  # indexed axes come first
            return np.moveaxis(of_heads, 0, -3)
        ends = np.cumsum(counts).reshape(counts.shape)
        kept = np.zeros((*keys.shape[1:3], len(self.layers_J), self.slots.largest, keys.shape[-1]))
        kept = kept.astype(keys.dtype)
        for j, at in enumerate(zip(self.layers_J, self.heads_J, strict=True)):
            kept[:, :, j, : counts[at]] = keys[0, :, :, 0, ends[at] - counts[at] : ends[at]]
        return kept

    def _mean_query(
        self, tokens: Int32[np.ndarray, "n W"], lengths: Int[np.ndarray, " n"]
    ) -> Float32[np.ndarray, "J G H"]:
        """Averages attention queries before RoPE over all tokens of references."""

        def sums(known: Known, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
            real_BT = usable(tokens_BT, lengths_B)
            q_BTJGH = self._queries(known, tokens_BT, real_BT)
            return jnp.where(real_BT[..., None, None, None], q_BTJGH, 0).sum(1)

        program = functools.partial(by_rows(self.mesh, sums), self.known)
        rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        batches = calls(rows, 1, self.rows, self.mesh.size, PAD)
        total = [x[: len(places)].sum(0) for places, x in run(program, self.mesh, batches)]
        if not total:
            raise RetrievalError("no reference has a token: config.retrieval.rerank has no use")
        return np.sum(total, 0) / np.float32(lengths.sum())

    def _queries(
        self, known: Known, tokens_BT: jax.Array, real_BT: jax.Array
    ) -> Float32[Array, "B T J G H"]:
        """Computes the attention queries of the ranking heads before RoPE."""
        tokens_BT = jnp.where(real_BT, tokens_BT, 0)
        groups = self.model.on_references(known["params"], tokens_BT, _plain_queries)
        of_layer = {
            layer: x[layer - group.low]
            for group, x in zip(self.model.slots.groups, groups, strict=True)
            if x is not None
            for layer in range(group.low, group.high)
        }
        at = zip(self.layers_J.tolist(), self.heads_J.tolist(), strict=True)
        return jnp.stack([of_layer[layer][:, :, head] for layer, head in at], 2).astype(jnp.float32)

    def _score(
        self,
        known: Known,
        tokens_BT: jax.Array,
        lengths_B: jax.Array,
        keys_BMJPH: jax.Array,
        slots_BM: jax.Array,
    ) -> Float32[Array, "B M"]:
        real_BT = usable(tokens_BT, lengths_B)
        q_BTJGH = self._queries(known, tokens_BT, real_BT) - known["mean"][None, None]
        position_T = jnp.full(q_BTJGH.shape[1], len(PREFIX_TOKENS) + self.longest // 2)
        low, _ = self.model.ranges["memory"]
        turned_J = turned_layers(self.model.config)[low + self.layers_J]
        rope = Rope.of(self.model.config).at(jnp.asarray(turned_J).reshape(1, 1, -1, 1, 1))
        q_BTJGH = unit(rotate(q_BTJGH, position_T, rope))
        slot_P = jnp.arange(keys_BMJPH.shape[3])[None, None, None]
        counts_J = self.slots.counts_LK[self.layers_J, self.heads_J]
        kept_BMJP = slot_P < jnp.minimum(slots_BM[..., None], counts_J[None, None])[..., None]

        def head(inputs: tuple[jax.Array, ...]) -> jax.Array:
            q_BTGH, k_BMPH, kept_BMP = inputs
            cosines = jnp.einsum("BTGH,BMPH->BMTGP", q_BTGH, unit(k_BMPH.astype(jnp.float32)))
            best_BMTG = jnp.where(kept_BMP[:, :, None, None], cosines, -1).max(-1)
            return mean_of(jnp.moveaxis(best_BMTG, 2, 1), real_BT).mean(-1)

        by_head = (jnp.moveaxis(x, 2, 0) for x in (q_BTJGH, keys_BMJPH, kept_BMJP))
        return jax.lax.map(head, tuple(by_head)).mean(0)


def _of_keys(layout: dict[str, Any]) -> dict[str, Any]:
    """Returns what the cosines of stored keys depend on: all of a layout but how many and which are
    kept, and their scale."""
    selection = "counts", "each", "kept_tokens", "selection", "key_scale"
    return {name: value for name, value in layout.items() if name not in selection}


def _plain_queries(encoded: EncodedReferences) -> jax.Array:
    """Returns a layer's queries before RoPE `(R, W, K, G, H)`."""
    return encoded.heads.plain_q[:, : encoded.usable_RW.shape[1]]
