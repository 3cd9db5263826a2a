"""Embedders made of a checkpoint of our own model (Memory³ §7 names both as better than BGE-M3).

`ModelEmbedder` compares hidden states. `AttentionEmbedder` lets the sparse attention queries search
the keys that memories keep: its vectors find candidates, and `Ranking` scores these as attention
would. Both need no other model than the one that reads the memories.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int64
from ml_collections import ConfigDict

from m3jax.checkpoint import restack
from m3jax.config import PREFIX_TOKENS, prefix_tokens
from m3jax.errors import RetrievalError
from m3jax.memory.bank import Bank
from m3jax.memory.binding import layout_of
from m3jax.memory.sparsify import Written, sparsifier
from m3jax.model.parameters import Params
from m3jax.model.rope import rotate
from m3jax.retrieval.batches import by_rows
from m3jax.retrieval.checkpoint_encoder import CheckpointEmbedder, Known
from m3jax.retrieval.embedder import Embedder
from m3jax.retrieval.pooling import centred, mean_of, unit, usable

_SHRINK = 0.01  # share of the mean variance that whitening adds to every variance


class ModelEmbedder(CheckpointEmbedder):
    """Embeds texts as the mean over their tokens of the hidden states after a layer, whitened.

    Hidden states of all texts share a few directions of large variance, along which everything is
    alike; whitening makes the variances equal. Smaller dimensions keep the largest ones.
    """

    name = "model"

    def _part(self, params: Params) -> tuple[ConfigDict, tuple[int, ...], Params]:
        memory, layers = self.config.memory, self.config.model.layers
        last = self.layer or memory.first_layer + memory.layers
        if last > layers:
            raise RetrievalError(
                f"config.retrieval.layer = {last}, but the checkpoint {self.folder} has {layers}"
                " layers"
            )
        config = self.config.copy_and_resolve_references()
        config.model.layers = config.memory.layers = last
        config.memory.first_layer, config.memory.heads = 0, ""
        return config, prefix_tokens(config), restack(params, {"memory": last})

    def _width(self) -> int:
        return self.config.model.hidden

    def states(self, known: Known, tokens_BT: jax.Array, real_BT: jax.Array) -> jax.Array:
        """Computes hidden states `(B, T, D)`."""
        return self.model.hidden(known["params"], tokens_BT)

    def pooled(self, known: Known, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """Computes their mean `(B, D)`, each without the mean of its position."""
        real_BT = usable(tokens_BT, lengths_B)
        return mean_of(centred(self.states(known, tokens_BT, real_BT), known["means"]), real_BT)

    def scales(self, variance: np.ndarray) -> np.ndarray:
        """Whitens: directions that the knowledge base does not vary along keep a bounded weight."""
        return (variance + _SHRINK * max(variance.mean(), 1e-12)) ** -0.5


class AttentionEmbedder(CheckpointEmbedder):
    """Searches by sparse attention: queries of head h against the keys of head h.

    A reference is the mean of the keys that its memory keeps, head after head, minus the mean of
    the knowledge base; a query is the mean of its tokens' queries, head after head, each without
    the mean of its position, and of those that share a key-value head. So their dot product is a
    mean of attention scores, less what every reference gets.

    Stored keys are turned to their place in the reference, which the bank does not keep. So all
    queries are turned to the middle of the interval of the references: no place in the reference is
    farther than half a reference, and it does not matter where in the query a token stands.
    """

    name = "attention"

    def _part(self, params: Params) -> tuple[ConfigDict, tuple[int, ...], Params]:
        if self.meta["writer"] is not None:
            raise RetrievalError(
                f"the checkpoint {self.folder} reads memories of another writer,"
                f" {self.meta['writer']['path']}, whose keys its own are not; set"
                " config.retrieval.checkpoint to that writer"
            )
        return self.config, PREFIX_TOKENS, params

    def _width(self) -> int:
        model = self.config.model
        return self.config.memory.layers * model.kv_heads * model.head_dim

    def states(self, known: Known, tokens_BT: jax.Array, real_BT: jax.Array) -> jax.Array:
        """Computes queries before RoPE `(B, T, L, K, G, H)` of texts read as references are."""
        written, _ = self.model.encode(known["params"], jnp.where(real_BT, tokens_BT, 0), _queries)
        return jnp.moveaxis(written.keys, 0, 2)

    def pooled(self, known: Known, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """Computes the mean kept key of every memory layer and head `(B, L·K·H)`."""
        keep = sparsifier(self.config.memory)
        tokens_BT = jnp.where(usable(tokens_BT, lengths_B), tokens_BT, 0)
        memory, _ = self.model.encode(known["params"], tokens_BT, keep)
        count_B = jnp.maximum(memory.length, 1).reshape(-1, 1, 1, 1)
        keys_BLKPH = jnp.moveaxis(memory.keys, 0, 1)
        sums_BLKH = keys_BLKPH.astype(jnp.float32).sum(3)  # slots past the length are zero
        return (sums_BLKH / count_B).reshape(len(tokens_BT), -1)

    def scales(self, variance: np.ndarray) -> np.ndarray:
        """Returns ones: the projection keeps dot products."""
        return np.ones_like(variance)

    def _embed_queries(self, known: Known, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        real_BT = usable(tokens_BT, lengths_B)
        q_BLKH = mean_of(self.searching(known, tokens_BT, real_BT), real_BT).mean(3)
        return unit(q_BLKH.reshape(len(tokens_BT), -1) @ known["projection"])

    def searching(
        self, known: Known, tokens_BT: jax.Array, real_BT: jax.Array
    ) -> Float32[Array, "B T L K G H"]:
        """Computes queries less position means, turned to the middle of the references."""
        q_BTLKGH = centred(self.states(known, tokens_BT, real_BT), known["means"])
        middle = len(PREFIX_TOKENS) + self.longest // 2
        position_T = jnp.full(q_BTLKGH.shape[1], middle)
        return rotate(q_BTLKGH, position_T, self.config.model.rope_base)


def _queries(
    q_RWKGH: jax.Array, k: jax.Array, rotated: jax.Array, v: jax.Array, usable_RW: jax.Array
) -> Written:
    """Stands for `sparsify` and returns a layer's queries instead of its memories."""
    R, _, K, _, _ = q_RWKGH.shape
    return Written(q_RWKGH, q_RWKGH[:, :0], usable_RW.sum(-1), jnp.zeros((R, K, 1), jnp.int32))


