"""Functions that benchmarks share: alternating timing, ratios, import of optional peers."""

from __future__ import annotations

import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from typing import Any

from m3jax.printable import complain

Round = dict[str, dict[str, float]]  # section → figure → its value in a round
Rounds = Generator[Round, None, None]  # measures a round at every `next`


def timed(
    calls: Mapping[str, Callable[[], Any]],
    turns: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Times each call once per turn, in reverse order in every other turn (A B, B A, …); returns
    the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        for name in [*calls][:: -1 if turn % 2 else 1]:
            begin = clock()
            calls[name]()
            seconds[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def quotients(figures: Mapping[str, float], *names: str) -> dict[str, float]:
    """Returns the ratio of figures `A` and `B` for each name `A_over_B`; omits ratios of which a
    figure is missing."""
    parts = {name: name.split("_over_") for name in names}
    return {n: figures[a] / figures[b] for n, (a, b) in parts.items() if {a, b} <= figures.keys()}


def import_peer(ratios: str, *modules: str, extra: str = "parity") -> list[Any] | None:
    """Imports the modules of a library to compare with. If a module is missing, prints which ratios
    are left out and which extra to install, and returns None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [importlib.import_module(name) for name in modules]
    except ImportError as error:
        remedy = f"pip install -c constraints.txt -e '.[{extra}]'"
        complain(f"without {ratios}: {error.name} is not installed: {remedy}")
        return None
