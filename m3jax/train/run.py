"""Objects that the loop and the hooks of a run share, and the data that a stage reads."""

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
from m3jax.train.stage_files import StageFiles

Evaluate = Callable[[Params], Mapping[str, float]]


@runtime_checkable
class Batches(Protocol):
    """Interface of the source of batches, implemented by `m3jax.data.pipeline.Pipeline`."""

    def batches(self, first_step: int, rows: np.ndarray) -> Iterator[Batch]:
        """Yields a host's batches from `first_step` on, each a function of (seed, step) alone."""

    def report(self) -> Mapping[str, float]:
        """Returns counters for the metrics."""

    @property
    def dequantize(self) -> Dequantize | None:
        """Function that dequantizes memories inside the step; None if they are not quantized."""


class StageData(NamedTuple):
    """Everything that a stage reads of one version of the knowledge base.

    Attributes:
      pipeline: source of the batches.
      evaluate: maps parameters to named numbers; None for no evaluation.
      writer: `{"hash", "path", "step"}` of the checkpoint that wrote the memories, or None.
      version: number of the version; None without memory.
      ingredients: fingerprint of everything that is read, by its name (`Pipeline.ingredients`).
    """

    pipeline: Batches
    evaluate: Evaluate | None = None
    writer: Mapping[str, Any] | None = None
    version: int | None = None
    ingredients: Mapping[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Run:
    """Objects shared by the loop and the hooks of a run; `guard` is None without `guard.on`."""

    config: ConfigDict
    folder: Path  # of the stage
    checkpoints: Checkpoints
    guard: Guard | None
    clock: RunClock
    progress: Progress
    files: StageFiles

    def say(self, text: str) -> None:
        """Shows a message that begins with the name of the stage."""
        self.progress.message(f"{self.config.stage}: {text}")
