"""Runs the entries of a sweep one after another, each in a process of its own, and reports them.

A process that fails, crashes or runs out of RAM does not end the sweep. The process of a run writes
its figures; this process writes its error if it fails.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3jax.files import json_text, write_atomically, write_sealed
from m3jax.sweep.spec import SweepRun
from m3jax.workdir import only_writer

BEGIN, END = "<!-- sweep: begin -->", "<!-- sweep: end -->"

# Figure → heading, number format and factor.
COLUMNS = {
    "right_memory": ("right answers with memory", "{:.3f}", 1),
    "right_none": ("without", "{:.3f}", 1),
    "right_wrong": ("wrong memories", "{:.3f}", 1),
    "right_in_context": ("facts in the prompt", "{:.3f}", 1),
    "loss_memory": ("loss with memory", "{:.3f}", 1),
    "loss_none": ("without", "{:.3f}", 1),
    "memory_bytes": ("bytes a memory", "{:,.0f}", 1),
    "flops": ("training, TFLOP", "{:.2f}", 1e-12),
}
_SPREAD = ("right_memory", "loss_memory")  # figures shown with the range of the seeds

PATIENCE = 60.0  # seconds to wait for a process that was told to end, or whose parent ended
_STOPPED = (0, -signal.SIGTERM, -signal.SIGINT)  # exit codes of a process that was told to end


def run_all(
    runs: Sequence[SweepRun],
    workdir: Path,
    command: Callable[[SweepRun], Sequence[str]],
    *,
    retry: bool = False,
) -> None:
    """Executes the runs that have no result, in order; after a stop, the same call continues.

    Prints the outcome of each run, and updates the report after it.

    Args:
      runs: result of `plan_sweep`.
      workdir: workdir of the sweep; only one call at a time may work in it.
      command: returns the command line of a run, whose process writes the result (`run_entry`).
      retry: True to repeat failed runs.

    Raises:
      LockError: another call works in the workdir.
      SystemExit: the process of a run was told to stop.
    """
    for run in runs:
        if run.refused:
            print(f"{run.name}: refused: {run.refused}", flush=True)
    with only_writer(workdir, PATIENCE) as lock:
        for number, run in enumerate(runs, 1):
            outcome = run.outcome()
            if run.refused or (outcome is not None and not (retry and "error" in outcome)):
                continue
            print(f"[{number}/{len(runs)}] {run.name}", flush=True)
            started = time.monotonic()
            error = _run(run, command(run), lock)
            if error:
                write_sealed(run.result, {"key": run.key, "name": run.name, "error": error})
            told = f"failed: {error}" if error else _in_words((run.outcome() or {})["figures"])
            print(f"  {told} ({time.monotonic() - started:.0f} s)", flush=True)
            write_report(runs, workdir / "report")


def _run(run: SweepRun, command: Sequence[str], lock: int | None) -> str:
    """Executes the process of a run; returns its error message, or "" if it wrote its result."""
    log = run.result.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    run.result.unlink(missing_ok=True)  # result of another config, or an error
    with log.open("ab") as file:
        begin = file.tell()
        # Its stdin stays empty, and closes when this process ends (`end_with_parent`).
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            pass_fds=() if lock is None else (lock,),
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


def _in_words(figures: dict[str, Any]) -> str:
    named = {"right_memory": "right answers", "loss_memory": "loss", "loss_none": "loss without"}
    return ", ".join(f"{name} {figures[key]:.4f}" for key, name in named.items() if key in figures)


def end_with_parent() -> None:
    """Ends this process when its parent ends: by SIGTERM, which saves, and by force 30 s later."""

    def watch() -> None:
        os.read(0, 1)  # returns when the other end of the input is gone
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE / 2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# -- the report ------------------------------------------------------------------------------------
def collect(runs: Sequence[SweepRun]) -> list[dict[str, Any]]:
    """Returns name and group of every entry, and by seed its figures, its error, or neither."""
    entries: dict[str, dict[str, Any]] = {}
    for run in runs:
        entry = {"name": run.entry.name, "group": run.entry.group, "seeds": {}}
        outcome = run.outcome() or {}
        entries.setdefault(run.entry.name, entry)["seeds"][str(run.seed)] = {
            key: outcome[key] for key in ("figures", "error") if key in outcome
        }
    return list(entries.values())


def _figures(entry: Mapping[str, Any]) -> list[dict[str, float]]:
    return [seed["figures"] for seed in entry["seeds"].values() if "figures" in seed]


def as_json(runs: Sequence[SweepRun]) -> str:
    """Formats figures and errors of every entry and seed as stable JSON."""
    return json_text({"entries": collect(runs)}, indent=1, ensure_ascii=False) + "\n"


def sweep_table(runs: Sequence[SweepRun]) -> str:
    """Formats a Markdown table with one row per entry, by group: means over the finished seeds.

    Below the table it lists the failed runs with their errors, and the runs without a result.
    """
    entries = collect(runs)
    known = {key for entry in entries for row in _figures(entry) for key in row}
    columns = [key for key in COLUMNS if key in known]
    headings = " | ".join(["", *(COLUMNS[key][0] for key in columns), "seeds"])
    lines = [f"| {headings} |", "|---" * (len(columns) + 2) + "|"]
    group = ""
    for entry in entries:
        if entry["group"] and entry["group"] != group:
            lines.append(f"| **{entry['group']}** |" + " |" * (len(columns) + 1))
        group, rows = entry["group"], _figures(entry)
        finished = len(rows) or ("failed" if any(entry["seeds"].values()) else "not run")
        cells = [entry["name"], *(_cell(key, rows) for key in columns), str(finished)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_missing(entries)])


def _cell(key: str, rows: Sequence[Mapping[str, float]]) -> str:
    _, form, factor = COLUMNS[key]
    values = [row[key] * factor for row in rows if key in row]
    if not values:
        return "–"
    mean = form.format(sum(values) / len(values))
    if key not in _SPREAD or len(values) == 1:
        return mean
    return f"{mean} ({form.format(min(values))}…{form.format(max(values))})"


def _missing(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    failed: list[str] = []
    absent: dict[str, list[str]] = {}
    for entry in entries:
        for seed, outcome in entry["seeds"].items():
            if "error" in outcome:
                failed.append(f"* {entry['name']}, seed {seed}: {outcome['error']}")
            elif not outcome:
                absent.setdefault(seed, []).append(entry["name"])
    lines = ["", "Failed:", "", *failed] if failed else []
    for seed, names in sorted(absent.items(), key=lambda item: int(item[0])):
        every = "all entries" if len(names) == len(entries) else ", ".join(names)
        lines += ["", f"Not run with seed {seed}: {every}."]
    return lines


def write_report(runs: Sequence[SweepRun], folder: Path) -> None:
    """Writes `table.md` and `sweep.json` into a folder."""
    write_atomically(folder / "table.md", (sweep_table(runs) + "\n").encode())
    write_atomically(folder / "sweep.json", as_json(runs).encode())


def finish(
    runs: Sequence[SweepRun],
    folder: Path,
    markdown: str | Path | None = None,
    picture: str | Path | None = None,
) -> str:
    """Writes the report and its plot; returns the table and the report's folder as text.

    The table also replaces the marked part of the file `markdown`, the plot is copied to `picture`.
    """
    write_report(runs, folder)
    for path in [folder / "sweep.png", *([Path(picture)] if picture else [])]:
        draw(runs, path)
    if markdown:
        insert(Path(markdown), sweep_table(runs))
    return f"{sweep_table(runs)}\n\nreport: {folder}"


def draw(runs: Sequence[SweepRun], path: Path) -> None:
    """Plots one row per entry, with one dot per seed with memory and one without.

    The values are shares of right answers if questions were asked, else losses.
    """
    from m3jax.evaluation.plots import sweep_dots

    entries = [(entry, _figures(entry)) for entry in collect(runs) if _figures(entry)]
    answered = any("right_memory" in row for _, rows in entries for row in rows)
    kind, axis = ("right", "share of right answers") if answered else ("loss", "loss, nats a token")

    def values(rows: Sequence[Mapping[str, float]], mode: str) -> list[float]:
        return [row[f"{kind}_{mode}"] for row in rows if f"{kind}_{mode}" in row]

    lines = [
        (entry["group"], entry["name"], values(rows, "memory"), values(rows, "none"))
        for entry, rows in entries
    ]
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_dots(path, lines, axis)


def insert(path: Path, text: str) -> None:
    """Writes `text` between the marks of a Markdown file; a file without marks is overwritten."""
    old = path.read_text("utf-8") if path.exists() else ""
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        head, tail = "", "\n"
    write_atomically(path, f"{head}{BEGIN}\n{text}\n{END}{tail}".encode())
