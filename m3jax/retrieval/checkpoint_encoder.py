"""Base class of embedders that run one of our checkpoints, and its statistics.

The mean hidden state, or query, of a trained model depends more on its position in the text than on
the text: short and long texts lie apart. So what is pooled is the difference from the mean, over
the knowledge base, of the states at the same position.
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
from jaxtyping import Array, Bool, Float, Float32, Int32
from ml_collections import ConfigDict

from m3jax.checkpoint import read_model
from m3jax.errors import CheckpointError, RetrievalError, TextError
from m3jax.files import committing, digest
from m3jax.make_model import make_model
from m3jax.memory.binding import layout_of, writer_fingerprint, writer_params
from m3jax.mesh import local_mesh, replicated
from m3jax.model.parameters import Params
from m3jax.retrieval.batches import by_rows, calls, run
from m3jax.retrieval.embedder import Embedder, read_spec, reading, reload
from m3jax.retrieval.pooling import directions, draw, like, position_means, unit, usable
from m3jax.text.tokenizer import PAD

Statistics = dict[str, np.ndarray]
Known = dict[str, Any]

SAMPLE = 8192  # texts of the knowledge base that `fit` learns from
_STATISTICS = "statistics.npz"
_BLOCK = 1024  # texts tokenized at a time
_LOADED: WeakValueDictionary[str, CheckpointEmbedder] = WeakValueDictionary()


class CheckpointEmbedder(Embedder):
    """Base class of embedders that run one of our checkpoints: loads, pools, fits a projection.

    Subclasses define `_part`, `_width`, `states`, `pooled` and `scales`.

    Attributes:
      config: model and memory of the checkpoint; `model.layers` is what is run.
      model: of the layers that are run.
      known: its `params` and the statistics of `set_statistics`, on every device of the mesh.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        dimension: int,
        layer: int = 0,
        rows: int = 16,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Reads the checkpoint; raises `RetrievalError` where it is missing or cannot be used.

        Args:
          checkpoint: a stage folder, or a folder `checkpoints/<step>` of it, in a workdir with the
            tokenizer it was trained with.
          dimension: most components of an embedding.
          layer: the last layer that is run, counted from 1; 0 = the last memory layer.
          rows: texts one device encodes at a time.
          devices: default all of this process.
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
        """Returns config, prefix and parameters of the model of the layers that are run."""
        raise NotImplementedError

    def _width(self) -> int:
        """Returns the numbers F of a pooled text."""
        raise NotImplementedError

    def states(
        self, known: Known, tokens_BT: Int32[Array, "B T"], real_BT: Bool[Array, "B T"]
    ) -> Float[Array, "B T *rest"]:
        """Computes the states that queries are pooled from, before subtracting position means."""
        raise NotImplementedError

    def pooled(
        self, known: Known, tokens_BT: Int32[Array, "B T"], lengths_B: Int32[Array, " B"]
    ) -> Float32[Array, "B F"]:
        """Pools one vector a reference, not yet centred."""
        raise NotImplementedError

    def scales(self, variance: Float[np.ndarray, " E"]) -> Float[np.ndarray, " E"]:
        """Returns factors on the main directions of pooled vectors, from their variances."""
        raise NotImplementedError

    @property
    def spec(self) -> dict[str, Any]:
        settings = {"dimension": self.requested, "layer": self.layer, "rows": self.rows}
        return {**super().spec, "checkpoint": str(self.folder), **settings}

    def fit(self, texts: Iterable[str]) -> None:
        """Learns means and main directions from up to 8192 texts, drawn uniformly."""
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
        """Sums states (1, T, …) and counts real tokens (1, T) over a device's rows."""
        real_BT = usable(tokens_BT, lengths_B)
        states = self.states(known, tokens_BT, real_BT).astype(jnp.float32)
        sums = jnp.where(like(real_BT, states), states, 0).sum(0)
        return sums[None], real_BT.sum(0)[None]

    def _embed(self, known: Known, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        pooled_BF = self.pooled(known, tokens_BT, lengths_B)
        return unit((pooled_BF - known["centre"][None]) @ known["projection"])

    def _embed_queries(self, known: Known, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """Embeds queries as references, unless a subclass knows better."""
        return self._embed(known, tokens_BT, lengths_B)

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dimension"]:
        """Embeds references, cut to `memory.reference_length`; zeros for one without a token.

        Raises `RetrievalError` before `fit`.
        """
        return self._embedded(self._embedding, texts)

    def embed_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dimension"]:
        """Embeds texts to search with, as `embed` does references."""
        return self._embedded(self._embedding_queries, texts)

    def set_statistics(self, learnt: Statistics) -> None:
        """Sets the statistics: `means` (W, …), `centre` (F,) and `projection` (F, E)."""
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
        """Runs a program of `by_rows` for all texts with a token; yields n places, and arrays.

        Its arguments are `known`, tokens, cut to the length of a reference, their lengths, and what
        `more(places, rows)` makes for that many rows. The first n rows of a result are those of the
        places; others are of empty texts.
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
        """Writes `embedder.json`, which names the checkpoint, and the statistics."""
        with committing(Path(folder) / _STATISTICS) as temporary, temporary.open("wb") as file:
            np.savez(file, **dict(sorted(self._learnt.items())))  # type: ignore[arg-type]
        super().save(folder)

    @classmethod
    def load(cls, folder: str | Path) -> CheckpointEmbedder:
        """Reads what `save` wrote, and the checkpoint."""
        spec = read_spec(folder)
        with reading(folder):
            data = io.BytesIO((Path(folder) / _STATISTICS).read_bytes())
            with np.load(data) as file:
                learnt = {name: file[name] for name in sorted(file.files)}
            path, expected = Path(spec["checkpoint"]), spec["fingerprint"]
            arguments = int(spec["dimension"]), int(spec["layer"]), int(spec["rows"])

        def make() -> CheckpointEmbedder:
            loaded = _LOADED.get(f"{path} {expected}")
            if isinstance(loaded, cls):  # the deltas of an index have the embedder of its base
                return loaded
            embedder = cls(path, *arguments)
            embedder.set_statistics(learnt)
            return embedder

        embedder = reload(folder, "checkpoint", path, expected, make)
        _LOADED[f"{path} {expected}"] = embedder
        return embedder


def _up_to(longest: int, x: np.ndarray) -> list[tuple[int, int]]:
    """Pads sums (devices, T, …) to the positions of all calls, whatever their T."""
    most = 2 * max(longest, 16)  # a call is padded to at most a half more than that
    return [(0, most - x.shape[1]), *((0, 0) for _ in x.shape[2:])]
