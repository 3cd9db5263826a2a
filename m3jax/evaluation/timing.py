"""Two things timed in turn in one process (A B A B …), and the median of their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

Figures = dict[str, float]


def paired(
    first: Callable[[], Any],
    second: Callable[[], Any],
    rounds: int,
    before: Callable[[], Any] | None = None,
) -> tuple[float, ...]:
    """Median seconds of the first, of the second, and the median of their ratios round by round.

    Args:
      first, second: what is timed; each is called once before.
      rounds: how often each is timed.
      before: called before each of both, not timed.
    """
    first(), second()  # compile and warm caches

    def seconds(call: Callable[[], Any]) -> float:
        if before is not None:
            before()
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    times = [(seconds(first), seconds(second)) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in times)
    medians = (statistics.median(column) for column in zip(*times, strict=True))
    return (*medians, ratio)
