"""Validation of DPO: gains of a model over its base model, on pairs it was not trained on."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from m3jax.config import prefix_tokens
from m3jax.data.packed import PackedRows
from m3jax.data.pipeline import Pipeline
from m3jax.errors import CheckpointError
from m3jax.make_model import make_model
from m3jax.model.parameters import Params
from m3jax.train.dpo_base import each_batch, row_logprobs


class PreferenceEvaluator:
    """Evaluates parameters on the same validation pairs every time.

    Calling it with parameters returns, of all pairs of the first `evaluation.batches` batches:
    `loss` (nats a pair), `accuracy` (share of pairs whose margin is above 0), `preferred` (share
    whose chosen answer is the likelier one), and `gain_chosen` and `gain_rejected`, the mean change
    of an answer's log-probability over the base model's, in nats.

    Attributes:
      pipeline: of the validation split; its `base_logprobs` must be there.
    """

    def __init__(self, config: ConfigDict, pipeline: Pipeline, mesh: Mesh | None = None) -> None:
        self.config, self.pipeline, self.mesh = config, pipeline, mesh
        model = make_model(config, prefix_tokens(config), mesh)
        self._logprobs = row_logprobs(config, model, pipeline.dequantize)
        most = config.evaluation.batches * pipeline.batch_size
        self.rows = min(most, len(pipeline.rows))

    def __call__(self, params: Params) -> dict[str, float]:
        base = self.pipeline.base_logprobs
        if base is None:
            raise CheckpointError(
                "the log-probabilities of the base model are missing; training computes them"
            )
        parts = [
            np.asarray(self._logprobs(params, batch))[:real]
            for real, batch in each_batch(self.pipeline, self.mesh, 0, self.rows)
        ]
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
