"""Embedders that run a checkpoint of the model itself (proposed in Memory³ §7 instead of BGE-M3).

`ModelEmbedder` compares hidden states. `AttentionEmbedder` compares the attention queries of a text
with the keys that memories keep: its vectors find candidates, which `Ranking` then scores by
attention. Both need no other model than the one that reads the memories.

The hidden states and queries of a trained model depend more on the position in the text than on the
text itself, so that short and long texts would be far apart. Therefore, before pooling, the mean
over the knowledge base of the states at the same position is subtracted from each state.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int64
from ml_collections import ConfigDict

from m3jax.checkpoint import read_model, restack
from m3jax.config import PREFIX_TOKENS, prefix_tokens
from m3jax.errors import CheckpointError, RetrievalError, TextError
from m3jax.files import committing, digest
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.memory.binding import layout_of, slots_of, writer_fingerprint, writer_params
from m3jax.memory.sparsify import sparsifier
from m3jax.mesh import local_mesh, replicated
from m3jax.model.layer import EncodedReferences
from m3jax.model.parameters import Params
from m3jax.model.rope import Rope, rotate, turned_layers
from m3jax.retrieval.batches import by_rows, calls, run
from m3jax.retrieval.embedder import Embedder, read_spec, reading, reload
from m3jax.retrieval.pooling import (
    centred,
    directions,
    draw,
    like,
    mean_of,
    position_means,
    unit,
    usable,
)
from m3jax.text.tokenizer import PAD

Statistics = dict[str, np.ndarray]
Known = dict[str, Any]

SAMPLE = 8192  # most texts of the knowledge base that `fit` uses
_STATISTICS = "statistics.npz"
_BLOCK = 1024  # texts tokenized at a time
_SHRINK = 0.01  # fraction of the mean variance that whitening adds to each variance
_LOADED: WeakValueDictionary[str, CheckpointEmbedder] = WeakValueDictionary()


class CheckpointEmbedder(Embedder):
    """Base class of embedders that run one of our checkpoints: loads, pools, fits a projection.

    Subclasses define `_part`, `_width`, `states`, `pooled` and `scales`.

    Attributes:
      config: sections `model` and `memory` of the checkpoint's config.
      model: model of the layers that are run.
      known: `params` of the model and the fitted statistics, replicated over the mesh.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        dimension: int,
        layer: int = 0,
        rows: int = 16,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Reads the checkpoint; raises `RetrievalError` if it is missing or cannot be used.

        Args:
          checkpoint: as in `read_model`.
          dimension: largest width of an embedding; the pooled width limits it, too.
          layer: last layer that is run, counted from 1; 0 = the last memory layer.
          rows: texts that one device encodes at a time.
          devices: default: all devices of this process.
        """
        remedy = (
            "config.retrieval.checkpoint names the stage folder of a trained model (default"
            " WORKDIR/warmup: prepare and train it with another embedder first)"
        )
        try:
            self.folder, self.config, params, self.meta, self.tokenizer = read_model(checkpoint)
        except (CheckpointError, TextError) as error:
            raise RetrievalError(f"{error}; {remedy}") from error
        self.requested, self.layer, self.rows = dimension, layer, rows
        self.longest = self.config.memory.reference_length
        self._part_config, prefix, params = self._part(params)
        self.model = make_model(self._part_config, prefix)
        self.weights = writer_fingerprint(params, self.model.memory)
        self.mesh = local_mesh(devices)
        self.known = jax.device_put({"params": writer_params(params)}, replicated(self.mesh))
        self.dimension = min(dimension, self._width())
        self._embedding = by_rows(self.mesh, self._embed)
        self._embedding_queries = by_rows(self.mesh, self._embed_queries)
        self.set_statistics({})

    def _part(self, params: Params) -> tuple[ConfigDict, tuple[int, ...], Params]:
        """Returns config, prefix tokens and parameters of a model of the layers that are run."""
        raise NotImplementedError

    def _width(self) -> int:
        """Returns the width F of a pooled vector."""
        raise NotImplementedError

    def states(self, known: Known, tokens_BT: jax.Array, real_BT: jax.Array) -> jax.Array:
        """Computes the states `(B, T, …)` of tokens, before position means are subtracted."""
        raise NotImplementedError

    def pooled(self, known: Known, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """Pools each reference to one vector `(B, F)`, before centring."""
        raise NotImplementedError

    def scales(self, variance: Float[np.ndarray, " E"]) -> Float[np.ndarray, " E"]:
        """Returns the scale of each principal direction of pooled vectors, from its variance."""
        raise NotImplementedError

    @property
    def spec(self) -> dict[str, Any]:
        settings = {"dimension": self.requested, "layer": self.layer, "rows": self.rows}
        return {**super().spec, "checkpoint": str(self.folder), **settings}

    def fit(self, texts: Iterable[str]) -> None:
        """Fits position means, centre and projection to up to 8192 uniformly sampled texts.

        Raises `RetrievalError` if none of the texts has a token.
        """
        drawn, total = draw(texts, SAMPLE), None
        for _, sums in self.run(by_rows(self.mesh, self._sums), drawn):
            sums = [np.pad(x.sum(0, dtype=np.float64), _up_to(self.longest, x)) for x in sums]
            total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
        if total is None:
            raise RetrievalError(
                f"none of the {len(drawn)} references has a token that the embedder {self.name!r}"
                " could learn from; give references with text"
            )
        means = position_means(*total)
        self.set_statistics({"means": means})
        pooled = self.run(by_rows(self.mesh, self.pooled), drawn)
        pooled_nF = np.concatenate([rows[: len(places)] for places, rows in pooled], dtype=float)
        centre_F = pooled_nF.mean(0)
        variance_E, axes_FE = directions(pooled_nF - centre_F, self.dimension)
        projection_FE = axes_FE * self.scales(variance_E)[None]
        learnt = {"means": means, "centre": centre_F, "projection": projection_FE}
        self.set_statistics({name: value.astype(np.float32) for name, value in learnt.items()})

    def _sums(
        self, known: Known, tokens_BT: jax.Array, lengths_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Sums states (1, T, …) and counts real tokens (1, T) over the rows of a device."""
        real_BT = usable(tokens_BT, lengths_B)
        states = self.states(known, tokens_BT, real_BT).astype(jnp.float32)
        sums = jnp.where(like(real_BT, states), states, 0).sum(0)
        return sums[None], real_BT.sum(0)[None]

    def _embed(self, known: Known, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        pooled_BF = self.pooled(known, tokens_BT, lengths_B)
        return unit((pooled_BF - known["centre"][None]) @ known["projection"])

    def _embed_queries(self, known: Known, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """Embeds queries in the same way as references; a subclass may override this."""
        return self._embed(known, tokens_BT, lengths_B)

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dimension"]:
        """Embeds texts, truncated to `memory.reference_length`; zeros for a text without tokens."""
        return self._embedded(self._embedding, texts)

    def embed_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dimension"]:
        """Embeds queries, truncated to `memory.reference_length`; zeros for one without tokens."""
        return self._embedded(self._embedding_queries, texts)

    def set_statistics(self, learnt: Statistics) -> None:
        """Sets fitted statistics, and the fingerprint that depends on them.

        They are `means` (W, …) by position, `centre` (F,) and `projection` (F, E).
        """
        self._learnt, self.fitted = learnt, "projection" in learnt
        placed = jax.device_put(learnt, replicated(self.mesh))
        self.known = {"params": self.known["params"], **placed}
        layout = layout_of(self._part_config, self.model.prefix_tokens)
        setting = [self.name, 1, self.weights, layout, self.tokenizer.fingerprint, self.dimension]
        parts: list[bytes | str] = [json.dumps(setting, sort_keys=True)]
        for name, values in sorted(learnt.items()):
            parts += [f"{name} {values.shape}", values.tobytes()]
        self.fingerprint = digest(*parts)

    def run(
        self,
        program: Any,
        texts: Sequence[str],
        more: Callable[[np.ndarray, int], tuple[np.ndarray, ...]] = lambda places, rows: (),
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Runs a program of `by_rows` in batches over all texts that have a token.

        Its arguments are `known`, tokens (truncated to the reference length), their lengths, and
        the arrays of `more(places, rows)`, which have `rows` rows. Yields the positions in `texts`
        of n texts, and a result whose first n rows belong to them; further rows are padding.
        """
        for start in range(0, len(texts), _BLOCK):
            tokens = self.tokenizer.encode_batch(texts[start : start + _BLOCK])
            tokens = [ids[: self.longest] for ids in tokens]
            batches = (
                (start + places, (*call, *more(start + places, len(call[1]))))
                for places, call in calls(tokens, 1, self.rows, self.mesh.size, PAD)
            )
            yield from run(functools.partial(program, self.known), self.mesh, batches)

    def _embedded(self, program: Any, texts: Sequence[str]) -> np.ndarray:
        self.check_fitted()
        embeddings = np.zeros((len(texts), self.dimension), np.float32)
        for places, rows in self.run(program, texts):
            embeddings[places] = rows[: len(places)]
        return embeddings

    def save(self, folder: str | Path) -> None:
        """Writes the fitted statistics and `embedder.json`, which names the checkpoint."""
        with committing(Path(folder) / _STATISTICS) as temporary, temporary.open("wb") as file:
            np.savez(file, **dict(sorted(self._learnt.items())))  # type: ignore[arg-type]
        super().save(folder)

    @classmethod
    def load(cls, folder: str | Path) -> CheckpointEmbedder:
        """Loads a saved embedder and its checkpoint.

        Raises `RetrievalError` if a file or the checkpoint is missing, damaged or has changed.
        """
        spec = read_spec(folder)
        with reading(folder):
            data = io.BytesIO((Path(folder) / _STATISTICS).read_bytes())
            with np.load(data) as file:
                learnt = {name: file[name] for name in sorted(file.files)}
            path, expected = Path(spec["checkpoint"]), spec["fingerprint"]
            arguments = int(spec["dimension"]), int(spec["layer"]), int(spec["rows"])

        def make() -> CheckpointEmbedder:
            loaded = _LOADED.get(f"{path} {expected}")
            if isinstance(loaded, cls):  # base and deltas of an index share one embedder
                return loaded
            embedder = cls(path, *arguments)
            embedder.set_statistics(learnt)
            return embedder

        embedder = reload(folder, "checkpoint", path, expected, make)
        _LOADED[f"{path} {expected}"] = embedder
        return embedder


def _up_to(longest: int, x: np.ndarray) -> list[tuple[int, int]]:
    """Returns the padding of sums (T, …) over x (devices, T, …) to the longest possible T."""
    most = 2 * max(longest, 16)  # calls are padded to at most 1.5 times that
    return [(0, most - x.shape[1]), *((0, 0) for _ in x.shape[2:])]


class ModelEmbedder(CheckpointEmbedder):
    """Embeds a text as the whitened mean of its tokens' hidden states after a layer.

    A few directions dominate the variance of hidden states, so that all texts have similar cosines;
    whitening equalizes the variances. The embedding keeps the directions of largest variance.
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
        config.memory.first_layer, config.memory.heads, config.memory.counts = 0, "", ""
        return config, prefix_tokens(config), restack(params, {"memory": last})

    def _width(self) -> int:
        return self.config.model.hidden

    def states(self, known: Known, tokens_BT: jax.Array, real_BT: jax.Array) -> jax.Array:
        """Computes hidden states `(B, T, D)`."""
        return self.model.hidden(known["params"], tokens_BT)

    def pooled(self, known: Known, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """Computes the mean `(B, D)` of hidden states after subtracting position means."""
        real_BT = usable(tokens_BT, lengths_B)
        return mean_of(centred(self.states(known, tokens_BT, real_BT), known["means"]), real_BT)

    def scales(self, variance: np.ndarray) -> np.ndarray:
        """Returns whitening scales, bounded for directions of almost no variance."""
        return (variance + _SHRINK * max(variance.mean(), 1e-12)) ** -0.5


class AttentionEmbedder(CheckpointEmbedder):
    """Embeds references by the keys of their memories, and queries by their attention queries.

    A reference's vector concatenates over memory layers and key-value heads the mean of the kept
    keys, minus the mean over the knowledge base. A query's vector concatenates the mean of the
    attention queries over its tokens and over the query heads of each key-value head, after
    subtracting position means. So their dot product is a mean of attention scores, minus a part
    that is the same for all references.

    RoPE rotates stored keys to their positions in the reference, which the bank does not store.
    Therefore all attention queries are rotated to the middle position of a reference: no key is
    farther away than half a reference, and a token's position in the query has no influence.
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
        """Computes attention queries before RoPE `(B, T, L, K, G, H)` as for references.

        They are zeros in layers without slots for memories.
        """
        usable_BT = jnp.where(real_BT, tokens_BT, 0)
        queries = self.model.on_references(known["params"], usable_BT, _queries)
        some = next(part for part in queries if part is not None)
        of_groups = zip(self.model.slots.groups, queries, strict=True)
        filled = [
            jnp.zeros((group.layers, *some.shape[1:]), some.dtype) if part is None else part
            for group, part in of_groups
        ]
        return jnp.moveaxis(jnp.concatenate(filled), 0, 2)

    def pooled(self, known: Known, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """Computes the mean of the kept keys of each memory layer and head, `(B, L·K·H)`."""
        keep = sparsifier(self.config.memory)
        tokens_BT = jnp.where(usable(tokens_BT, lengths_B), tokens_BT, 0)
        memory = self.model.encode(known["params"], tokens_BT, keep)
        slots = self.model.slots
        counts_BLK = jnp.minimum(memory.length[:, None, None], slots.counts_LK[None])
        keys_BLKPH = jnp.moveaxis(slots.padded(memory.keys), 0, 1)
        sums_BLKH = keys_BLKPH.astype(jnp.float32).sum(3)  # empty slots are zero
        means = sums_BLKH / jnp.maximum(counts_BLK, 1)[..., None]
        return means.reshape(len(tokens_BT), -1)

    def scales(self, variance: np.ndarray) -> np.ndarray:
        """Returns ones, because the projection must preserve dot products."""
        return np.ones_like(variance)

    def _embed_queries(self, known: Known, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        real_BT = usable(tokens_BT, lengths_B)
        q_BLKH = mean_of(self.searching(known, tokens_BT, real_BT), real_BT).mean(3)
        return unit(q_BLKH.reshape(len(tokens_BT), -1) @ known["projection"])

    def searching(
        self, known: Known, tokens_BT: jax.Array, real_BT: jax.Array
    ) -> Float32[Array, "B T L K G H"]:
        """Computes queries minus position means, rotated to the middle position of a reference."""
        q_BTLKGH = centred(self.states(known, tokens_BT, real_BT), known["means"])
        middle = len(PREFIX_TOKENS) + self.longest // 2
        position_T = jnp.full(q_BTLKGH.shape[1], middle)
        low, high = self.model.ranges["memory"]
        turned_L = turned_layers(self.config.model)[low:high]
        rope = Rope.of(self.config.model)
        if not turned_L.all():
            rope = rope.at(jnp.asarray(turned_L).reshape(1, 1, -1, 1, 1, 1))
        return rotate(q_BTLKGH, position_T, rope)


def _queries(encoded: EncodedReferences) -> jax.Array:
    """Returns a layer's queries before RoPE `(R, W, K, G, H)`."""
    return encoded.heads.plain_q[:, : encoded.usable_RW.shape[1]]


class Ranking:
    """Reranks candidate references by attention scores on their memories in the bank.

    The score is the sum over memory layers and key-value heads of the maximum of q · k / √H over
    the query's tokens, the query heads of the key-value head, and the kept keys.
    """

    def __init__(self, embedder: Embedder, bank: Bank) -> None:
        """Raises `RetrievalError` unless an `AttentionEmbedder`'s checkpoint wrote the bank."""
        if not isinstance(embedder, AttentionEmbedder):
            raise RetrievalError(
                f"config.retrieval.rerank needs an index of the embedder 'attention'; this one has"
                f" {embedder.name!r}; run launch/prepare.py with config.retrieval.embedder ="
                " 'attention'"
            )
        layout = layout_of(embedder.config, PREFIX_TOKENS)
        for side in (layout, stored := dict(bank.binding.layout)):
            side.pop("counts", None)  # heads without slots score 0 in all references
            side.pop("kept_tokens")
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
        self.slots = slots_of(bank.binding.layout)
        self._program = by_rows(embedder.mesh, self._score)

    def __call__(
        self, queries: Sequence[str], ids: Int64[np.ndarray, "n c"]
    ) -> Float32[np.ndarray, "n c"]:
        """Scores candidates `ids` of each query; −inf for the id −1."""
        scores = np.full(ids.shape, -np.inf, np.float32)

        def memories(places: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
            padded = np.full((rows, ids.shape[1]), -1, np.int64)
            padded[: len(places)] = ids[places]
            read = self.bank.read(padded)
            keys = np.asarray(self.slots.padded(jnp.asarray(read.keys)))
            return np.moveaxis(keys, 0, 1), np.asarray(read.length)

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
        slot_P = jnp.arange(keys.shape[-2])
        kept_BMP = slot_P[None, None] < slots_BM[..., None]
        seen_BMTP = real_BT[:, None, :, None] & kept_BMP[:, :, None, :]

        def layer(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            q_BTKGH, k_BMKPH, counts_K = inputs
            own_KP = slot_P[None] < counts_K[:, None]
            scores = jnp.einsum("BTKGH,BMKPH->BMKTGP", q_BTKGH, k_BMKPH.astype(jnp.float32))
            seen = seen_BMTP[:, :, None, :, None, :] & own_KP[None, None, :, None, None]
            best_BMK = jnp.where(seen, scores, -jnp.inf).max((3, 4, 5))
            return jnp.where(counts_K[None, None] > 0, best_BMK, 0.0).sum(2)

        by_layer = jnp.moveaxis(q_BTLKGH, 2, 0), jnp.moveaxis(keys, 1, 0)
        of_layers = jax.lax.map(layer, (*by_layer, jnp.asarray(self.slots.counts_LK)))
        return of_layers.sum(0) * keys.shape[-1] ** -0.5
