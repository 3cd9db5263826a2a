"""Hooks of the training loop: stability, log, evaluation, checkpoints, trace, refresh of a bank."""

from __future__ import annotations

import math
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from m3jax.errors import ConfigError, DivergenceError
from m3jax.train.clock import Speed
from m3jax.train.guard import describe
from m3jax.train.metrics import (
    EVENTS,
    FILE,
    META,
    Metrics,
    bank_speed,
    read_metrics,
    retrieval_shares,
)
from m3jax.train.run import Batches, Evaluate, Run, StageData
from m3jax.train.state import TrainState


class Hook:
    """Base class of hooks.

    `after` is called for every step, one step late: while the device computes the next step. `at`
    is called for the steps for which `due` returns True, once `after` was called for them.
    """

    def __init__(self, run: Run):
        self.run, self.train = run, run.config.train

    def read_from(self, data: StageData) -> None:
        """Receives the data that the loop reads from now on."""

    def start(self, step: int) -> StageData | None:
        """Prepares to go on after `step`, at first or after a rollback; returns data as `at`."""

    def before(self, step: int) -> None:
        """Prepares for a step, right before it is started."""

    def after(self, step: int, metrics: Mapping[str, float]) -> int | None:
        """Receives a step's metrics; returns the step to roll back to (0: the start), or None."""

    def due(self, step: int) -> bool:
        """Returns True if `at` must be called for this step; called once for each step."""
        return False

    def at(self, step: int, state: TrainState) -> StageData | None:
        """Works with the state after a step; returns new data for the loop to read, or None."""

    def finish(self) -> None:
        """Completes the hook's work after the last step; not called if the run ends earlier."""

    def close(self) -> None:
        """Releases files and handlers; called however the run ends."""


class StopAtNaN(Hook):
    """Raises `DivergenceError` if loss or gradient norm is not finite; for runs without a guard."""

    def after(self, step: int, metrics: Mapping[str, float]) -> None:
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        if math.isfinite(loss) and math.isfinite(norm):
            return
        latest = self.run.checkpoints.latest()
        saved = "there is no checkpoint" if latest is None else f"last checkpoint: step {latest}"
        raise DivergenceError(
            f"{self.run.config.stage}: not finite at step {step} (loss {loss}, gradient norm"
            f" {norm}); {saved} in {self.run.files.place}. Lower optimizer.learning_rate, lengthen"
            " optimizer.lr_warmup_steps, look at the data, or let guard.on = True go back by itself"
        )


class GoBack(Hook):
    """Passes every step to the guard, and rolls the run back when the guard detects trouble."""

    def after(self, step: int, metrics: Mapping[str, float]) -> int | None:
        guard, checkpoints = self.run.guard, self.run.checkpoints
        assert guard is not None
        trouble = guard.observe(step, metrics["loss"], metrics["gradient_norm"])
        if trouble is None:
            return None
        with self.run.clock.spent_on("checkpoint"):
            self.run.say(describe(guard.roll_back(trouble, checkpoints)))
            return guard.resume(checkpoints)


def known_lines(run: Run, step: int) -> int | None:
    """Returns the checksum of the lines of metrics before the newest checkpoint, of `step`.

    Says so if the file is missing. Raises `CheckpointError` if lines are damaged or missing.
    """
    upto = run.checkpoints.recorded(META)
    read_metrics(run.folder, upto)
    if upto is not None and not (run.folder / FILE).exists():
        run.say(f"{run.folder / FILE} is lost: what was logged up to step {step} is not in it")
    return None if upto is None else int(upto)


