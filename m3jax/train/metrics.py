"""Metrics of a stage: one JSON object a line in `metrics.jsonl`, and TensorBoard events."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from m3jax.text.files import write_atomically

FILE = "metrics.jsonl"


def read_metrics(stage_folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics, without a last line that was cut off by a kill."""
    path = Path(stage_folder) / FILE
    lines = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Metrics:
    """Writes the metrics of one run.

    Opening drops what an earlier process logged after the checkpoint that the run goes on from, so
    that no step is there twice.

    Args:
      stage_folder: folder of the stage.
      step: step of that checkpoint, 0 for a new run.

    Attributes:
      seconds: run time up to that step, summed over all processes of the run.
    """

    def __init__(self, stage_folder: str | Path, step: int):
        folder = Path(stage_folder)
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        text = "".join(_to_line(line) for line in kept)
        write_atomically(folder / FILE, text.encode())
        self.seconds: float = max((line.get("seconds", 0.0) for line in kept), default=0.0)
        self._file = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115 (closed in `close`)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line; `step` is among its keys. Numbers in it become TensorBoard scalars."""
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
