"""Runs the entries of a sweep one after another, each in a process of its own.

A process that fails, runs out of memory or crashes takes nothing else with it. Results are written
by the process of the entry, failures by this one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from m3jax.errors import SweepError
from m3jax.files import read_sealed, write_sealed
from m3jax.sweep.spec import Run

_PATIENCE = 60.0  # seconds to wait for the end of a process that was told to end
_STOPPED = (0, -signal.SIGTERM, -signal.SIGINT)  # how one ends that was told to


def _say(line: str) -> None:
    print(line, flush=True)


def outcome(run: Run) -> dict[str, Any] | None:
    """What a run has come to: a dict with `figures`, or with `error`; None: it has to be run.

    A result of another config, or a damaged one, does not count.
    """
    if run.refused:
        return {"key": run.key, "name": run.name, "error": run.refused}
    found = read_sealed(run.result) if run.result.is_file() else None
    return found if found is not None and found.get("key") == run.key else None


def run_all(
    runs: Sequence[Run],
    workdir: Path,
    command: Callable[[Run], Sequence[str]],
    *,
    retry: bool = False,
    after: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = _say,
) -> None:
    """Runs what has no result yet, in order; stopped at any moment, the same call goes on.

    Args:
      runs: of `plan`.
      workdir: of the sweep; one call at a time works in it.
      command: the command of a run, which writes its result (`run_entry`).
      retry: whether runs that have failed are run again.
      after: called after each.
      say: gets a line for each.

    Raises:
      SweepError: another call works in the workdir.
      SystemExit: the process of a run was told to stop.
    """
    for run in runs:
        if run.refused:
            say(f"{run.name}: refused: {run.refused}")
    with alone(workdir) as lock:
        for number, run in enumerate(runs, 1):
            found = outcome(run)
            if run.refused or (found is not None and not (retry and "error" in found)):
                continue
            say(f"[{number}/{len(runs)}] {run.name}")
            started = time.monotonic()
            error = _run(run, command(run), lock)
            if error:
                write_sealed(run.result, {"key": run.key, "name": run.name, "error": error})
            found = outcome(run) or {}
            told = f"failed: {error}" if error else _told(found["figures"])
            say(f"  {told} ({time.monotonic() - started:.0f} s)")
            after()


def _run(run: Run, command: Sequence[str], lock: int) -> str:
    """Runs one; returns what went wrong, or nothing."""
    log = run.result.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    run.result.unlink(missing_ok=True)  # of another config, or failed
    with log.open("ab") as file:
        begin = file.tell()
        # Nothing is ever written to its input, which ends when this process does.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=file, pass_fds=(lock,)
        ) as process:
            code = process.wait()
    if outcome(run) is not None:
        return ""
    if code in _STOPPED:
        raise SystemExit(f"{run.name}: told to stop; the same command goes on")
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = log.read_bytes()[begin:].decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else f"ended with code {code}, without a word"


def _told(figures: dict[str, Any]) -> str:
    named = {"right_memory": "right answers", "loss_memory": "loss", "loss_none": "loss without"}
    return ", ".join(f"{name} {figures[key]:.4f}" for key, name in named.items() if key in figures)


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[int]:
    """Holds the lock of a sweep's workdir; child processes that get its descriptor hold it, too.

    Raises:
      SweepError: another process has it, and does not end.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(workdir / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise SweepError(
                        f"another process sweeps in {workdir}; wait for it, or use another"
                        " --workdir"
                    ) from None
                time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


def end_with_parent() -> None:
    """Lets this process end when the one that started it has: saved, by SIGTERM, or hard later."""

    def watch() -> None:
        os.read(0, 1)  # returns when the other end of the input is gone
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_PATIENCE / 2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
