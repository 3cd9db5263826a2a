"""Compiles the real train step, memory writer or generation for a TPU slice that is not attached.

    python launch/compile.py --config=configs/memory3.py --topology=v5e:16x16
    python launch/compile.py --config=configs/memory3.py:stage=continual,memories=online \\
        --topology=v5e:16x16 --json=online.json
    python launch/compile.py --config=configs/memory3.py --topology=v5p:4x4x4 --search
    python launch/compile.py --config=configs/memory3.py --paths=warmup,precomputed,online \\
        --topology=v5e:16x16,v6e:16x16 --search --fsdp=8 --markdown=table.md
    python launch/compile.py --config=configs/memory3.py:stage=continual \\
        --topology=v5e:16x16 --program=writer
    python launch/compile.py --config=configs/memory3.py:stage=continual \\
        --topology=v5e:2x4 --program=decode --rows=32 --context=128

Prints what a chip would hold against its memory, what crosses between chips, counted work and lower
bounds of a step's time. Of several slices and paths, each is compiled in turn. Needs libtpu
(pip install -e '.[tpu]'; Linux on x86-64), no TPU. Exit code 1: it does not fit, and what to
change; 2: a config or topology that cannot work.
"""

from __future__ import annotations

import itertools
import os

from absl.flags import FlagValues

from m3jax import cli, places
from m3jax.cli import Flag, count, counts, switch, words
from m3jax.files import json_text, write_atomically
from m3jax.hardware import LIBTPU_ENVIRONMENT, chip_of_topology
from m3jax.printable import complain

COMMANDS = cli.Commands()


@COMMANDS.add(
    cli.CONFIG,
    words("topology", "TPU slices, CHIP:SHAPE, for example v5e:16x16.", required=True),
    Flag(
        "program",
        "The train step, the encode of launch/write_bank.py, or the generation of a chunk with"
        " memories.",
        default="train",
        choices=("train", "writer", "decode"),
    ),
    count("rows", "--program=decode: rows on a device of mesh.data.", 32),
    Flag("context", "--program=decode: tokens of a prompt, whole chunks.", int, 128, low=64),
    Flag(
        "paths",
        "Train steps to compile; default: the config's.",
        default=[],
        choices=("warmup", "precomputed", "online"),
        many="comma",
    ),
    switch("search", "Try meshes and microbatches, and end with the best config flags."),
    counts("fsdp", "Sizes of mesh.fsdp that --search tries.", [8, 16, 32]),
    counts("microbatches", "Microbatches that --search tries, until one fits.", [1, 2, 4]),
    words("remat", "Values of model.remat that --search tries; default: the config's.", []),
    cli.JSON.with_help("A list where there are several reports."),
    Flag("markdown", "File to write a table to, a row for each path and slice.", places.NEW_FILE),
)
def main(given: FlagValues) -> None:
    """Compiles programs and prints their reports."""
    os.environ.update(JAX_PLATFORMS="cpu", **LIBTPU_ENVIRONMENT)  # before JAX is imported
    from m3jax.aot import compile as compiled
    from m3jax.aot.report import compile_table, compile_text, search_text

    chips = {topology: chip_of_topology(topology)[0] for topology in given.topology}
    paths = [compiled.on_path(given.config, path) for path in given.paths] or [given.config]
    reports, rows, failed = [], [], False
    for (topology, chip), path in itertools.product(chips.items(), paths):
        tried = []
        if given.search:
            remat = given.remat or [path.model.remat]
            sizes = given.fsdp, given.microbatches
            for report in compiled.search_meshes(path, topology, *sizes, remat):
                tried.append(report)
                print(compile_text(report), flush=True)
            print(search_text(tried), flush=True)
            chosen = compiled.best_report(tried) or tried[-1]
        else:
            chosen = compiled.compile_report(
                path, topology, given.program, given.rows, given.context
            )
            tried.append(chosen)
            print(compile_text(chosen), flush=True)
        reports += tried
        rows.append(chosen)
        if given.json:  # after each, so that what was compiled is not lost
            written = reports if given.search or len(chips) * len(paths) > 1 else chosen
            write_atomically(given.json, (json_text(written, indent=2) + "\n").encode())
        if given.markdown:
            write_atomically(given.markdown, (compile_table(rows) + "\n").encode())
        if not chosen["fits"]:
            failed = True
            complain(compiled.remedy(chosen, chip))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(__doc__, COMMANDS)
