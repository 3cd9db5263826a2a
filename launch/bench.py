"""Runs a benchmark and writes its ratios.

    python launch/bench.py train --json=train.json
    python launch/bench.py writer
    python launch/bench.py overlap --workdir=runs/wiki
    python launch/bench.py quantizer --workdir=runs/wiki --vectors=640000
    python launch/bench.py retrieval
    python launch/bench.py inference --batch=8 --picture=speed.png

A ratio is the median over rounds of two things timed in turn in one process, so that it holds on a
machine whose speed drifts.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

from absl import app, flags

from m3jax import cli

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of a run whose text (overlap) or bank (quantizer) is used instead of made data.",
)
_VECTORS = flags.DEFINE_integer(
    "vectors", None, "Vectors that quantizer trains on; default 65536.", lower_bound=1
)
_BATCH = flags.DEFINE_integer(
    "batch", None, "Rows that inference generates together; default 16.", lower_bound=1
)
_PICTURE = flags.DEFINE_string("picture", None, "PNG of the speeds that inference measured.")
_JSON = flags.DEFINE_string("json", None, "Write ratios, seconds and environment to this file.")


def main(argv: list[str]) -> None:
    """Runs the benchmark named on the command line."""
    from m3jax.bench.main import BENCHMARKS, environment

    if len(argv) != 2 or argv[1] not in BENCHMARKS:
        print(f"usage: bench.py NAME; NAME is one of {', '.join(BENCHMARKS)}", file=sys.stderr)
        raise SystemExit(2)
    benchmark = BENCHMARKS[argv[1]]
    given = {
        "workdir": _WORKDIR.value,
        "vectors": _VECTORS.value,
        "batch": _BATCH.value,
        "picture": _PICTURE.value,
    }
    options = {name: value for name, value in given.items() if value is not None}
    for name in options.keys() - inspect.signature(benchmark).parameters.keys():
        print(f"--{name}: {argv[1]} does not take it; leave it out", file=sys.stderr)
        raise SystemExit(2)
    try:
        figures = benchmark(**options)
    except ValueError as error:
        raise SystemExit(cli.show_error(error)) from None
    result = {**figures, "environment": environment()}
    text = json.dumps(result, indent=2)
    print(text)
    if _JSON.value:
        Path(_JSON.value).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
