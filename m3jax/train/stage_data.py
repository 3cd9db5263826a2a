"""Data of a stage: batches, evaluator, and whose memories they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from m3jax.data.batch import Batch
from m3jax.memory.reader import Dequantize
from m3jax.model.parameters import Params

Evaluate = Callable[[Params], Mapping[str, float]]


@runtime_checkable
class Batches(Protocol):
    """Source of a loop's batches, `m3jax.data.pipeline.Pipeline`."""

    def batches(self, first_step: int, rows: np.ndarray) -> Iterator[Batch]:
        """Host batches of the steps `first_step` …; a batch is a function of (seed, step) alone."""

    def report(self) -> Mapping[str, float]:
        """Counters for the metrics."""

    @property
    def dequantize(self) -> Dequantize | None:
        """Dequantizes stored memories inside the step; None if batches hold memories."""


class StageData(NamedTuple):
    """All that a stage reads of one version of the knowledge.

    Attributes:
      pipeline: batches.
      evaluate: returns named numbers of parameters, or None.
      writer: `{"hash", "path", "step"}` of the checkpoint that wrote the memories, or None.
      version: of the knowledge, or None.
    """

    pipeline: Batches
    evaluate: Evaluate | None = None
    writer: Mapping[str, Any] | None = None
    version: int | None = None
