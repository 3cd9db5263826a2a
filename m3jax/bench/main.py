"""Table of the benchmarks, and the driver that runs their rounds, prints and saves the results."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

import m3jax
from m3jax.bench import bank_at_url, brought, inference, train
from m3jax.bench.bank import bank
from m3jax.bench.checkpoint import checkpoint
from m3jax.bench.edits import edits
from m3jax.bench.overlap import overlap
from m3jax.bench.quantizer import quantizer
from m3jax.bench.retrieval import retrieval
from m3jax.bench.rounds import Round, Rounds
from m3jax.files import json_text, write_atomically

_Result = dict[str, Any]
INTERRUPTED = 130  # exit code


class Benchmark(NamedTuple):
    """Benchmark: its generator of rounds, the default number of rounds, its arguments at the sizes
    `smallest` and `full`, and a function that plots its result."""

    rounds: Callable[..., Rounds]
    default: int
    smallest: Mapping[str, Any]
    full: Mapping[str, Any] = {}
    draw: Callable[[Path, _Result], None] | None = None


BENCHMARKS = {
    "train": Benchmark(train.train, 12, train.SMALLEST, train.FULL),
    "writer": Benchmark(train.writer, 3, train.SMALLEST),
    "overlap": Benchmark(overlap, 5, {"rows": 1}),
    "bank": Benchmark(bank, 9, {"memories": 160, "tiny_memories": 5000}),
    "checkpoint": Benchmark(checkpoint, 7, {"hidden": 32}),
    "edits": Benchmark(edits, 1, {"edits": 2, "documents": 40}),
    "quantizer": Benchmark(
        quantizer, 5, {"vectors": 1024, "tested": 256, "coarse_bits": 5, "fine_bits": 4}
    ),
    "retrieval": Benchmark(retrieval, 21, {"rows": 21_000, "dimension": 64}),
    "inference": Benchmark(
        inference.inference, 3, inference.SMALLEST, inference.FULL, inference.draw_speeds
    ),
}

# Of a brought model or bank: the same commands with a config and a workdir, or a URL.
BROUGHT = {
    "train": Benchmark(brought.train, 3, {"rows": 8, "references": 8}),
    "inference": Benchmark(
        brought.inference, 3, {"batch": 2, "tokens": 3}, draw=brought.draw_speeds
    ),
    "bank": Benchmark(bank_at_url.bank, 5, {"reads": 2, "memories": 16}),
}


def run(
    name: str,
    size: str = "default",
    *,
    count: int | None = None,
    minutes: float = 4.5,
    json: str | Path | None = None,
    picture: str | Path | None = None,
    **options: Any,
) -> int:
    """Runs rounds of a benchmark; prints the medians of its ratios after each round, and a table of
    all figures at the end.

    The first round, which compiles and warms caches, is not counted. Ctrl-C and SIGTERM end the
    benchmark; the rounds completed so far are kept.

    Args:
      name: key of `BENCHMARKS`.
      size: `smallest`, `default` or `full`.
      count: number of rounds; None: the benchmark's default.
      minutes: time limit. After the first counted round, a round starts only if it would end in
        time when it takes as long as the longest so far.
      json: file for the result, written after every round: medians by section and figure,
        `spread` ([least, largest] value over rounds), `rounds` (number `taken`, number planned
        `of`, and the reason why they `ended`) and `environment`.
      picture: PNG file for a plot of the result, for benchmarks that have one.
      options: arguments of the benchmark; None selects the default.

    Returns:
      The exit code: 0, or 130 if a signal ended the benchmark.
    """
    options = {key: value for key, value in options.items() if value is not None}
    benchmark = BENCHMARKS[name]
    if "config" in options or "bank" in options:
        benchmark = BROUGHT[name]
    sized = {"smallest": benchmark.smallest, "full": benchmark.full}.get(size, {})
    rounds, count = benchmark.rounds(**{**sized, **options}), count or benchmark.default
    taken: list[Round] = []
    begin, longest, ended, code = time.monotonic(), 0.0, "", 0

    def keep() -> _Result:
        result = _summary(taken, count, ended)
        if json is not None:
            write_atomically(json, f"{json_text(result, indent=2)}\n".encode())
        return result

    print(f"{name}: preparing, and a first round that does not count", flush=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(rounds))
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        stack.callback(signal.signal, signal.SIGTERM, handler)
        try:
            next(rounds)
            while not ended:
                start = time.monotonic()
                taken.append(next(rounds))
                now = time.monotonic()
                longest = max(longest, now - start)
                ratios = ", ".join(f"{k} {v:.4g}" for k, v in keep()["ratios"].items())
                print(f"round {len(taken)} of {count}, {now - begin:.0f} s: {ratios}", flush=True)
                if len(taken) == count:
                    ended = "the number of rounds"
                elif now + longest - begin > 60 * minutes:
                    ended = f"--minutes={minutes:g}"
        except KeyboardInterrupt:
            ended, code = "a signal", INTERRUPTED
    passed = time.monotonic() - begin
    print(f"{name}: {len(taken)} of {count} rounds in {passed:.0f} s, ended by {ended}", flush=True)
    if taken:
        result = keep()
        print(_table(result), flush=True)
        if picture is not None and benchmark.draw is not None:
            benchmark.draw(Path(picture), result)
    return code


def _summary(taken: list[Round], count: int, ended: str) -> _Result:
    """Makes the result that `run` writes, from the counted rounds."""

    def fold(of: Callable[[list[float]], Any]) -> dict[str, Any]:
        return {
            section: {figure: of([each[section][figure] for each in taken]) for figure in figures}
            for section, figures in taken[0].items()
        }

    return {
        **fold(statistics.median),
        "spread": fold(lambda values: [min(values), max(values)]),
        "rounds": {"taken": len(taken), "of": count, "ended": ended},
        "environment": {
            "m3jax": m3jax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
    }


def _table(result: _Result) -> str:
    """Formats the medians, and the least and largest values over the rounds, as a table."""
    lines = []
    for section, spread in result["spread"].items():
        lines.append(f"{section + ':':<42}    median   least – largest")
        for figure, (least, largest) in spread.items():
            span = f"   {least:.4g} – {largest:.4g}" if least < largest else ""
            lines.append(f"  {figure:<40}{result[section][figure]:>10.4g}{span}")
    return "\n".join([*lines, ", ".join(f"{k} {v}" for k, v in result["environment"].items())])