class Ranking:
    """Scores candidates by the keys that the bank keeps of them.

    The score is the sum over memory layers and key-value heads of the largest q · k / √H, over the
    query's tokens, the heads that share the key-value head, and the kept keys.
    """

    def __init__(self, embedder: Embedder, bank: Bank) -> None:
        """Raises `RetrievalError` unless the embedder's checkpoint wrote the bank."""
        if not isinstance(embedder, AttentionEmbedder):
            raise RetrievalError(
                f"config.retrieval.rerank needs an index of the embedder 'attention'; this one has"
                f" {embedder.name!r}; run launch/prepare.py with config.retrieval.embedder ="
                " 'attention'"
            )
        layout = layout_of(embedder.config, PREFIX_TOKENS)
        for side in (layout, stored := dict(bank.binding.layout)):
            side.pop("heads", None)  # keys that are not stored score 0 in all references
        sides = {
            "weights": (embedder.weights, bank.binding.writer),
            "tokenizer": (embedder.tokenizer.fingerprint, bank.binding.tokenizer),
            "layout": (layout, {**stored, "dtype": layout["dtype"]}),
        }
        differ = [part for part, (ours, theirs) in sides.items() if ours != theirs]
        if differ:
            raise RetrievalError(
                f"the bank {bank.folder} was not written by the checkpoint {embedder.folder} of the"
                f" index ({', '.join(differ)} differ); write it again with launch/write_bank.py, or"
                " run launch/prepare.py with config.retrieval.checkpoint = the bank's writer"
            )
        self.embedder, self.bank = embedder, bank
        self._program = by_rows(embedder.mesh, self._score)

    def __call__(
        self, queries: Sequence[str], ids: Int64[np.ndarray, "n c"]
    ) -> Float32[np.ndarray, "n c"]:
        """Scores references for every query; −inf for the id −1."""
        scores = np.full(ids.shape, -np.inf, np.float32)

        def memories(places: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
            padded = np.full((rows, ids.shape[1]), -1, np.int64)
            padded[: len(places)] = ids[places]
            read = self.bank.read(padded)
            return np.moveaxis(np.asarray(read.keys), 0, 1), np.asarray(read.length)

        for places, read in self.embedder.run(self._program, queries, memories):
            scores[places] = np.where(ids[places] < 0, -np.inf, read[: len(places)])
        return scores

    def _score(
        self,
        known: Known,
        tokens_BT: jax.Array,
        lengths_B: jax.Array,
        keys: Float[Array, "B L M K P H"],
        slots_BM: jax.Array,
    ) -> Float32[Array, "B M"]:
        real_BT = usable(tokens_BT, lengths_B)
        q_BTLKGH = self.embedder.searching(known, tokens_BT, real_BT)
        kept_BMP = jnp.arange(keys.shape[-2])[None, None] < slots_BM[..., None]
        seen_BMTP = real_BT[:, None, :, None] & kept_BMP[:, :, None, :]

        def layer(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            q_BTKGH, k_BMKPH = inputs
            scores = jnp.einsum("BTKGH,BMKPH->BMKTGP", q_BTKGH, k_BMKPH.astype(jnp.float32))
            scores = jnp.where(seen_BMTP[:, :, None, :, None, :], scores, -jnp.inf)
            return scores.max((3, 4, 5)).sum(2)

        of_layers = jax.lax.map(layer, (jnp.moveaxis(q_BTLKGH, 2, 0), jnp.moveaxis(keys, 1, 0)))
        return of_layers.sum(0) * keys.shape[-1] ** -0.5
