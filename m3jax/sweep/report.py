"""What a sweep has found: a table in Markdown, the same as JSON, and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m3jax.files import write_atomically
from m3jax.sweep.run import outcome
from m3jax.sweep.spec import Run

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

Found = dict[str, dict[int, dict[str, Any] | None]]  # entry → seed → outcome


def collect(runs: Sequence[Run]) -> Found:
    """What is known of every run; None: not run yet."""
    found: Found = {}
    for run in runs:
        found.setdefault(run.entry.name, {})[run.seed] = outcome(run)
    return found


def as_json(runs: Sequence[Run]) -> str:
    """Figures and errors of every entry and seed, readable and stable."""
    groups = {run.entry.name: run.entry.group for run in runs}
    entries = []
    for name, seeds in collect(runs).items():
        told = {
            str(seed): {k: v for k, v in (one or {}).items() if k in ("figures", "error")}
            for seed, one in seeds.items()
        }
        entries.append({"name": name, "group": groups[name], "seeds": told})
    return json.dumps({"entries": entries}, indent=1, ensure_ascii=False) + "\n"


def table(runs: Sequence[Run]) -> str:
    """A row for every entry, under the heading of its group; a mean over the seeds that are there.

    Below it the runs that failed and why, and those that are missing.
    """
    found = collect(runs)
    figures = {name: _figures(seeds) for name, seeds in found.items()}
    known = {key for rows in figures.values() for row in rows for key in row}
    columns = [key for key in COLUMNS if key in known]
    lines = [
        "| " + " | ".join(["", *(COLUMNS[key][0] for key in columns), "seeds"]) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    group = ""
    for run in runs[: len(found)]:
        entry = run.entry
        if entry.group and entry.group != group:
            lines.append(f"| **{entry.group}** |" + " |" * (len(columns) + 1))
        group = entry.group
        rows = figures[entry.name]
        cells = [_cell(key, rows) for key in columns]
        lines.append("| " + " | ".join([entry.name, *cells, _count(found[entry.name])]) + " |")
    return "\n".join([*lines, *_missing(found)])


def _figures(seeds: Mapping[int, Mapping[str, Any] | None]) -> list[dict[str, float]]:
    return [one["figures"] for one in seeds.values() if one is not None and "figures" in one]


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
    """How many seeds are there; why there is none."""
    if _figures(seeds):
        return str(len(_figures(seeds)))
    return "failed" if any(seeds.values()) else "not run"


def _missing(found: Found) -> list[str]:
    failed = [
        f"* {name}, seed {seed}: {one['error']}"
        for name, seeds in found.items()
        for seed, one in seeds.items()
        if one is not None and "error" in one
    ]
    absent: dict[int, list[str]] = {}
    for name, seeds in found.items():
        for seed, one in seeds.items():
            if one is None:
                absent.setdefault(seed, []).append(name)
    lines = ["", "Failed:", "", *failed] if failed else []
    for seed, names in sorted(absent.items()):
        every = "all entries" if len(names) == len(found) else ", ".join(names)
        lines += ["", f"Not run with seed {seed}: {every}."]
    return lines


def write_report(runs: Sequence[Run], folder: Path) -> None:
    """`table.md` and `sweep.json`."""
    write_atomically(folder / "table.md", (table(runs) + "\n").encode())
    write_atomically(folder / "sweep.json", as_json(runs).encode())


def finish(
    runs: Sequence[Run], folder: Path, markdown: str | None = None, picture: str | None = None
) -> str:
    """Writes the report with its picture, and both to other files, too; returns the table."""
    write_report(runs, folder)
    for path in (folder / "sweep.png", *([Path(picture)] if picture else ())):
        draw(runs, path)
    if markdown:
        insert(Path(markdown), table(runs))
    return f"{table(runs)}\n\nreport: {folder}"


def draw(runs: Sequence[Run], path: Path) -> None:
    """One line of dots an entry, a dot a seed: with memory and without; nothing if there is none.

    Shares of right answers where questions were asked, else losses.
    """
    from m3jax.evaluation.plots import sweep_dots

    figures = {name: _figures(seeds) for name, seeds in collect(runs).items()}
    asked = any("right_memory" in row for rows in figures.values() for row in rows)
    kind, axis = ("right", "share of right answers") if asked else ("loss", "loss, nats a token")
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
