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
    turned: bool = False,
) -> tuple[float, ...]:
    """Median seconds of the first, of the second, and the median of their ratios round by round.

    Args:
      first, second: what is timed; each is called once before.
      rounds: how often each is timed.
      before: called before each of both, not timed.
      turned: whether the second is timed first in every other round (A B B A …), for differences
        below a per cent: being first is then nobody's advantage.
    """
    first(), second()  # compile and warm caches

    def seconds(call: Callable[[], Any]) -> float:
        if before is not None:
            before()
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    times = []
    for number in range(rounds):
        if turned and number % 2:
            times.append((seconds(second), seconds(first))[::-1])
        else:
            times.append((seconds(first), seconds(second)))
    ratio = statistics.median(a / b for a, b in times)
    medians = (statistics.median(column) for column in zip(*times, strict=True))
    return (*medians, ratio)
