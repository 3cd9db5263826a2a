"""Measures the time of a run by part (steps, data, checkpoints, …), its speed and its progress."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax import flops
from m3jax.hardware import chip_of_kind

# `start` is the time until the first step is done: opening, restoring, compiling.
PARTS = ("step", "data_wait", "checkpoint", "evaluation", "start")

SECONDS_BETWEEN_LINES = 15.0

Now = Callable[[], float]


class RunClock:
    """Attributes every second of a process to one of `PARTS`.

    Time outside `spent_on` counts as `start` until `begin` is called, and as `step` from then on.
    """

    def __init__(self, now: Now = time.monotonic):
        self.now = now
        self.born = self._since = now()
        self._part = "start"
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def begin(self) -> None:
        """Ends the part `start`, when the first step is done."""
        self._switch("step")

    @contextlib.contextmanager
    def spent_on(self, part: str) -> Iterator[None]:
        """Counts the time of the block as `part`, except for nested `spent_on` blocks."""
        before = self._part
        self._switch(part)
        try:
            yield
        finally:
            self._switch(before)

    @contextlib.contextmanager
    def waiting(self, idle_since: Callable[[], float | None]) -> Iterator[None]:
        """Counts the time of the block during which the device is idle as `data_wait`.

        Args:
          idle_since: returns the time, on this clock, at which the device became idle; None while
            it computes.
        """
        start = self.now()
        yield
        end, idle = self.now(), idle_since()
        if self._part == "step" and idle is not None:
            self._switch("step")
            lost = max(0.0, end - max(start, idle))
            self._seconds["step"] -= lost
            self._seconds["data_wait"] += lost

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of every part since the last `take`."""
        self._switch(self._part)
        return dict(self._seconds)

    def take(self) -> dict[str, float]:
        """Returns `seconds()` and resets them to 0."""
        seconds = self.seconds()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return seconds

    def _switch(self, part: str) -> None:
        now = self.now()
        self._seconds[self._part] += now - self._since
        self._since, self._part = now, part


class Device:
    """Records the time at which the device finishes the last work that it was given."""

    def __init__(self, now: Now = time.monotonic):
        self._now = now
        self._given: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._count = 0
        self._done = (0, now())  # count of finished work, and when it was finished
        self._thread = threading.Thread(target=self._run, name="m3jax-device", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._given.get()) is not None:
            count, arrays = work
            # The error of a failed step is raised in the loop, when it fetches the metrics.
            with contextlib.suppress(Exception):
                jax.block_until_ready(arrays)
            self._done = (count, self._now())

    def give(self, arrays: Any) -> None:
        """Registers the result arrays of work that has been started."""
        self._count += 1
        self._given.put((self._count, arrays))

    def idle_since(self) -> float | None:
        """Returns the time at which the last work was finished, None while it runs."""
        count, when = self._done
        return when if count == self._count else None

    def close(self) -> None:
        self._given.put(None)


class Speed:
    """Measures the training speed since the last report, without compiling and evaluations.

    Attributes:
      tokens_per_step: tokens of the global batch.
      tokens_per_second: since the last report; None before the second step.
      seconds_before: run time of earlier processes of the run, in seconds.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, clock: RunClock):
        self.clock = clock
        self.tokens_per_step = config.data.batch_size * config.data.sequence_length
        self.seconds_before = 0.0
        self.tokens_per_second: float | None = None
        self._flops = flops.train_step(config)
        chip = chip_of_kind(mesh.devices.flat[0].device_kind)
        self._peak = None if chip is None else chip.flops * mesh.size
        self._steps: int | None = None  # None until the first step, which compiles, is done

    def step(self) -> None:
        """Counts a finished step; the first one, which compiles, only ends the clock's `start`."""
        if self._steps is None:
            self._steps = 0
            self.clock.begin()
            return
        self._steps += 1
        elapsed = _training(self.clock.seconds())
        self.tokens_per_second = self._steps * self.tokens_per_step / elapsed

    def report(self) -> dict[str, Any]:
        """Returns the speed and the seconds by part (`time`) since the last report.

        `seconds` is the run time summed over all starts. On a chip of unknown peak FLOP/s the
        report holds `flops_per_second` instead of `mfu`.
        """
        spent = self.clock.take()
        report: dict[str, Any] = {}
        if self._steps:
            elapsed = _training(spent)
            reached = self._steps * self._flops / elapsed
            report["tokens_per_second"] = self._steps * self.tokens_per_step / elapsed
            if self._peak is None:
                report["flops_per_second"] = reached
            else:
                report["mfu"] = reached / self._peak
            report["data_wait_share"] = spent["data_wait"] / elapsed
            self._steps = 0
        report["seconds"] = self.seconds_before + self.clock.now() - self.clock.born
        report["time"] = spent
        return report


def _training(spent: dict[str, float]) -> float:
    return max(1e-9, spent["step"] + spent["data_wait"] + spent["checkpoint"])


class Progress:
    """Shows step, loss, speed and time left on stderr.

    Args:
      description: name of the run.
      total: steps of the whole run.
      initial: steps done before.
      shown: False on all processes but the first.
    """

    def __init__(self, description: str, total: int, initial: int = 0, shown: bool = True):
        self._description, self._total, self._shown = description, total, shown
        self._first, self._start = initial, time.monotonic()
        self._last_line = self._start - SECONDS_BETWEEN_LINES  # the first line comes at once
        self._bar = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=initial, desc=description, unit="step", dynamic_ncols=True
            )

    def update(self, step: int, loss: float, tokens_per_second: float | None = None) -> None:
        """Shows that `step` is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(_facts(loss, tokens_per_second), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._shown:
            now = time.monotonic()
            if now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._total:
                self._last_line = now
                left = (now - self._start) / max(1, step - self._first) * (self._total - step)
                self.message(
                    f"{self._description}: step {step}/{self._total},"
                    f" {_facts(loss, tokens_per_second)}, {tqdm.format_interval(left)} left"
                )

    def message(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._shown:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _facts(loss: float, tokens_per_second: float | None) -> str:
    facts = f"loss {loss:.3f}"
    return facts if tokens_per_second is None else f"{facts}, {tokens_per_second:,.0f} tokens/s"