class Log(Hook):
    """Shows progress, and writes metrics every `train.log_every` steps (on process 0)."""

    def __init__(self, run: Run, mesh: Mesh):
        super().__init__(run)
        self.speed = Speed(run.config, mesh, run.clock)
        self.metrics: Metrics | None = None  # on the first process only
        self._pipeline: Batches | None = None
        self._counters: Mapping[str, float] = {}  # at the previous line
        self._counted = run.clock.now()  # time of these counters
        self._started = False

    def read_from(self, data: StageData) -> None:
        self._pipeline, self._counters, self._counted = data.pipeline, {}, self.run.clock.now()

    def start(self, step: int) -> None:
        if jax.process_index() == 0:
            self.close()
            running = self.run.clock.now() - self.run.clock.born
            rollbacks = [] if self.run.guard is None else self.run.guard.rollbacks
            upto = known_lines(self.run, step)
            self.metrics = Metrics(self.run.folder, step, running, rollbacks=rollbacks, upto=upto)
        if self._started:
            self.speed.report()  # drops the time of the undone steps, as a kill would
        elif self.metrics is not None:
            self.run.files.delete("loss.png")
            self.speed.seconds_before = self.metrics.seconds
        self._started = True

    def after(self, step: int, metrics: Mapping[str, float]) -> None:
        self.speed.step()
        self.run.progress.update(step, metrics["loss"], self.speed.tokens_per_second)
        if step % self.train.log_every and step != self.train.steps:
            return
        assert self._pipeline is not None
        before, self._counters = self._counters, dict(self._pipeline.report())
        then, self._counted = self._counted, self.run.clock.now()
        line = {
            "step": step,
            "tokens": step * self.speed.tokens_per_step,
            "loss": metrics["mean_loss"],
            "accuracy": metrics["mean_accuracy"],
            "gradient_norm": metrics["gradient_norm"],
            "parameter_norm": metrics["parameter_norm"],
            "learning_rate": metrics["learning_rate"],
            **self.speed.report(),
            "retrieval": {
                **self._counters,
                **retrieval_shares(self._counters, before),
                **bank_speed(self._counters, before, self._counted - then),
            },
        }
        self.write(line)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line to the metrics (on process 0); `step` must be among its keys."""
        if self.metrics is not None:
            self.metrics.write(line)
            self.run.files.put_at_times(FILE, EVENTS)

    def sync(self) -> None:
        """Forces all lines to disk, and into a bucket."""
        if self.metrics is not None:
            self.metrics.sync()
            self.run.files.put(FILE, EVENTS)

    def finish(self) -> None:
        """Writes a line with the time by part since the previous line."""
        self.write({"step": self.train.steps, "time": self.run.clock.take()})
        self.sync()

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()


class Evaluation(Hook):
    """Evaluates every `train.evaluate_every` steps and at the end, and logs the result."""

    def __init__(self, run: Run, log: Log):
        super().__init__(run)
        self.log = log
        self.evaluate: Evaluate | None = None

    def read_from(self, data: StageData) -> None:
        self.evaluate = data.evaluate

    def due(self, step: int) -> bool:
        every, last = self.train.evaluate_every, step == self.train.steps
        return self.evaluate is not None and bool(last or (every and step % every == 0))

    def at(self, step: int, state: TrainState) -> None:
        assert self.evaluate is not None
        with self.run.clock.spent_on("evaluation"):
            values = {name: float(x) for name, x in self.evaluate(state.params).items()}
        self.log.write({"step": step, "evaluation": values})


class Save(Hook):
    """Saves every `train.checkpoint_every` steps and at the end; when told to stop, saves and ends.

    SIGTERM tells it, and SIGINT (Ctrl-C); a second SIGINT ends the process at once.

    The lines of `log` are forced to disk first, so that no checkpoint is ahead of the metrics.
    """

    def __init__(self, run: Run, log: Log):
        super().__init__(run)
        self.log, self._told = log, False  # told to stop
        self._previous: dict[int, Any] = {}  # handlers of signals

    def read_from(self, data: StageData) -> None:
        self.run.checkpoints.reads(data.writer, data.version, data.ingredients)

    def start(self, step: int) -> None:
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)
        # With several processes JAX's own service notes SIGTERM and agrees on a step.
        if jax.process_count() == 1:
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._told = True

    def due(self, step: int) -> bool:
        if jax.process_count() > 1:  # True only once; remembered across a rollback
            self._told = self._told or self.run.checkpoints.manager.reached_preemption(step)
        return self._told or step == self.train.steps or step % self.train.checkpoint_every == 0

    def at(self, step: int, state: TrainState) -> None:
        guard = self.run.guard
        with self.run.clock.spent_on("checkpoint"):
            self.log.sync()
            more = {} if guard is None else guard.meta()
            if self.log.metrics is not None:
                more |= {META: self.log.metrics.checksum}
            self.run.checkpoints.save(state, step, more)
        if self._told and step < self.train.steps:
            self.finish()
            self.run.say(
                f"told to stop; saved at step {step} of {self.train.steps}. The same command"
                " continues"
            )
            raise SystemExit(0)

    def finish(self) -> None:
        """Waits until the last checkpoint is written."""
        with self.run.clock.spent_on("checkpoint"):
            self.run.checkpoints.wait()

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Trace(Hook):
    """Traces this process from step `steps[0]` to `steps[1]`, for TensorBoard or XProf."""

    def __init__(self, run: Run, steps: tuple[int, int]):
        super().__init__(run)
        self._first, self._last = steps[0], min(steps[1], run.config.train.steps)
        self._running = False

    def before(self, step: int) -> None:
        """Starts the trace at its first step, or later if the run continues after that step."""
        if not self._running and self._first <= step <= self._last:
            jax.profiler.start_trace(str(self.run.folder / "profile"))
            self._running = True

    def due(self, step: int) -> bool:
        return self._running and step == self._last

    def at(self, step: int, state: TrainState) -> None:
        jax.block_until_ready(state)
        self.close()
        self.run.files.put("profile")
        self.run.say(f"trace in {self.run.files.place}/profile")

    def close(self) -> None:
        """Stops a running trace and writes it."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class RefreshBank(Hook):
    """Rewrites the bank with the run's own checkpoint, every `train.refresh_every` steps.

    `refresh(step)` writes the memories with the checkpoint of `step`, and returns the data that the
    loop reads from then on.
    """

    def __init__(self, run: Run, refresh: Callable[[int], StageData]):
        super().__init__(run)
        self.refresh = refresh

    def start(self, step: int) -> StageData | None:
        return self._read_anew(step) if step and self.due(step) else None

    def due(self, step: int) -> bool:
        return step % self.train.refresh_every == 0 and step < self.train.steps

    def at(self, step: int, state: TrainState) -> StageData:
        return self._read_anew(step)

    def _read_anew(self, step: int) -> StageData:
        with self.run.clock.spent_on("checkpoint"):
            self.run.checkpoints.wait()
            self.run.say(f"refreshing the bank at step {step}")
            return self.refresh(step)


def parse_steps(text: str) -> tuple[int, int]:
    """Parses `START:STOP`, the first and the last step of a trace.

    Raises:
      ConfigError: the text has another form, START is below 1, or STOP is before START.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(
            f"--profile_steps={text}: not START:STOP, the first and the last step to trace, counted"
            " from 1; for example 10:12 traces three steps"
        )
    return first, last
