"""The log hook: metrics of a run as lines, TensorBoard events and progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from m3jax.train.clock import RunClock, Speed
from m3jax.train.hooks import Hook
from m3jax.train.metrics import Metrics, dropped_share, hit_share
from m3jax.train.progress import Progress
from m3jax.train.stage_data import Batches, StageData
from m3jax.train.state import TrainState


class Log(Hook):
    """Shows every step, and writes a line every `train.log_every` steps (the first process).

    Args:
      config: of the stage.
      folder: of the stage.
      clock: of the run.
      speed: of the run.
      progress: shows steps.
      rollbacks: of the guard, which adds to them.
    """

    late = True

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        clock: RunClock,
        speed: Speed,
        progress: Progress,
        rollbacks: Sequence[Mapping[str, Any]],
    ):
        self.train, self.folder, self.clock, self.speed = config.train, folder, clock, speed
        self.progress, self.rollbacks = progress, rollbacks
        self.metrics: Metrics | None = None  # on the first process only
        self._pipeline: Batches | None = None
        self._counters: Mapping[str, float] = {}  # of the line before
        self._started = False

    def read_from(self, data: StageData) -> None:
        self._pipeline, self._counters = data.pipeline, {}

    def start(self, step: int) -> None:
        if jax.process_index() == 0:
            self.close()
            running = self.clock.now() - self.clock.born
            self.metrics = Metrics(self.folder, step, running, rollbacks=self.rollbacks)
        if self._started:
            self.speed.report()  # the seconds of what was undone are lost, as after a kill
        elif self.metrics is not None:
            (self.folder / "loss.png").unlink(missing_ok=True)
            self.speed.seconds_before = self.metrics.seconds
        self._started = True

    def __call__(self, step: int, state: TrainState | None, metrics: Mapping[str, float]) -> None:
        self.speed.step()
        self.progress.update(step, metrics["loss"], self.speed.tokens_per_second)
        if step % self.train.log_every and step != self.train.steps:
            return
        assert self._pipeline is not None
        before, self._counters = self._counters, dict(self._pipeline.report())
        counters = {
            **self._counters,
            **dropped_share(before, self._counters),
            **hit_share(before, self._counters),
        }
        line = {
            "step": step,
            "tokens": step * self.speed.tokens_per_step,
            "loss": metrics["mean_loss"],
            "accuracy": metrics["mean_accuracy"],
            "gradient_norm": metrics["gradient_norm"],
            "parameter_norm": metrics["parameter_norm"],
            "learning_rate": metrics["learning_rate"],
            **self.speed.report(),
            "retrieval": counters,
        }
        self.write(line)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line; `step` is among its keys."""
        if self.metrics is not None:
            self.metrics.write(line)

    def sync(self) -> None:
        """Makes all lines durable."""
        if self.metrics is not None:
            self.metrics.sync()

    def finish(self) -> None:
        """Writes the seconds since the last line."""
        self.write({"step": self.train.steps, "time": self.clock.take()})

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()
