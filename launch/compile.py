"""Compiles the real train step, or the memory writer, for a TPU slice that is not there.

    python launch/compile.py --config=configs/memory3_2b.py --topology=v5e:16x16
    python launch/compile.py --config=configs/memory3_2b.py:stage=continual,memories=online \\
        --topology=v5e:16x16 --json=online.json
    python launch/compile.py --config=configs/memory3_2b.py --topology=v5p:4x4x4 --search
    python launch/compile.py --config=configs/memory3_2b.py:stage=continual \\
        --topology=v5e:16x16 --program=writer

Prints what a chip would hold against its memory, what crosses between chips, counted work and lower
bounds of a step's time. Needs libtpu (pip install -e '.[tpu]'; Linux on x86-64), no TPU. Exit code
1: it does not fit, and what to change; 2: a config or topology that cannot work.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from m3jax import launching
from m3jax.config import validate

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU slice, CHIP:SHAPE, for example v5e:16x16, v5p:4x4x4, v6e:16x16."
)
_PROGRAM = flags.DEFINE_enum(
    "program",
    "train",
    ["train", "writer"],
    "The train step, or the encode of launch/write_bank.py.",
)
_SEARCH = flags.DEFINE_bool(
    "search", False, "Try meshes and microbatches, and end with the best and its config flags."
)
_FSDP = flags.DEFINE_list("fsdp", ["8", "16", "32"], "Sizes of mesh.fsdp that --search tries.")
_MICROBATCHES = flags.DEFINE_list(
    "microbatches", ["1", "2", "4"], "Microbatches that --search tries, until one fits."
)
_JSON = flags.DEFINE_string("json", None, "Write the report (with --search a list) to this file.")


def main(argv: list[str]) -> None:
    """Compiles and prints."""
    config = validate(_CONFIG.value)  # before the slow imports

    from m3jax.evaluation import compiled

    os.environ.update(compiled.ENVIRONMENT)
    from m3jax.evaluation.compile_report import show, show_search
    from m3jax.hardware import chip_of_topology

    topology = str(_TOPOLOGY.value)
    chip, _ = chip_of_topology(topology)
    if _SEARCH.value:
        reports = []
        sizes = [[int(size) for size in flag.value] for flag in (_FSDP, _MICROBATCHES)]
        for found in compiled.search(config, topology, *sizes):
            reports.append(found)
            print(show(found), flush=True)
        print(show_search(reports))
        chosen = compiled.best(reports)
    else:
        chosen = compiled.report(config, topology, _PROGRAM.value)
        reports = [chosen]
        print(show(chosen))
    if _JSON.value:
        text = json.dumps(reports if _SEARCH.value else chosen, indent=2) + "\n"
        Path(_JSON.value).write_text(text, encoding="utf-8")
    if chosen is None or not chosen["fits"]:
        print(compiled.remedy(reports[-1], chip), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    launching.run(main, required=["config", "topology"])
