"""The commands that train a sweep on a pod of TPUs (`launch/tpu_vm.sh`, docs/pod.md)."""

from __future__ import annotations

import runpy
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from m3jax.config import flatten
from m3jax.sweep.spec import Run, Stage, Sweep


def launch_lines(sweep: Sweep, runs: Sequence[Run], own: str) -> Iterator[str]:
    """Commands, one a line; what several entries share is there once.

    The first one makes data and folders, the last one measures what was trained; both run on a
    machine that sees the workdir. Banks are written and stages trained by all hosts of the slice.

    Args:
      sweep: the sweep.
      runs: of `plan`; entries that cannot work are left out.
      own: the call of `launch/sweep.py` without `--dry_run`.
    """
    yield f"{own} --prepare_only"
    banks: set[Path] = set()
    done: set[Path] = set()
    for run in runs:
        for stage in run.stages:
            if stage.folder in done:
                continue
            done.add(stage.folder)
            flags = _flags(sweep, run, stage)
            if stage.bank is not None and stage.bank not in banks:
                banks.add(stage.bank)
                assert stage.before is not None
                write = ["launch/write_bank.py", *flags, f"--workdir={stage.folder}"]
                write += [f"--checkpoint={stage.before.checkpoints}", f"--bank={stage.bank}"]
                yield _watched(f"bank-{stage.bank.name}", write)
            train = ["launch/train.py", *flags, f"--workdir={stage.folder}"]
            if stage.before is not None:
                train.append(f"--init_from={stage.before.checkpoints}")
            yield _watched(stage.folder.name, train)
    yield own


def _watched(name: str, command: list[str]) -> str:
    words = ["python", *command, "--distributed"]
    return f"bash launch/tpu_vm.sh watch --run={name} -- {shlex.join(words)}"


def _flags(sweep: Sweep, run: Run, stage: Stage) -> list[str]:
    """`--config=…` and the fields that differ from what that gives."""
    options = ",".join(part for part in (f"stage={stage.config.stage}", run.entry.options) if part)
    base = flatten(runpy.run_path(sweep.config)["get_config"](options))
    changed = {p: value for p, value in flatten(stage.config).items() if value != base[p]}
    named = [f"--config.{path}={value}" for path, value in changed.items()]
    return [f"--config={sweep.config}:{options}", *named]
