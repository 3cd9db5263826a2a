"""The stability guard: rolls a diverging run back and continues it with a lower learning rate.

`guard.json` in the stage folder lists every rollback. It is written atomically before a rollback is
performed, and everything afterwards is a function of it and of the checkpoints: which checkpoints
belong to an abandoned branch, the learning rate, which batches are skipped. So a run that is killed
between detecting trouble and rolling back continues, when restarted, as if it had not been killed.

Every process reads the same metrics and takes the same decision; process 0 writes it to the file.
"""

from __future__ import annotations

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
from m3jax.files import read_sealed, write_sealed
from m3jax.train.checkpoints import Checkpoints, kept
from m3jax.train.monitor import Monitor, Trouble
from m3jax.train.stage_files import StageFiles

FILE = "guard.json"
META = "guard"  # key of the guard's entries in a checkpoint's `meta`
_SHOWN = 256  # most losses of an abandoned branch that a rollback keeps, for plots

Rollback = dict[str, Any]


def read_rollbacks(stage_folder: str | Path) -> list[Rollback]:
    """Reads the rollbacks of a stage so far, oldest first.

    Each has `reason`, `words`, `first`, `last` and `seen` of a `Trouble`; `to`, the step that the
    run went back to; `skipped`, `[first, stop]` of the skipped batches, counted from 0, without
    `stop`; `learning_rate_scale`, the factor on the learning rate from then on; and `losses`,
    `[step, loss]` of the undone steps (null where the loss was not finite).

    Raises:
      CheckpointError: the file is damaged.
    """
    path = Path(stage_folder) / FILE
    if not path.exists():
        return []
    content = read_sealed(path, "rollbacks", unsealed=True)
    if content is None:
        raise _lost(path, "is damaged")
    return list(content["rollbacks"])


def _lost(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {what}: without it the run cannot go on as it would have. Restore it from a copy,"
        " or move the stage folder elsewhere and start again"
    )


class Guard:
    """Detects trouble in one run, decides on rollbacks, and skips batches.

    Args:
      config: a validated config with `guard.on`.
      stage_folder: folder of the stage.

    Attributes:
      rollbacks: rollbacks so far, see `read_rollbacks`.
    """

    def __init__(self, config: ConfigDict, stage_folder: Path):
        self.config, self.folder = config, stage_folder
        self.rollbacks = read_rollbacks(stage_folder)
        self._monitor = Monitor(config, {})

    @staticmethod
    def of(config: ConfigDict, stage_folder: Path) -> Guard | None:
        """Returns the guard of a run, or None if `guard.on` is False.

        Raises:
          ConfigError: `guard.on` is False, but the run was rolled back before.
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
        """Records loss (nats per token) and gradient norm of a step; returns trouble, or None."""
        return self._monitor.observe(step, loss, gradient_norm)

    def meta(self) -> dict[str, Any]:
        """Returns the guard's entries of a checkpoint's `meta`."""
        return {META: {"rollbacks": len(self.rollbacks), "monitor": self._monitor.state()}}

    @property
    def scale(self) -> float:
        """Returns the factor on the learning rate."""
        return float(self.rollbacks[-1]["learning_rate_scale"]) if self.rollbacks else 1.0

    def batches(self, read: Callable[[int], Iterator[Batch]], done: int) -> Iterator[Batch]:
        """Yields the batches of the steps after `done`, without the skipped ones.

        Args:
          read: yields the batches from a batch number on, counted from 0.
          done: number of finished steps.
        """
        skipped = self._skipped()
        first = batch_number(done, skipped)
        for number, batch in enumerate(read(first), first):
            if number not in skipped:
                yield batch

    # -- rollback
    def resume(self, checkpoints: Checkpoints) -> int:
        """Deletes checkpoints of abandoned branches, and loads the monitor's state from the newest.

        Returns:
          The step to continue from, 0 if no checkpoint is left.
        """
        checkpoints.delete(set(checkpoints.steps()) - kept(checkpoints.steps(), self.config))
        for step in reversed(checkpoints.steps()):
            meta = read_meta(checkpoints.folder / str(step))
            saved = meta.get(META, {"rollbacks": 0, "monitor": {}})
            if saved["rollbacks"] > len(self.rollbacks):
                raise _lost(
                    self.folder / FILE,
                    f"lists {len(self.rollbacks)} rollbacks, but the checkpoint of step {step}"
                    f" follows {saved['rollbacks']}",
                )
            if all(step <= later["to"] for later in self.rollbacks[saved["rollbacks"] :]):
                self._monitor = Monitor(self.config, saved["monitor"])
                return step
            checkpoints.delete({step})
        self._monitor = Monitor(self.config, {})
        return 0

    def roll_back(self, trouble: Trouble, checkpoints: Checkpoints) -> Rollback:
        """Decides on a rollback and writes it to `guard.json`; `resume` then performs it.

        Raises:
          DivergenceError: the run was rolled back `guard.tries` times already.
          CheckpointError: another process took another decision.
        """
        checkpoints.wait()
        rollback = self._decide(trouble, checkpoints.steps())
        self.rollbacks.append(rollback)
        files = StageFiles(self.folder)
        if jax.process_index() == 0:
            write_sealed(self.folder / FILE, {"rollbacks": self.rollbacks})
            files.put(FILE)
        meet("rollback written")
        if jax.process_index() > 0:
            files.take(FILE)
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

        If trouble returns before the run has a checkpoint after the last trouble, it goes back to
        the same checkpoint once more, and then to an earlier one, since that checkpoint may be bad
        itself. Only multiples of `train.checkpoint_every` count: other checkpoints depend on when
        the run was stopped.
        """
        every = self.config.train.checkpoint_every
        regular = [step for step in steps if step and step % every == 0]
        if not regular or regular[0] == every:  # step 0 is the checkpoint before the oldest
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
    """Returns the number of the batch of step `done + 1`, if the batches `skipped` are left out."""
    number = done
    for batch in skipped:
        number += batch <= number
    return number


def describe_trouble(trouble: Mapping[str, Any]) -> str:
    """Describes trouble as part of a sentence, from the fields of `Trouble`."""
    names = {"not_finite": "not finite", "spike": "loss spike", "divergence": "loss rising"}
    return f"{names[trouble['reason']]} at step {trouble['seen']} ({trouble['words']})"


def describe(rollback: Rollback) -> str:
    """Describes a rollback in a sentence."""
    low, high = rollback["skipped"]
    return (
        f"{describe_trouble(rollback)}: back to step {rollback['to']}, without batches"
        f" {low}…{high - 1}, learning rate × {rollback['learning_rate_scale']:.3g}"
    )
