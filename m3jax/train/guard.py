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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from m3jax.checkpoint import read_meta
from m3jax.data.batch import Batch
from m3jax.distributed import meet
from m3jax.errors import CheckpointError, ConfigError, DivergenceError
from m3jax.files import write_atomically
from m3jax.train.checkpoints import Checkpoints, kept
from m3jax.train.monitor import Monitor, Trouble

FILE = "guard.json"
META = "guard"  # what a checkpoint's `meta` calls it
_SHOWN = 256  # most losses of a branch that a rollback keeps for pictures

Rollback = dict[str, Any]


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
    """

    def __init__(self, config: ConfigDict, stage_folder: Path):
        self.config, self.folder = config, stage_folder
        self.rollbacks = read_rollbacks(stage_folder)
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
    def observe(self, step: int, loss: float, gradient_norm: float) -> Trouble | None:
        """Notes a step; returns trouble, or None."""
        return self._monitor.observe(step, loss, gradient_norm)

    def meta(self) -> dict[str, Any]:
        """Returns the part of a checkpoint's `meta` that is the guard's."""
        return {META: {"rollbacks": len(self.rollbacks), "monitor": self._monitor.state()}}

    @property
    def scale(self) -> float:
        """Returns the factor on the learning rate."""
        return float(self.rollbacks[-1]["learning_rate_scale"]) if self.rollbacks else 1.0

    def batches(self, read: Callable[[int], Iterator[Batch]], done: int) -> Iterator[Batch]:
        """Yields the batches of the steps after `done`, without the skipped ones.

        Args:
          read: yields batches from a number, from 0, on.
          done: steps that are done.
        """
        skipped = self._skipped()
        first = batch_number(done, skipped)
        for number, batch in enumerate(read(first), first):
            if number not in skipped:
                yield batch

    # -- going back
    def resume(self, checkpoints: Checkpoints) -> int:
        """Deletes checkpoints of branches that were left, and remembers what the newest one knows.

        Returns:
          The step to go on from.
        """
        checkpoints.delete(set(checkpoints.steps()) - kept(checkpoints.steps(), self.config))
        for step in reversed(checkpoints.steps()):
            meta = read_meta(checkpoints.folder / str(step))
            saved = meta.get(META, {"rollbacks": 0, "monitor": {}})
            if all(step <= later["to"] for later in self.rollbacks[saved["rollbacks"] :]):
                self._monitor = Monitor(self.config, saved["monitor"])
                return step
            checkpoints.delete({step})
        self._monitor = Monitor(self.config, {})
        return 0

    def roll_back(self, trouble: Trouble, checkpoints: Checkpoints) -> Rollback:
        """Decides on trouble and writes it down; `resume` then does it.

        Raises:
          DivergenceError: no try is left.
        """
        checkpoints.manager.wait_until_finished()
        rollback = self._decide(trouble, checkpoints.steps())
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
            raise DivergenceError(
                f"{self.config.stage}: {describe_trouble(trouble._asdict())}. The run has gone back"
                f" {guard.tries} times, which is config.guard.tries (see {self.folder / FILE}), and"
                f" the learning rate is at {self.scale:.3g} of the config's. Start anew with a"
                " lower optimizer.learning_rate or a longer optimizer.lr_warmup_steps, look at the"
                " data, or raise guard.tries and run the same command"
            )
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

    def _skipped(self) -> list[int]:
        """Lists the numbers of the skipped batches, ascending."""
        return sorted({n for rollback in self.rollbacks for n in range(*rollback["skipped"])})


def batch_number(done: int, skipped: Iterable[int]) -> int:
    """Returns the number of the batch after `done` others, without the skipped ones, ascending."""
    number = done
    for batch in skipped:
        number += batch <= number
    return number


def describe_trouble(trouble: Mapping[str, Any]) -> str:
    """Describes trouble, as part of a sentence."""
    names = {"not_finite": "not finite", "spike": "loss spike", "divergence": "loss rising"}
    return f"{names[trouble['reason']]} at step {trouble['seen']} ({trouble['words']})"


def describe(rollback: Rollback) -> str:
    """Describes a rollback in a sentence."""
    low, high = rollback["skipped"]
    return (
        f"{describe_trouble(rollback)}: back to step {rollback['to']}, without batches"
        f" {low}…{high - 1}, learning rate × {rollback['learning_rate_scale']:.3g}"
    )
