"""Progress for people: a bar on a terminal, a line every now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Shows step, loss, speed and time left on stderr.

    Args:
      description: what runs.
      total: steps of the whole run.
      initial: steps done before.
      shown: false on all processes but the first.
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
                    f" {_facts(loss, tokens_per_second)}, {_duration(left)} left"
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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
