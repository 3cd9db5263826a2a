"""The outcome of a stage, read from its metrics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from m3jax.checkpoint import FOLDER
from m3jax.train.guard import describe
from m3jax.train.metrics import describe_time, read_metrics, time_spent


class Summary(NamedTuple):
    """Outcome of a stage; `str` gives lines for people.

    Attributes:
      stage: its name.
      step: of the last checkpoint.
      checkpoint: folder of that.
      seconds: run time over all starts.
      loss, accuracy: of the last logged line.
      evaluation: numbers of the last evaluation, {} if there was none.
      time: see `m3jax.train.metrics.time_spent`.
      rollbacks: of the guard, see `m3jax.train.guard.read_rollbacks`.
    """

    stage: str
    step: int
    checkpoint: str
    seconds: float
    loss: float
    accuracy: float
    evaluation: dict[str, float]
    time: dict[str, float]
    rollbacks: list[dict[str, Any]]

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.stage}: loss {self.loss:.4f} after {self.step} steps",
                *(f"  {name}: {value:.4f}" for name, value in self.evaluation.items()),
                *(f"  {describe(rollback)}" for rollback in self.rollbacks),
                f"checkpoint: {self.checkpoint}",
                f"time: {describe_time(self.time)}",
            ]
        )


def summarize(config: ConfigDict, folder: Path) -> Summary:
    """Returns the summary of a finished stage.

    Args:
      config: of the stage.
      folder: the stage folder.
    """
    lines = read_metrics(folder)
    trained = [line for line in lines if "loss" in line][-1:]
    evaluated = [line["evaluation"] for line in lines if "evaluation" in line][-1:]
    return Summary(
        stage=config.stage,
        step=config.train.steps,
        checkpoint=str(folder / FOLDER / str(config.train.steps)),
        seconds=max((line.get("seconds", 0.0) for line in lines), default=0.0),
        loss=trained[0]["loss"] if trained else math.nan,
        accuracy=trained[0]["accuracy"] if trained else math.nan,
        evaluation=evaluated[0] if evaluated else {},
        time=time_spent(lines),
        rollbacks=[line["guard"] for line in lines if "guard" in line],
    )
