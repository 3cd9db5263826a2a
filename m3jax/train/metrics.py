"""Metrics of a stage: one JSON object a line in `metrics.jsonl`, and TensorBoard events."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from m3jax.files import write_atomically

FILE = "metrics.jsonl"


def read_metrics(stage_folder: str | Path) -> list[dict[str, Any]]:
    """Reads the lines of a stage's metrics, without a last line that was cut off by a kill."""
    path = Path(stage_folder) / FILE
    lines = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def time_spent(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sums up the time of a run by part, over all its starts.

    Args:
      lines: of `read_metrics`.

    Returns:
      `goodput`, the share of the time since the first start that went into steps whose result was
      kept; `seconds` since the first start; of these the `step`, `data_wait`, `checkpoint`,
      `evaluation` and `start` seconds of the kept lines; and `lost`, the rest: steps that were
      repeated, and the time between the end of a process and the next start. {} before a line.
    """
    timed = [line for line in lines if "time" in line]
    if not timed:
        return {}
    spent: dict[str, float] = {}
    for line in timed:
        for part, seconds in line["time"].items():
            spent[part] = spent.get(part, 0.0) + seconds
    elapsed = timed[-1]["since_first_start"]
    lost = max(0.0, elapsed - sum(spent.values()))
    return {"goodput": timed[-1]["goodput"], "seconds": elapsed, **spent, "lost": lost}


def describe_time(spent: Mapping[str, float]) -> str:
    """Describes the result of `time_spent` in a sentence."""
    if not spent:
        return "not measured"
    total = max(1e-9, spent["seconds"])
    names = {
        "data_wait": "waiting for data",
        "checkpoint": "checkpoints",
        "evaluation": "evaluations",
        "start": "starts and compiling",
        "lost": "lost between starts",
    }
    parts = ", ".join(f"{spent[part] / total:.0%} {name}" for part, name in names.items())
    duration = datetime.timedelta(seconds=round(spent["seconds"]))
    return f"{duration} since the first start: {spent['goodput']:.0%} steps (goodput), {parts}"


def dropped_share(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Returns the share that leaked of the references retrieved between two reports.

    Returns:
      `dropped_share`, or {} where nothing was retrieved in between.
    """
    dropped, returned = (now.get(n, 0) - before.get(n, 0) for n in ("dropped", "returned"))
    return {"dropped_share": dropped / (dropped + returned)} if dropped + returned > 0 else {}


def hit_share(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Returns the share that was in the cache of the memories read between two reports.

    Returns:
      `cache_hit_share`, or {} where there is no cache or nothing was read.
    """
    hits, misses = (now.get(n, 0) - before.get(n, 0) for n in ("cache_hits", "cache_misses"))
    return {"cache_hit_share": hits / (hits + misses)} if hits + misses > 0 else {}


class Metrics:
    """Writes the metrics of one run.

    Opening drops what was logged after the checkpoint that the run goes on from, so that no step is
    there twice. The first line says when the run was first started. Each rollback of a guarded run
    has a line `{"step", "guard"}` behind those of the step that the run went back to.

    Args:
      stage_folder: folder of the stage.
      step: step of that checkpoint, 0 for a new run.
      running: seconds that this process has spent on the run before.
      now: the time, seconds since 1970.
      rollbacks: of `m3jax.train.guard.read_rollbacks`.

    Attributes:
      seconds: run time up to that step, summed over all processes of the run.
    """

    def __init__(
        self,
        stage_folder: str | Path,
        step: int,
        running: float = 0.0,
        now: Callable[[], float] = time.time,
        rollbacks: Sequence[Mapping[str, Any]] = (),
    ):
        folder = Path(stage_folder)
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        kept = _with_rollbacks([line for line in kept if "guard" not in line], rollbacks)
        if not any("started" in line for line in kept):
            kept.insert(0, {"step": 0, "started": now() - running})
        self._now = now
        self._started = next(line["started"] for line in kept if "started" in line)
        self._stepping = sum(line["time"]["step"] for line in kept if "time" in line)
        text = "".join(_to_line(line) for line in kept)
        write_atomically(folder / FILE, text.encode())
        self.seconds: float = max((line.get("seconds", 0.0) for line in kept), default=0.0)
        self._file = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115 (closed in `close`)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line; `step` is among its keys. Numbers in it become TensorBoard scalars.

        A line with `time`, seconds by part, gets `goodput` and `since_first_start` (`time_spent`).
        """
        if "time" in line:
            self._stepping += line["time"]["step"]
            elapsed = max(1e-9, self._now() - self._started)
            line = {**line, "goodput": self._stepping / elapsed, "since_first_start": elapsed}
        self._file.write(_to_line(line))
        self._file.flush()
        for name, value in _flatten("", line):
            if name != "step":
                self._events.add_scalar(name, value, int(line["step"]))

    def sync(self) -> None:
        """Makes all lines durable, as a checkpoint that follows will be."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._events.close()


def _with_rollbacks(
    lines: list[dict[str, Any]], rollbacks: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Adds the lines of the rollbacks: a rollback's place depends on no kill in between."""
    place = None
    for rollback in reversed(rollbacks):  # a later one may have gone back further
        place = rollback["to"] if place is None else min(place, rollback["to"])
        number = sum(line["step"] <= place for line in lines if "guard" not in line)
        lines = [*lines[:number], {"step": place, "guard": dict(rollback)}, *lines[number:]]
    return lines


def _to_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _flatten(prefix: str, tree: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Numbers of nested dicts under `a/b` names."""
    numbers = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            numbers += _flatten(f"{prefix}{key}/", value)
        elif isinstance(value, (int, float)):
            numbers.append((prefix + key, float(value)))
    return numbers
