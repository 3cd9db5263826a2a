r"""Chooses the references that are worth a memory: the expected drop of validation loss.

    python launch/select_references.py --config=configs/wiki_small.py:stage=continual \
        --workdir=runs/wiki --budget_bytes=100000000 --dry_run

For a sample of validation rows, the loss with and without the memory of each reference that they
find is measured with a checkpoint that reads memories; how often each is found is counted on
training rows, too. References with the most expected drop a byte are chosen within the budget, and
the choice is checked on validation rows of other documents, against all references and as many at
random. Without --dry_run a version of the knowledge holds the chosen ones alone: rollback of
launch/edit_bank.py goes back, compact frees the bytes of the others. Report, picture and the list
of the chosen are in WORKDIR/report/usefulness. A stopped measurement goes on with the same command.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from m3jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, made by launch/prepare.py.")
_BUDGET = flags.DEFINE_integer(
    "budget_bytes", None, "Bytes that the memories of the chosen references may have together."
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Stage folder, or checkpoints/STEP in it; default WORKDIR/<config.stage>."
)
_VERSION = flags.DEFINE_integer(
    "bank_version", None, "Version of the knowledge to choose from; default the current one."
)
_SAMPLE = flags.DEFINE_integer("sample", 256, "Validation rows in which drops are measured.")
_COUNT = flags.DEFINE_integer(
    "count",
    4096,
    "Training rows, at most, in which references are counted; 0 = validation rows alone.",
    lower_bound=0,
)
_CHECK = flags.DEFINE_integer("check", 256, "Validation rows on which the choice is checked.")
_DRAWS = flags.DEFINE_integer("draws", 3, "Random choices that it is compared with.", lower_bound=0)
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Make no version: report and list only.")
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file, too.")
cli.define_cache_flag()
flags.adopt_module_key_flags(cli)  # --help shows them


def main(argv: list[str]) -> None:
    """Prints a table, writes the report and makes the version."""
    cli.use_compilation_cache()
    from m3jax.config import validate
    from m3jax.files import write_atomically
    from m3jax.selection.report import table
    from m3jax.selection.select import Options, select_references

    report = select_references(
        validate(_CONFIG.value),
        str(_WORKDIR.value),
        int(str(_BUDGET.value)),
        checkpoint=_CHECKPOINT.value,
        version=_VERSION.value,
        options=Options(*(int(str(flag.value)) for flag in (_SAMPLE, _COUNT, _CHECK, _DRAWS))),
        dry_run=bool(_DRY_RUN.value),
    )
    print(table(report))
    if "new_version" in report:
        print(f"version {report['new_version']} of the knowledge is current")
    if _JSON.value:
        write_atomically(Path(_JSON.value), (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir", "budget_bytes"])
