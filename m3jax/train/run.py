"""Parts of one run of a stage that its loop and hooks share, and the data that it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from ml_collections import ConfigDict

from m3jax.data.batch import Batch
from m3jax.memory.reader import Dequantize
from m3jax.model.parameters import Params
from m3jax.train.checkpoints import Checkpoints
from m3jax.train.clock import Progress, RunClock
from m3jax.train.guard import Guard

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


@dataclasses.dataclass(frozen=True)
class Run:
    """Shared parts of a run, each described in its class; without `guard.on` the guard is None."""

    config: ConfigDict
    folder: Path  # of the stage
    checkpoints: Checkpoints
    guard: Guard | None
    clock: RunClock
    progress: Progress

    def say(self, text: str) -> None:
        """Shows a message that begins with the name of the stage."""
        self.progress.message(f"{self.config.stage}: {text}")
