"""Evaluates on validation data: losses with, without and with wrong memories; gains of DPO."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from m3jax.config import prefix_tokens
from m3jax.data.batch import Batch
from m3jax.data.pipeline import Pipeline, open_pipeline
from m3jax.data.rows import PackedRows
from m3jax.errors import CheckpointError
from m3jax.make_model import make_model
from m3jax.memory.sparsify import sparsifier
from m3jax.mesh import host_rows, to_global
from m3jax.model.parameters import Params
from m3jax.text.tokenizer import PAD
from m3jax.train.dpo_base import RowLogprobs
from m3jax.train.loss import Forward, Sums, objective, on_rows, over_rows, place_batch

MODES = ("memory", "none", "wrong")


class LossEvaluator:
    """Evaluates loss and accuracy of parameters, on the same validation batches every time.

    Args:
      config: a validated config; without memory only the mode `none` is evaluated.
      pipeline: pipeline of the validation split.
      mesh: mesh of the parameters, over which the rows are split; None for one device.

    Calling it with parameters returns `loss_<mode>` (nats per token) and `accuracy_<mode>` for each
    mode: `memory`, `none`, and `wrong`, in which a row reads the memories of another row, except
    those that it reads itself in the mode `memory`: these are hidden.

    Attributes:
      batches: number of evaluated batches: `evaluation.batches`, or fewer if the split is smaller.
      hidden: share of the other rows' memories that were hidden in the mode `wrong`, in the last
        call; 1 if the split has a single row, which then reads none.
      rows: number of distinct rows in these batches.
    """

    def __init__(self, config: ConfigDict, pipeline: Pipeline, mesh: Mesh | None = None):
        self.config, self.pipeline, self.mesh = config, pipeline, mesh
        whole = max(1, len(pipeline.rows) // pipeline.batch_size)
        self.batches = min(config.evaluation.batches, whole)
        self.rows = min(self.batches * pipeline.batch_size, len(pipeline.rows))
        self.model = make_model(config, prefix_tokens(config), mesh)
        self._rows = host_rows(mesh, pipeline.batch_size)
        self.modes = MODES if config.memory.source != "none" else ("none",)
        self._sums = {mode: jax.jit(self._summed(mode)) for mode in self.modes}
        self._count_hidden = jax.jit(_count_hidden)
        self.hidden = 0.0

    def __call__(self, params: Params) -> dict[str, float]:
        totals = {mode: np.zeros(3) for mode in self.modes}
        counts = np.zeros(2)
        for batch in self.each():
            placed = self._place(batch)
            for mode in self.modes:
                totals[mode] += self._placed_sums(params, placed, mode)
            if "wrong" in self.modes:
                counts += jax.device_get(self._count_hidden(placed.reference_ids))
        self.hidden = float(counts[0] / max(counts[1], 1))
        return {
            f"{name}_{mode}": float(value)
            for mode, (loss, weight, correct) in totals.items()
            for name, value in (("loss", loss / weight), ("accuracy", correct / weight))
        }

    def each(self) -> Iterator[Batch]:
        """Yields the validation batches."""
        return islice(self.pipeline.batches(0, self._rows.ids), self.batches)

    def sums(self, params: Params, batch: Batch, mode: str) -> Float[np.ndarray, " 3"]:
        """Returns summed loss (nats), weight and correct tokens of a batch, in one of `modes`."""
        return self._placed_sums(params, self._place(batch), mode)

    def _place(self, batch: Batch) -> Batch:
        """Makes the global batch; unlike a batch of training it keeps the reference ids."""
        placed, ids = place_batch(self.mesh, batch, self._rows), batch.reference_ids
        if ids is None:
            return placed
        return placed._replace(reference_ids=to_global(self.mesh, ids, self._rows, 0))

    def _placed_sums(self, params: Params, placed: Batch, mode: str) -> np.ndarray:
        return np.asarray(jax.device_get(self._sums[mode](params, placed)), np.float64)

    def _summed(self, mode: str) -> Callable[[Params, Batch], Sums]:
        """Makes the function that computes the sums of a placed batch in one mode."""
        sparsify = sparsifier(self.config.memory)
        forward = Forward(self.model, sparsify, self.pipeline.dequantize)

        def local(params: Params, batch: Batch) -> Sums:
            return over_rows(self.model, objective(forward, params, batch)[1])

        total = on_rows(self.model, local, PartitionSpec())

        def summed(params: Params, batch: Batch) -> Sums:
            memory, tokens, ids = batch.memory, batch.reference_tokens, batch.reference_ids
            batch = batch.for_step()
            if mode == "none":
                memory = tokens = None
            if mode == "wrong":
                other = jax.tree.map(lambda x, axis: jnp.roll(x, 1, axis), batch, batch.row_axes())
                assert ids is not None
                memory, tokens, own = other.memory, other.reference_tokens, _own_of_next(ids)
                if memory is not None:
                    memory = memory._replace(length=jnp.where(own, 0, memory.length))
                if tokens is not None:
                    tokens = jnp.where(own[..., None], PAD, tokens)
            return total(params, batch._replace(memory=memory, reference_tokens=tokens))

        return summed


def _own_of_next(ids: Int[Array, "B C M"]) -> Bool[Array, "B C M"]:
    """Returns for each reference of the row before, whether the row has it too, in any chunk."""
    B = ids.shape[0]
    rolled = jnp.roll(ids, 1, axis=0)
    return (rolled[..., None] == ids.reshape(B, 1, 1, -1)).any(-1) & (rolled >= 0)


def _count_hidden(ids: Int[Array, "B C M"]) -> tuple[Array, Array]:
    """Returns the number of other rows' memories that are hidden, and the number of memories."""
    return _own_of_next(ids).sum(), (ids >= 0).sum()


