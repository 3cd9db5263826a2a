"""Hooks of the training loop: stability, evaluation, checkpoints, refresh of the bank.

Another hook, the log, has a file of its own (`m3jax.train.log`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from m3jax.errors import DivergenceError
from m3jax.train.checkpoints import Checkpoints
from m3jax.train.clock import RunClock
from m3jax.train.guard import Guard, describe
from m3jax.train.progress import Progress
from m3jax.train.stage_data import Evaluate, StageData
from m3jax.train.state import TrainState
from m3jax.train.termination import Termination


class RollBack(NamedTuple):
    """Answer of a hook: go on from the checkpoint of `step`, 0 for the start."""

    step: int


Answer = RollBack | StageData | None


class Hook:
    """Base class of hooks.

    A hook that is `late` is called for every step, one step late: with the metrics as floats and
    without a state, while the device computes the next step. The others are called with the state
    of the steps that they are `due` at, after the late ones have been called for that step.
    """

    late = False

    def read_from(self, data: StageData) -> None:
        """Notes the data that the loop reads from now on."""

    def start(self, step: int) -> Answer:
        """Begins, or goes on, behind a step: at first, and after every rollback."""

    def due(self, step: int) -> bool:
        """Returns whether to call it at a step; asked once for each step."""
        return False

    def __call__(self, step: int, state: TrainState | None, metrics: Mapping[str, float]) -> Answer:
        """Returns None to go on, `RollBack` to go back, or `StageData` to read from instead."""

    def finish(self) -> None:
        """Ends after the last step; not called when a run ends otherwise."""

    def close(self) -> None:
        """Closes files, however the run ended."""


class StopAtNaN(Hook):
    """Ends a run without a guard whose loss or gradient is not finite."""

    late = True

    def __init__(self, config: ConfigDict, folder: Path, checkpoints: Checkpoints):
        self.stage, self.folder, self.checkpoints = config.stage, folder, checkpoints

    def __call__(self, step: int, state: TrainState | None, metrics: Mapping[str, float]) -> None:
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        if math.isfinite(loss) and math.isfinite(norm):
            return
        latest = self.checkpoints.latest_step()
        saved = "there is no checkpoint" if latest is None else f"last checkpoint: step {latest}"
        raise DivergenceError(
            f"{self.stage}: not finite at step {step} (loss {loss}, gradient norm {norm}); {saved}"
            f" in {self.folder}. Lower optimizer.learning_rate, lengthen optimizer.lr_warmup_steps,"
            " look at the data, or let guard.on = True go back by itself"
        )


class GuardHook(Hook):
    """Lets the guard observe every step, and goes back when it notices trouble."""

    late = True

    def __init__(
        self,
        config: ConfigDict,
        guard: Guard,
        checkpoints: Checkpoints,
        clock: RunClock,
        progress: Progress,
    ):
        self.stage, self.guard, self.checkpoints = config.stage, guard, checkpoints
        self.clock, self.progress = clock, progress

    def __call__(self, step: int, state: TrainState | None, metrics: Mapping[str, float]) -> Answer:
        self.guard.observe(step, metrics["loss"], metrics["gradient_norm"])
        if self.guard.trouble is None:
            return None
        with self.clock.spent_on("checkpoint"):
            rollback = self.guard.roll_back(self.checkpoints)
            self.progress.message(f"{self.stage}: {describe(rollback)}")
            return RollBack(self.guard.resume(self.checkpoints))


class Evaluation(Hook):
    """Evaluates every `train.evaluate_every` steps and at the end.

    Args:
      config: of the stage.
      clock: gets the seconds.
      write: writes a line of metrics.
    """

    def __init__(
        self, config: ConfigDict, clock: RunClock, write: Callable[[Mapping[str, Any]], None]
    ):
        self.train, self.clock, self.write = config.train, clock, write
        self.evaluate: Evaluate | None = None

    def read_from(self, data: StageData) -> None:
        self.evaluate = data.evaluate

    def due(self, step: int) -> bool:
        every, last = self.train.evaluate_every, step == self.train.steps
        return self.evaluate is not None and bool(last or (every and step % every == 0))

    def __call__(self, step: int, state: TrainState | None, metrics: Mapping[str, float]) -> None:
        assert self.evaluate is not None and state is not None
        with self.clock.spent_on("evaluation"):
            values = {name: float(x) for name, x in self.evaluate(state.params).items()}
        self.write({"step": step, "evaluation": values})


class Save(Hook):
    """Saves every `train.checkpoint_every` steps and at the end; on SIGTERM saves and ends the run.

    Args:
      config: of the stage.
      checkpoints: of the run.
      termination: notes SIGTERM.
      clock: gets the seconds.
      progress: for the message.
      sync: makes all lines of metrics durable, which a checkpoint must not be ahead of.
      guard: has its own place in a checkpoint; or None.
    """

    def __init__(
        self,
        config: ConfigDict,
        checkpoints: Checkpoints,
        termination: Termination,
        clock: RunClock,
        progress: Progress,
        sync: Callable[[], None],
        guard: Guard | None,
    ):
        self.stage, self.train, self.checkpoints = config.stage, config.train, checkpoints
        self.termination, self.clock, self.progress = termination, clock, progress
        self.sync, self.guard = sync, guard
        self._stopping = False

    def read_from(self, data: StageData) -> None:
        self.checkpoints.reads(data.writer, data.version)

    def due(self, step: int) -> bool:
        self._stopping = self.termination.requested(step)
        return self._stopping or step == self.train.steps or step % self.train.checkpoint_every == 0

    def __call__(self, step: int, state: TrainState | None, metrics: Mapping[str, float]) -> None:
        assert state is not None
        with self.clock.spent_on("checkpoint"):
            self.sync()
            self.checkpoints.save(state, step, None if self.guard is None else self.guard.meta())
        if self._stopping and step < self.train.steps:
            self.finish()
            self.progress.message(
                f"{self.stage}: told to stop; saved at step {step} of {self.train.steps}."
                " The same command continues"
            )
            raise SystemExit(0)

    def finish(self) -> None:
        """Waits for the last checkpoint."""
        with self.clock.spent_on("checkpoint"):
            self.checkpoints.wait()


class RefreshBank(Hook):
    """Reads memories that the run's own checkpoint has written, every `train.refresh_every` steps.

    Args:
      config: of the stage.
      refresh: writes the memories with the checkpoint of a step, and returns what to read then.
      checkpoints: of the run.
      clock: gets the seconds.
      progress: for the message.
    """

    def __init__(
        self,
        config: ConfigDict,
        refresh: Callable[[int], StageData],
        checkpoints: Checkpoints,
        clock: RunClock,
        progress: Progress,
    ):
        self.stage, self.train, self.refresh = config.stage, config.train, refresh
        self.checkpoints, self.clock, self.progress = checkpoints, clock, progress

    def start(self, step: int) -> Answer:
        return self(step, None, {}) if step and self.due(step) else None

    def due(self, step: int) -> bool:
        return step % self.train.refresh_every == 0 and step < self.train.steps

    def __call__(
        self, step: int, state: TrainState | None, metrics: Mapping[str, float]
    ) -> StageData:
        with self.clock.spent_on("checkpoint"):
            self.checkpoints.wait()
        self.progress.message(f"{self.stage}: refreshing the bank at step {step}")
        with self.clock.spent_on("checkpoint"):
            return self.refresh(step)
