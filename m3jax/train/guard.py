"""The stability guard: a run that goes wrong goes back, and on with less learning rate.

`guard.json` in the stage folder lists every rollback. It is written, whole, before anything else
happens, and all that follows is a function of it and of the checkpoints: which of them belong to a
branch that was left, the learning rate, which batches are left out. So a run that is killed between
noticing trouble and going back does, when it is started again, what it would have done.

Every process reads the same metrics and takes the same decision; the first one writes it down.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from ml_collections import ConfigDict

from m3jax.distributed import meet
from m3jax.errors import CheckpointError, ConfigError, DivergenceError
from m3jax.files import write_atomically
from m3jax.train.checkpoints import Checkpoints, kept
from m3jax.train.monitor import Monitor, Trouble

FILE = "guard.json"
META = "guard"  # what a checkpoint's `meta` calls it
_SHOWN = 256  # most losses of a branch that a rollback keeps for pictures

Rollback = dict[str, Any]
Item = TypeVar("Item")


def read_rollbacks(stage_folder: str | Path) -> list[Rollback]:
    """Reads the rollbacks of a stage so far, oldest first.

    Each has `reason`, `words`, `first`, `last` and `seen` of a `Trouble`; `to`, the step that the
    run went back to; `skipped`, the first and the last-plus-one batch, from 0, that were left out;
    `learning_rate_scale` from then on; and `losses`, `[step, loss]` of the steps that were undone
    (null where the loss was no finite number).

    Raises:
      CheckpointError: the file is damaged.
    """
    path = Path(stage_folder) / FILE
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text("utf-8"))["rollbacks"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error!r}): without it the run cannot go on as it would have."
            " Restore the file, or delete the stage folder and start again"
        ) from error


class Guard:
    """Watches one run.

    Args:
      config: a validated config with `guard.on`.
      stage_folder: folder of the stage.

    Attributes:
      rollbacks: so far, see `read_rollbacks`.
      trouble: what was noticed and not answered yet, or None.
    """

    def __init__(self, config: ConfigDict, stage_folder: Path):
        self.config, self.folder = config, stage_folder
        self.rollbacks = read_rollbacks(stage_folder)
        self.trouble: Trouble | None = None
        self._monitor = Monitor(config, {})

    @staticmethod
    def of(config: ConfigDict, stage_folder: Path) -> Guard | None:
        """Returns the guard of a run, None where the config has none.

        Raises:
          ConfigError: the run went back before, and is to go on without a guard.
        """
        if config.guard.on:
            return Guard(config, stage_folder)
        if read_rollbacks(stage_folder):
            raise ConfigError(
                f"config.guard.on = False, but this run has gone back before ({stage_folder / FILE}"
                " says which batches are left out and what the learning rate is); set it to True"
            )
        return None

    # -- while training runs
    def observe(self, step: int, loss: float, gradient_norm: float) -> None:
        """Notes a step; `trouble` says whether something is wrong."""
        self.trouble = self._monitor.observe(step, loss, gradient_norm)

    def meta(self) -> dict[str, Any]:
        """Returns the part of a checkpoint's `meta` that is the guard's."""
        return {META: {"rollbacks": len(self.rollbacks), "monitor": self._monitor.state()}}

    @property
    def scale(self) -> float:
        """Returns the factor on the learning rate."""
        return float(self.rollbacks[-1]["learning_rate_scale"]) if self.rollbacks else 1.0

    def first_batch(self, done: int) -> int:
        """Returns the number, from 0, of the batch of the step after `done` steps."""
        return batch_number(done, self._skipped())

    def without_skipped(self, batches: Iterable[Item], first: int) -> Iterator[Item]:
        """Yields batches, the first of which is number `first`, without the skipped ones."""
        skipped = self._skipped()
        for number, batch in enumerate(batches, first):
            if not any(low <= number < high for low, high in skipped):
                yield batch

    # -- going back
    def resume(self, checkpoints: Checkpoints) -> int:
        """Deletes checkpoints of branches that were left, and remembers what the newest one knows.

        Returns:
          The step to go on from.
        """
        checkpoints.delete(set(checkpoints.steps()) - kept(checkpoints.steps(), self.config))
        self.trouble = None
        for step in reversed(checkpoints.steps()):
            saved = checkpoints.meta(step).get(META) or {"rollbacks": 0, "monitor": {}}
            if all(step <= later["to"] for later in self.rollbacks[saved["rollbacks"] :]):
                self._monitor = Monitor(self.config, saved["monitor"])
                return step
            checkpoints.delete({step})
        self._monitor = Monitor(self.config, {})
        return 0

    def roll_back(self, checkpoints: Checkpoints) -> Rollback:
        """Decides on the trouble and writes it down; `resume` then does it.

        Raises:
          DivergenceError: no try is left.
        """
        assert self.trouble is not None
        checkpoints.wait()
        rollback = self._decide(self.trouble, checkpoints.steps())
        self.rollbacks.append(rollback)
        if jax.process_index() == 0:
            text = json.dumps({"rollbacks": self.rollbacks}, indent=1, allow_nan=False)
            write_atomically(self.folder / FILE, text.encode())
        meet("rollback written")
        if jax.process_count() > 1 and read_rollbacks(self.folder) != self.rollbacks:
            raise CheckpointError(
                f"process {jax.process_index()} does not find its own decision in"
                f" {self.folder / FILE}: the processes saw other losses. The same command goes on"
            )
        return rollback

    def _decide(self, trouble: Trouble, steps: Sequence[int]) -> Rollback:
        guard = self.config.guard
        if len(self.rollbacks) >= guard.tries:
            self._give_up(trouble)
        to = self._target(trouble, steps)
        skipped = self._skipped()
        low = max(to + 1, trouble.first - guard.skip_before)
        high = max(low, trouble.last + guard.skip_after)
        losses = self._monitor.losses(trouble.seen, to)[-_SHOWN:]
        return {
            **trouble._asdict(),
            "to": to,
            "skipped": [batch_number(low - 1, skipped), batch_number(high - 1, skipped) + 1],
            "learning_rate_scale": self.scale * guard.factor,
            "losses": [[step, x if math.isfinite(x) else None] for step, x in losses],
        }

    def _target(self, trouble: Trouble, steps: Sequence[int]) -> int:
        """Returns the step to go back to: newest checkpoint before the trouble, else the oldest.

        A run that goes wrong again before it has a checkpoint behind the last trouble goes to the
        same one again, and after that to the one before: it may have been bad already. Only
        checkpoints at multiples of `train.checkpoint_every` count, which a run has whether it was
        stopped in between or not.
        """
        every = self.config.train.checkpoint_every
        regular = [step for step in steps if step and step % every == 0]
        if not regular or regular[0] == every:  # the start is still the one before
            regular.insert(0, 0)
        before = [step for step in regular if step < trouble.first]
        target = before[-1] if before else regular[0]
        if not self.rollbacks or target >= self.rollbacks[-1]["seen"]:
            return target
        tried = [rollback["to"] for rollback in self.rollbacks[-2:]]
        twice = len(tried) == 2 and tried[0] == tried[1]
        latest = min(target, tried[-1] - twice)
        return max((step for step in regular if step <= latest), default=regular[0])

    def _give_up(self, trouble: Trouble) -> None:
        tries, stage = self.config.guard.tries, self.config.stage
        raise DivergenceError(
            f"{stage}: {describe_trouble(trouble._asdict())}. The run has gone back {tries} times,"
            f" which is config.guard.tries (see {self.folder / FILE}), and the learning rate is at"
            f" {self.scale:.3g} of the config's. Start anew with a lower optimizer.learning_rate or"
            " a longer optimizer.lr_warmup_steps, look at the data, or raise guard.tries and run"
            " the same command"
        )

    def _skipped(self) -> list[tuple[int, int]]:
        return merged([rollback["skipped"] for rollback in self.rollbacks])


def merged(intervals: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """Merges half-open intervals into disjoint ones, in order."""
    disjoint: list[tuple[int, int]] = []
    for low, high in sorted((low, high) for low, high in intervals):
        if disjoint and low <= disjoint[-1][1]:
            disjoint[-1] = (disjoint[-1][0], max(high, disjoint[-1][1]))
        else:
            disjoint.append((low, high))
    return disjoint


def batch_number(done: int, skipped: Iterable[tuple[int, int]]) -> int:
    """Returns the number of the batch after `done` others, without disjoint intervals."""
    number = done
    for low, high in skipped:
        if low <= number:
            number += high - low
    return number


def describe_trouble(trouble: Mapping[str, Any]) -> str:
    """Describes trouble, as part of a sentence."""
    names = {
        "not_finite": "not finite",
        "spike": "loss spike",
        "divergence": "loss rising",
    }
    return f"{names[trouble['reason']]} at step {trouble['seen']} ({trouble['words']})"


def describe(rollback: Rollback) -> str:
    """Describes a rollback in a sentence."""
    low, high = rollback["skipped"]
    return (
        f"{describe_trouble(rollback)}: back to step {rollback['to']}, without batches"
        f" {low}…{high - 1}, learning rate × {rollback['learning_rate_scale']:.3g}"
    )
