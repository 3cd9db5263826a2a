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

import sys
from pathlib import Path

from absl.flags import FlagValues

from m3jax import cli, places
from m3jax.cli import Flag, switch, words

COMMANDS = cli.Commands()
SWEEP = (
    Flag("sweep", "Python file with get_sweep().", places.FILE, required=True),
    Flag("workdir", "Folder for all that it makes.", places.NEW_FOLDER, required=True),
    Flag(
        "data",
        "Workdir of launch/prepare.py, for sweeps that prepare no data of their own.",
        places.WORKDIR,
    ),
    words("entries", "Only these entries; default all."),
    words("seeds", "Only these seeds; default those of the sweep."),
)


@COMMANDS.add(
    *SWEEP,
    switch("retry", "Run entries that have failed again."),
    switch("dry_run", "Print the commands for a pod; do nothing."),
    switch("prepare_only", "Make data and folders, and train nothing."),
    switch("report_only", "Make table and picture of what is there."),
    Flag(
        "markdown",
        "File for the table, too: between its marks, where it has them.",
        places.NEW_FILE,
    ),
    cli.PICTURE,
    Flag("one", "ENTRY@SEED: the flag of the script's own processes, for a single entry."),
)
def main(given: FlagValues) -> None:
    """Plans the sweep, then prints, prepares, runs or reports it."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/, which is not installed
    from m3jax.errors import SweepError
    from m3jax.sweep.plan import launch_lines, plan_sweep
    from m3jax.sweep.run import PATIENCE, end_with_parent, finish, run_all
    from m3jax.sweep.spec import chosen, load_sweep
    from m3jax.workdir import only_writer

    sweep, workdir = load_sweep(given.sweep), given.workdir.absolute()
    runs = chosen(plan_sweep(sweep, workdir, given.data), given.entries, given.seeds)
    if given.one:
        end_with_parent()
        from m3jax.sweep.entry import run_entry

        run = next((run for run in runs if run.name == given.one), None)
        if run is None:
            raise SweepError(f"--one={given.one}: no such run; --dry_run lists all")
        run_entry(sweep, run)
        return
    if given.dry_run:
        print("\n".join(launch_lines(sweep, runs, " ".join(["python", *_call(given)]))))
        return
    if given.prepare_only:
        from m3jax.sweep.entry import prepare

        with only_writer(workdir, PATIENCE):
            for run in runs:
                prepare(sweep, run)
        return

    if not given.report_only:
        own = [sys.executable, *_call(given)]
        run_all(runs, workdir, lambda run: [*own, f"--one={run.name}"], retry=given.retry)
    print(finish(runs, workdir / "report", given.markdown, given.picture))
    if any("error" in (run.outcome() or {}) for run in runs):
        raise SystemExit(1)


def _call(given: FlagValues) -> list[str]:
    """Returns the command of this sweep, for its own processes."""
    values = cli.values_of(given, SWEEP)
    words = {k: ",".join(v) if isinstance(v, list) else v for k, v in values.items() if v}
    return [sys.argv[0], *(f"--{name}={value}" for name, value in words.items())]


if __name__ == "__main__":
    cli.run(__doc__, COMMANDS)
