"""Compiles the real train step, the memory writer or the decode for a TPU slice that is not there.

    python launch/compile.py --config=configs/memory3_2b.py --topology=v5e:16x16
    python launch/compile.py --config=configs/memory3_2b.py:stage=continual,memories=online \\
        --topology=v5e:16x16 --json=online.json
    python launch/compile.py --config=configs/memory3_2b.py --topology=v5p:4x4x4 --search
    python launch/compile.py --config=configs/memory3_2b.py --paths=warmup,precomputed,online \\
        --topology=v5e:16x16,v6e:16x16 --search --fsdp=8 --markdown=table.md
    python launch/compile.py --config=configs/memory3_2b.py:stage=continual \\
        --topology=v5e:16x16 --program=writer
    python launch/compile.py --config=configs/memory3_2b.py:stage=continual \\
        --topology=v5e:2x4 --program=decode --rows=32 --context=128

Prints what a chip would hold against its memory, what crosses between chips, counted work and lower
bounds of a step's time. Of several slices and paths, each is compiled in turn. Needs libtpu
(pip install -e '.[tpu]'; Linux on x86-64), no TPU. Exit code 1: it does not fit, and what to
change; 2: a config or topology that cannot work.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from m3jax import cli
from m3jax.config import validate

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_TOPOLOGY = flags.DEFINE_list(
    "topology", None, "TPU slices, CHIP:SHAPE, for example v5e:16x16, v5p:4x4x4, v6e:16x16."
)
_PROGRAM = flags.DEFINE_enum(
    "program",
    "train",
    ["train", "writer", "decode"],
    "The train step, the encode of launch/write_bank.py, or the decode of a chunk with memories.",
)
_ROWS = flags.DEFINE_integer(
    "rows", 32, "Rows on a device of mesh.data, with --program=decode.", lower_bound=1
)
_CONTEXT = flags.DEFINE_integer(
    "context", 128, "Tokens of a prompt, with --program=decode; whole chunks.", lower_bound=64
)
_PATHS = flags.DEFINE_list(
    "paths", [], "Train steps to compile, of warmup, precomputed, online; default: the config's."
)
_SEARCH = flags.DEFINE_bool(
    "search", False, "Try meshes and microbatches, and end with the best and its config flags."
)
_FSDP = flags.DEFINE_list("fsdp", ["8", "16", "32"], "Sizes of mesh.fsdp that --search tries.")
_MICROBATCHES = flags.DEFINE_list(
    "microbatches", ["1", "2", "4"], "Microbatches that --search tries, until one fits."
)
_REMAT = flags.DEFINE_list(
    "remat", [], "Values of model.remat that --search tries; default: the config's."
)
_JSON = flags.DEFINE_string(
    "json", None, "Write the report (a list where there are several) to this file."
)
_MARKDOWN = flags.DEFINE_string(
    "markdown", None, "Write a table, a row for each path and slice, to this file."
)

for _name in ("fsdp", "microbatches"):
    flags.register_validator(
        _name,
        lambda sizes: bool(sizes) and all(size.isdigit() and int(size) for size in sizes),
        "a list of numbers of at least 1, for example 8,16",
    )
flags.register_validator(
    "paths",
    lambda paths: set(paths) <= {"warmup", "precomputed", "online"},
    "a list of warmup, precomputed, online",
)


def main(argv: list[str]) -> None:
    """Compiles and prints."""
    config = validate(_CONFIG.value)  # before the slow imports

    from m3jax.aot import compile as compiled

    os.environ.update(compiled.ENVIRONMENT)
    from m3jax.aot.report import markdown, show, show_search
    from m3jax.hardware import chip_of_topology

    chips = {topology: chip_of_topology(topology)[0] for topology in _TOPOLOGY.value or []}
    paths = [compiled.on_path(config, path) for path in _PATHS.value or []] or [config]
    reports, rows, failed = [], [], False
    for (topology, chip), path in itertools.product(chips.items(), paths):
        if _SEARCH.value:
            fsdp, parts = ([int(x) for x in flag.value or []] for flag in (_FSDP, _MICROBATCHES))
            remat = _REMAT.value or [path.model.remat]
            tried = []
            for found in compiled.search(path, topology, fsdp, parts, remat):
                tried.append(found)
                print(show(found), flush=True)
            print(show_search(tried), flush=True)
            chosen = compiled.best(tried) or tried[-1]
        else:
            chosen = compiled.report(path, topology, _PROGRAM.value, _ROWS.value, _CONTEXT.value)
            tried = [chosen]
            print(show(chosen), flush=True)
        reports += tried
        rows.append(chosen)
        if _JSON.value:  # after each, so that what was compiled is not lost
            written = reports if _SEARCH.value or len(chips) * len(paths) > 1 else chosen
            Path(_JSON.value).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        if _MARKDOWN.value:
            Path(_MARKDOWN.value).write_text(markdown(rows) + "\n", encoding="utf-8")
        if not chosen["fits"]:
            failed = True
            print(compiled.remedy(chosen, chip), file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main, required=["config", "topology"])
