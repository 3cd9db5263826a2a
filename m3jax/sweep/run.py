"""Runs the entries of a sweep one after another, each in a process of its own, and reports them.

A process that fails, runs out of memory or crashes takes nothing else with it. Results are written
by the process of the entry, failures by this one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3jax.errors import SweepError
from m3jax.files import write_atomically, write_sealed
from m3jax.sweep.spec import SweepRun

BEGIN, END = "<!-- sweep: begin -->", "<!-- sweep: end -->"

# Figure → heading and form.
COLUMNS = {
    "right_memory": ("right answers with memory", "{:.3f}"),
    "right_none": ("without", "{:.3f}"),
    "right_wrong": ("wrong memories", "{:.3f}"),
    "right_in_context": ("facts in the prompt", "{:.3f}"),
    "loss_memory": ("loss with memory", "{:.3f}"),
    "loss_none": ("without", "{:.3f}"),
    "memory_bytes": ("bytes a memory", "{:,.0f}"),
    "flops": ("training, TFLOP", "{:.2f}"),
}
_SCALE = {"flops": 1e-12}
_SPREAD = ("right_memory", "loss_memory")  # figures shown with the range of the seeds

Outcomes = dict[str, dict[int, dict[str, Any] | None]]  # by entry and seed
_PATIENCE = 60.0  # seconds to wait for the end of a process that was told to end
_STOPPED = (0, -signal.SIGTERM, -signal.SIGINT)  # how one ends that was told to


def _say(line: str) -> None:
    print(line, flush=True)


def run_all(
    runs: Sequence[SweepRun],
    workdir: Path,
    command: Callable[[SweepRun], Sequence[str]],
    *,
    retry: bool = False,
    after: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = _say,
) -> None:
    """Runs what has no result yet, in order; stopped at any moment, the same call goes on.

    Args:
      runs: of `plan_sweep`.
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
            outcome = run.outcome()
            if run.refused or (outcome is not None and not (retry and "error" in outcome)):
                continue
            say(f"[{number}/{len(runs)}] {run.name}")
            started = time.monotonic()
            error = _run(run, command(run), lock)
            if error:
                write_sealed(run.result, {"key": run.key, "name": run.name, "error": error})
            said = f"failed: {error}" if error else _said((run.outcome() or {})["figures"])
            say(f"  {said} ({time.monotonic() - started:.0f} s)")
            after()


def _run(run: SweepRun, command: Sequence[str], lock: int) -> str:
    """Runs the process of an entry; returns its error, or ""."""
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
    if run.outcome() is not None:
        return ""
    if code in _STOPPED:
        raise SystemExit(f"{run.name}: told to stop; the same command goes on")
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = log.read_bytes()[begin:].decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else f"ended with code {code}, without a word"


def _said(figures: dict[str, Any]) -> str:
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


# -- the report


def collect(runs: Sequence[SweepRun]) -> Outcomes:
    """Returns the outcome of every run; None: not run yet."""
    outcomes: Outcomes = {}
    for run in runs:
        outcomes.setdefault(run.entry.name, {})[run.seed] = run.outcome()
    return outcomes


def as_json(runs: Sequence[SweepRun]) -> str:
    """Writes figures and errors of every entry and seed as stable JSON."""
    groups = {run.entry.name: run.entry.group for run in runs}
    entries = []
    for name, seeds in collect(runs).items():
        seeds_as_json = {
            str(seed): {k: v for k, v in (outcome or {}).items() if k in ("figures", "error")}
            for seed, outcome in seeds.items()
        }
        entries.append({"name": name, "group": groups[name], "seeds": seeds_as_json})
    return json.dumps({"entries": entries}, indent=1, ensure_ascii=False) + "\n"


