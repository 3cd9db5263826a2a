"""Validation loss and accuracy with memory, without, and with the wrong memories."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from m3jax.config import prefix_tokens
from m3jax.data.batch import Batch
from m3jax.data.pipeline import Pipeline, open_pipeline
from m3jax.make_model import make_model
from m3jax.memory.sparsify import sparsifier
from m3jax.mesh import host_rows
from m3jax.model.parameters import Params
from m3jax.train.dpo_evaluator import PreferenceEvaluator
from m3jax.train.loss import Sums, global_sums, place_batch

MODES = ("memory", "none", "wrong")


class LossEvaluator:
    """Evaluates parameters on the same validation batches every time.

    Args:
      config: a validated config; without memory only the mode `none` is evaluated.
      pipeline: of the validation split.
      mesh: where the parameters lie, over which the rows are split; None: one device.

    Calling it with parameters returns `loss_<mode>` (nats a token) and `accuracy_<mode>` for each
    mode. `wrong` gives every row the memories of its neighbour in the batch.

    Attributes:
      batches: how many it evaluates; fewer than `evaluation.batches` where the rows do not last.
      rows: how many different rows these hold.
    """

    def __init__(self, config: ConfigDict, pipeline: Pipeline, mesh: Mesh | None = None):
        self.config, self.pipeline = config, pipeline
        whole = max(1, len(pipeline.rows) // pipeline.batch_size)
        self.batches = min(config.evaluation.batches, whole)
        self.rows = min(self.batches * pipeline.batch_size, len(pipeline.rows))
        self.model = make_model(config, prefix_tokens(config), mesh)
        self._ids, self._place = None, jax.device_put
        if mesh is not None:
            of_host = host_rows(mesh, pipeline.batch_size)
            self._ids, self._place = of_host.ids, functools.partial(place_batch, mesh, rows=of_host)
        self.modes = MODES if config.memory.source != "none" else ("none",)
        self._sums = {mode: jax.jit(self._summed(mode)) for mode in self.modes}

    def __call__(self, params: Params) -> dict[str, float]:
        totals = {mode: np.zeros(3) for mode in self.modes}
        for batch in self.each():
            placed = self._place(batch.for_step())
            for mode in self.modes:
                totals[mode] += self._summed_up(params, placed, mode)
        return {
            f"{name}_{mode}": float(value)
            for mode, (loss, weight, correct) in totals.items()
            for name, value in (("loss", loss / weight), ("accuracy", correct / weight))
        }

    def each(self) -> Iterator[Batch]:
        """The validation batches."""
        return islice(self.pipeline.batches(0, self._ids), self.batches)

    def sums(self, params: Params, batch: Batch, mode: str) -> Float[np.ndarray, " 3"]:
        """Summed loss, weight and correct tokens of a batch, in one of `modes`."""
        return self._summed_up(params, self._place(batch.for_step()), mode)

    def _summed_up(self, params: Params, placed: Batch, mode: str) -> np.ndarray:
        return np.asarray(jax.device_get(self._sums[mode](params, placed)), np.float64)

    def _summed(self, mode: str) -> Callable[[Params, Batch], Sums]:
        """The sums of a batch in one mode."""
        total = global_sums(self.model, sparsifier(self.config.memory), self.pipeline.dequantize)

        def summed(params: Params, batch: Batch) -> Sums:
            if mode == "none":
                batch = batch.without_memory()
            if mode == "wrong":
                other = jax.tree.map(lambda x, axis: jnp.roll(x, 1, axis), batch, batch.row_axes())
                batch = batch._replace(memory=other.memory, reference_tokens=other.reference_tokens)
            return total(params, batch)

        return summed


def evaluator(
    config: ConfigDict,
    workdir: str | Path,
    *,
    bank: str | Path | None = None,
    version: int | None = None,
    mesh: Mesh | None = None,
) -> LossEvaluator | PreferenceEvaluator:
    """The validation evaluator of a prepared workdir; arguments as of `open_pipeline`."""
    pipeline = open_pipeline(config, workdir, split="validation", bank=bank, version=version)
    if config.data.packing == "pairs":
        return PreferenceEvaluator(config, pipeline, mesh)
    return LossEvaluator(config, pipeline, mesh)
