"""A trace of some steps, for TensorBoard's profile page or XProf."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

from m3jax.errors import ConfigError

FOLDER = "profile"


def parse_steps(text: str) -> tuple[int, int]:
    """Parses `START:STOP`, the first and the last step of a trace.

    Raises:
      ConfigError: not of that form, or STOP before START.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(
            f"--profile_steps={text}: not START:STOP, the first and the last step to trace, counted"
            " from 1; for example 10:12 traces three steps"
        )
    return first, last


class Profile:
    """Traces the devices of this process while the steps `first … last` run.

    Args:
      steps: first and last step, None for no trace.
      total: steps of the stage.
      folder: the trace goes to `<folder>/profile`.

    Raises:
      ConfigError: the steps begin after the end of the stage.
    """

    def __init__(self, steps: tuple[int, int] | None, total: int, folder: Path):
        if steps is not None and steps[0] > total:
            raise ConfigError(
                f"--profile_steps={steps[0]}:{steps[1]} begins after the last step,"
                f" config.train.steps = {total}"
            )
        self.folder = folder / FOLDER
        self._first, self._last = (0, 0) if steps is None else (steps[0], min(steps[1], total))
        self._running = False

    def before(self, step: int) -> None:
        """Starts the trace when `step` is the first, also of a run that continues among them."""
        if not self._running and self._first <= step <= self._last:
            jax.profiler.start_trace(str(self.folder))
            self._running = True

    def after(self, step: int, results: Any) -> bool:
        """Ends the trace when `step` is the last; returns whether it did."""
        if not self._running or step < self._last:
            return False
        jax.block_until_ready(results)
        self.close()
        return True

    def close(self) -> None:
        """Ends a trace that runs; what it has is written."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
