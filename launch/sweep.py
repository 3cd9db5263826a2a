"""Trains variants of a config one after another, and makes one table of them.

    python launch/sweep.py --sweep=configs/sweeps/quickstart.py --workdir=runs/sweep
    python launch/sweep.py --sweep=configs/sweeps/quickstart.py --workdir=runs/sweep \\
        --entries=baseline,kept-4 --seeds=0
    python launch/sweep.py --sweep=configs/sweeps/shapes.py --workdir=/mnt/m3/sweep \\
        --data=/mnt/m3/run --dry_run

A sweep is a Python file that says what differs (configs/sweeps/, docs/ablations.md). Entries share
what is equal in them: a warmup, a bank. Stopped at any moment, the same command goes on; what is
finished is not done again, and what was changed in the file is. An entry that cannot work is named
before anything is trained; one that fails leaves the others alone, and the table says so.

Table (Markdown, JSON) and picture are in WORKDIR/report, figures and logs of the entries in
WORKDIR/results. The code is 1 where an entry has failed. --dry_run prints the commands of
launch/tpu_vm.sh that train the same on a pod; afterwards the same call measures it.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from absl import flags

from m3jax import cli

_SWEEP = flags.DEFINE_string("sweep", None, "Python file with get_sweep().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for all that it makes.")
_DATA = flags.DEFINE_string(
    "data", None, "Workdir of launch/prepare.py, for sweeps that prepare no data of their own."
)
_ENTRIES = flags.DEFINE_list("entries", None, "Only these entries; default all.")
_SEEDS = flags.DEFINE_list("seeds", None, "Only these seeds; default those of the sweep.")
_RETRY = flags.DEFINE_bool("retry", False, "Run entries that have failed again.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands for a pod; do nothing.")
_PREPARE = flags.DEFINE_bool("prepare_only", False, "Make data and folders, and train nothing.")
_REPORT = flags.DEFINE_bool("report_only", False, "Make table and picture of what is there.")
_MARKDOWN = flags.DEFINE_string(
    "markdown", None, "Write the table to this file, too: between its marks, where it has them."
)
_PICTURE = flags.DEFINE_string("picture", None, "Write the picture to this PNG, too.")
_ONE = flags.DEFINE_string("one", None, "ENTRY@SEED: what the command calls itself with.")


def main(argv: list[str]) -> None:
    """Plans the sweep and does what the flags say."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/, which is not installed
    from m3jax.sweep import pod as sweep_pod
    from m3jax.sweep import report as sweep_report
    from m3jax.sweep import run as sweep_loop
    from m3jax.sweep.plan import plan
    from m3jax.sweep.spec import Run, chosen, load_sweep

    sweep, workdir = load_sweep(str(_SWEEP.value)), Path(str(_WORKDIR.value)).absolute()
    runs = chosen(plan(sweep, workdir, _DATA.value), _ENTRIES.value, _SEEDS.value)
    if _ONE.value:
        sweep_loop.end_with_parent()
        from m3jax.sweep.entry import run_entry

        run_entry(sweep, next(run for run in runs if run.name == _ONE.value))
        return
    if _DRY_RUN.value:
        for line in sweep_pod.launch_lines(sweep, runs, " ".join(["python", *_call()])):
            print(line)
        return
    if _PREPARE.value:
        from m3jax.sweep.entry import prepare

        with sweep_loop.alone(workdir):
            for run in runs:
                prepare(sweep, run)
        return

    def command(run: Run) -> list[str]:
        return [sys.executable, *_call(), f"--one={run.name}"]

    if not _REPORT.value:
        report = functools.partial(sweep_report.write_report, runs, workdir / "report")
        sweep_loop.run_all(runs, workdir, command, retry=_RETRY.value, after=report)
    print(sweep_report.finish(runs, workdir / "report", _MARKDOWN.value, _PICTURE.value))
    if any("error" in (sweep_loop.outcome(run) or {}) for run in runs):
        raise SystemExit(1)


def _call() -> list[str]:
    """This script with the flags that say what the sweep is."""
    given = {flag.name: flag.value for flag in (_SWEEP, _WORKDIR, _DATA) if flag.value}
    given |= {flag.name: ",".join(flag.value) for flag in (_ENTRIES, _SEEDS) if flag.value}
    return [sys.argv[0], *(f"--{name}={value}" for name, value in given.items())]


if __name__ == "__main__":
    cli.run(main, required=["sweep", "workdir"])