def sweep_table(runs: Sequence[SweepRun]) -> str:
    """Makes a row for every entry, under the heading of its group: means over the finished seeds.

    Below it the runs that failed and why, and those that are missing.
    """
    outcomes = collect(runs)
    figures = {name: _figures(seeds) for name, seeds in outcomes.items()}
    known = {key for rows in figures.values() for row in rows for key in row}
    columns = [key for key in COLUMNS if key in known]
    lines = [
        "| " + " | ".join(["", *(COLUMNS[key][0] for key in columns), "seeds"]) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    group = ""
    for run in runs[: len(outcomes)]:
        entry = run.entry
        if entry.group and entry.group != group:
            lines.append(f"| **{entry.group}** |" + " |" * (len(columns) + 1))
        group = entry.group
        rows = figures[entry.name]
        cells = [_cell(key, rows) for key in columns]
        lines.append("| " + " | ".join([entry.name, *cells, _count(outcomes[entry.name])]) + " |")
    return "\n".join([*lines, *_missing(outcomes)])


def _figures(seeds: Mapping[int, Mapping[str, Any] | None]) -> list[dict[str, float]]:
    return [
        outcome["figures"]
        for outcome in seeds.values()
        if outcome is not None and "figures" in outcome
    ]


def _cell(key: str, rows: Sequence[Mapping[str, float]]) -> str:
    values = [row[key] * _SCALE.get(key, 1) for row in rows if key in row]
    form = COLUMNS[key][1]
    if not values:
        return "–"
    mean = form.format(sum(values) / len(values))
    if key not in _SPREAD or len(values) == 1:
        return mean
    return f"{mean} ({form.format(min(values))}…{form.format(max(values))})"


def _count(seeds: Mapping[int, Mapping[str, Any] | None]) -> str:
    """Number of finished seeds, or why there is none."""
    if _figures(seeds):
        return str(len(_figures(seeds)))
    return "failed" if any(seeds.values()) else "not run"


def _missing(outcomes: Outcomes) -> list[str]:
    failed = [
        f"* {name}, seed {seed}: {outcome['error']}"
        for name, seeds in outcomes.items()
        for seed, outcome in seeds.items()
        if outcome is not None and "error" in outcome
    ]
    absent: dict[int, list[str]] = {}
    for name, seeds in outcomes.items():
        for seed, outcome in seeds.items():
            if outcome is None:
                absent.setdefault(seed, []).append(name)
    lines = ["", "Failed:", "", *failed] if failed else []
    for seed, names in sorted(absent.items()):
        every = "all entries" if len(names) == len(outcomes) else ", ".join(names)
        lines += ["", f"Not run with seed {seed}: {every}."]
    return lines


def write_report(runs: Sequence[SweepRun], folder: Path) -> None:
    """Writes `table.md` and `sweep.json`."""
    write_atomically(folder / "table.md", (sweep_table(runs) + "\n").encode())
    write_atomically(folder / "sweep.json", as_json(runs).encode())


def finish(
    runs: Sequence[SweepRun], folder: Path, markdown: str | None = None, picture: str | None = None
) -> str:
    """Writes the report with its picture, and both to other files, too; returns the table."""
    write_report(runs, folder)
    for path in (folder / "sweep.png", *([Path(picture)] if picture else ())):
        draw(runs, path)
    if markdown:
        insert(Path(markdown), sweep_table(runs))
    return f"{sweep_table(runs)}\n\nreport: {folder}"


def draw(runs: Sequence[SweepRun], path: Path) -> None:
    """Draws a line of dots for every entry, a dot for every seed: with memory and without.

    Shares of right answers where questions were asked, else losses.
    """
    from m3jax.evaluation.plots import sweep_dots

    figures = {name: _figures(seeds) for name, seeds in collect(runs).items()}
    answered = any("right_memory" in row for rows in figures.values() for row in rows)
    kind, axis = ("right", "share of right answers") if answered else ("loss", "loss, nats a token")
    entries = {run.entry.name: run.entry for run in runs if figures[run.entry.name]}

    def values(name: str, mode: str) -> list[float]:
        key = f"{kind}_{mode}"
        return [row[key] for row in figures[name] if key in row]

    lines = [
        (entry.group, name, values(name, "memory"), values(name, "none"))
        for name, entry in entries.items()
    ]
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_dots(path, lines, axis)


def insert(path: Path, text: str) -> None:
    """Puts the table between the marks of a Markdown file, or makes the file of it."""
    old = path.read_text("utf-8") if path.exists() else ""
    if BEGIN in old and END in old:
        head, _, rest = old.partition(BEGIN)
        tail = rest.partition(END)[2]
        text = f"{head}{BEGIN}\n{text}\n{END}{tail}"
    else:
        text = f"{BEGIN}\n{text}\n{END}\n"
    write_atomically(path, text.encode())