class PreferenceEvaluator:
    """Evaluates the DPO loss of parameters, on the same validation pairs every time.

    Calling it with parameters returns, over all pairs of the first `evaluation.batches` batches:
    `loss` (nats per pair), `accuracy` (share of pairs whose margin is above 0), `preferred` (share
    of pairs whose chosen answer is likelier than the rejected one), and `gain_chosen` and
    `gain_rejected`, the mean log-probability of an answer minus the base model's, in nats. Raises
    `CheckpointError` if the base model's log-probabilities are missing.

    Attributes:
      pipeline: pipeline of the validation split; its `base_logprobs` must be set before a call.
    """

    def __init__(self, config: ConfigDict, pipeline: Pipeline, mesh: Mesh | None = None) -> None:
        self.config, self.pipeline = config, pipeline
        model = make_model(config, prefix_tokens(config), mesh)
        self._logprobs = RowLogprobs(config, pipeline, model)
        most = config.evaluation.batches * pipeline.batch_size
        self.rows = min(most, len(pipeline.rows))

    def __call__(self, params: Params) -> dict[str, float]:
        base = self.pipeline.base_logprobs
        if base is None:
            raise CheckpointError(
                "the log-probabilities of the base model are missing; training computes them"
            )
        parts = list(self._logprobs(params, 0, self.rows))
        logprobs = np.concatenate(parts).astype(np.float64)
        gains = logprobs - base[: self.rows]
        chosen = np.zeros(gains.shape, bool)
        rows = self.pipeline.rows
        assert isinstance(rows, PackedRows)
        for row, group in enumerate(rows.plan[: self.rows]):
            chosen[row, 0 : 2 * len(group) : 2] = True
        rejected = np.roll(chosen, 1, axis=1)
        margin = self.config.preference.beta * (gains[chosen] - gains[rejected])
        return {
            "loss": float(np.mean(np.logaddexp(0, -margin))),
            "accuracy": float(np.mean(margin > 0)),
            "preferred": float(np.mean(logprobs[chosen] > logprobs[rejected])),
            "gain_chosen": float(np.mean(gains[chosen])),
            "gain_rejected": float(np.mean(gains[rejected])),
        }


def evaluator(
    config: ConfigDict,
    workdir: str | Path,
    *,
    bank: str | Path | None = None,
    version: int | None = None,
    mesh: Mesh | None = None,
) -> LossEvaluator | PreferenceEvaluator:
    """Makes the evaluator of a workdir's validation split; arguments as in `open_pipeline`."""
    pipeline = open_pipeline(config, workdir, split="validation", bank=bank, version=version)
    if config.data.packing == "pairs":
        return PreferenceEvaluator(config, pipeline, mesh)
    return LossEvaluator(config, pipeline, mesh)
