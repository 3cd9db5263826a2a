"""The training loop of every stage: step after step, with hooks for all else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from m3jax.config import validate
from m3jax.data.batch import Batch
from m3jax.distributed import meet
from m3jax.errors import CheckpointError, ConfigError
from m3jax.files import write_atomically
from m3jax.mesh import host_rows, make_mesh
from m3jax.train.checkpoints import Checkpoints, check_owner, claim
from m3jax.train.clock import Device, RunClock, Speed
from m3jax.train.guard import Guard
from m3jax.train.hooks import (
    Evaluation,
    GuardHook,
    Hook,
    RefreshBank,
    RollBack,
    Save,
    StopAtNaN,
)
from m3jax.train.log import Log
from m3jax.train.loss import place_batch
from m3jax.train.plots import plot_stages
from m3jax.train.profile import Profile
from m3jax.train.program import Program
from m3jax.train.progress import Progress
from m3jax.train.stage_data import StageData
from m3jax.train.state import TrainState
from m3jax.train.step import scale_on
from m3jax.train.summary import Summary, summarize
from m3jax.train.termination import Termination


def train(
    config: ConfigDict,
    workdir: str | Path,
    data: StageData,
    *,
    tokenizer_fingerprint: str,
    init_from: str | Path | None = None,
    refresh: Callable[[int], StageData] | None = None,
    profile_steps: tuple[int, int] | None = None,
) -> Summary:
    """Trains the stage `config.stage` in `<workdir>/<stage>`, or continues it.

    The same call after a kill ends bitwise equal to an undisturbed run. On SIGTERM the run is
    saved, and the process ends with code 0. With `guard.on` a run that goes wrong goes back to a
    checkpoint and on from there (`m3jax.train.guard`).

    Args:
      config: a config.
      workdir: folder of the run.
      data: batches and evaluator; its writer and version are recorded in every checkpoint.
      tokenizer_fingerprint: of the tokenizer that made the batches.
      init_from: stage folder (or its `checkpoints/<step>`) whose parameters a new run starts from;
        not read when the run has a checkpoint of its own.
      refresh: writes the memories anew with the checkpoint of a step, and returns what to read from
        then on; called every `train.refresh_every` steps, and again after a kill.
      profile_steps: first and last step of a trace in `<workdir>/<stage>/profile`.

    With several processes all call this alike, and `workdir` is on a disk that all of them see.

    Raises:
      ConfigError, CheckpointError: the config, workdir or checkpoint does not fit.
      DivergenceError: the loss is not finite; names the step and the last checkpoint. With a guard:
        it has gone back as often as it may.
    """
    validate(config)
    folder = Path(workdir).absolute() / config.stage
    if config.train.refresh_every and jax.process_count() > 1:
        raise ConfigError(
            f"config.train.refresh_every = {config.train.refresh_every}: only a run of one process"
            " refreshes its bank. Set it to 0; launch/write_bank.py --refresh=all does it between"
            " two calls"
        )
    _check_shared(folder)
    check_owner(folder, config)
    guard = Guard.of(config, folder)
    clock, profile = RunClock(), Profile(profile_steps, config.train.steps, folder)
    program = Program(config, make_mesh(config))
    checkpoints = Checkpoints(folder, config, tokenizer_fingerprint, data.writer, data.version)
    with contextlib.closing(checkpoints):
        first = checkpoints.latest_step() or 0 if guard is None else guard.resume(checkpoints)
        shown = jax.process_index() == 0
        progress = Progress(config.stage, config.train.steps, first, shown)
        with contextlib.closing(progress):

            def restore() -> TrainState:
                return program.start(checkpoints, init_from, progress)

            if first == config.train.steps:
                progress.message(f"{config.stage}: finished before, at step {first}; nothing to do")
            else:
                state = restore()
                claim(folder, config)
                with Termination(checkpoints) as termination:
                    hooks = _hooks(
                        config,
                        folder,
                        program.mesh,
                        checkpoints,
                        progress,
                        clock,
                        guard,
                        termination,
                        refresh,
                    )
                    loop = Loop(program, data, hooks, guard, restore, clock, profile, progress)
                    loop.run(state, first)
    if shown and not (folder / "loss.png").exists():
        plot_stages([folder], folder / "loss.png")
    meet("finished")  # the first process has written
    return summarize(config, folder)


def _check_shared(folder: Path) -> None:
    """Refuses a folder that not all processes see as the first one does: checkpoints need that."""
    probe = folder / "seen_by_all.tmp"
    if jax.process_index() == 0 and jax.process_count() > 1:
        write_atomically(probe, b"")
    meet("probe written")
    if jax.process_count() > 1 and not probe.exists():
        raise CheckpointError(
            f"process {jax.process_index()} does not see what process 0 writes in {folder}; put"
            " --workdir on a disk that all processes share"
        )
    meet("probe seen")
    if jax.process_index() == 0:
        probe.unlink(missing_ok=True)


def _hooks(
    config: ConfigDict,
    folder: Path,
    mesh: Mesh,
    checkpoints: Checkpoints,
    progress: Progress,
    clock: RunClock,
    guard: Guard | None,
    termination: Termination,
    refresh: Callable[[int], StageData] | None,
) -> list[Hook]:
    """Returns the hooks of a run, in the order in which they are called."""
    rollbacks = [] if guard is None else guard.rollbacks
    log = Log(config, folder, clock, Speed(config, mesh, clock), progress, rollbacks)
    hooks: list[Hook] = [
        StopAtNaN(config, folder, checkpoints)
        if guard is None
        else GuardHook(config, guard, checkpoints, clock, progress),
        log,
        Evaluation(config, clock, log.write),
        Save(config, checkpoints, termination, clock, progress, log.sync, guard),
    ]
    if config.train.refresh_every:
        assert refresh is not None
        hooks.append(RefreshBank(config, refresh, checkpoints, clock, progress))
    return hooks


class Loop:
    """Steps from one checkpoint to the end of a stage.

    Args:
      program: makes the step.
      data: batches to begin with.
      hooks: called in this order, see `Hook`.
      guard: says which batches are left out, and scales the learning rate; or None.
      restore: returns the state of the newest checkpoint.
      clock: gets the seconds that are waited for batches, and for a rollback.
      profile: of some steps.
      progress: for messages.
    """

    def __init__(
        self,
        program: Program,
        data: StageData,
        hooks: Sequence[Hook],
        guard: Guard | None,
        restore: Callable[[], TrainState],
        clock: RunClock,
        profile: Profile,
        progress: Progress,
    ):
        self.program, self.data, self.hooks, self.guard = program, data, hooks, guard
        self.restore, self.clock, self.profile, self.progress = restore, clock, profile, progress
        self.config, self.device = program.config, Device()
        self.rows = host_rows(program.mesh, self.config.data.batch_size)
        self.pending: tuple[int, dict[str, jax.Array]] | None = None  # not called late yet
        self.metrics: Mapping[str, float] = {}  # of the last settled step
        self.step: Any = None
        self.compiled = False

    def run(self, state: TrainState, first: int) -> None:
        """Trains behind the step `first`, with its state, to the end."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.device.close)
            for hook in self.hooks:
                stack.callback(hook.close)
            stack.callback(self.profile.close)
            self._read_from(self.data)
            while back := self._steps(state, first):
                self.pending, first = None, back.step
                with self.clock.spent_on("checkpoint"):
                    state = self.restore()
            for hook in reversed(self.hooks):
                hook.finish()

    def _read_from(self, data: StageData) -> None:
        """Reads from now on what `data` says; its memories may need tables of another bank."""
        if self.step is None or data.pipeline.dequantize is not None:
            self.step = self.program.step(data.pipeline.dequantize)
        self.data = data
        for hook in self.hooks:
            hook.read_from(data)

    def _steps(self, state: TrainState, first: int) -> RollBack | None:
        """Trains from a step on, to the end or until a hook wants to go back."""
        for hook in self.hooks:
            answer = hook.start(first)
            if isinstance(answer, StageData):
                self._read_from(answer)
        mesh, steps = self.program.mesh, self.config.train.steps
        scale = () if self.guard is None else (scale_on(mesh, self.guard.scale),)
        batches = self._batches(first)
        for step in range(first + 1, steps + 1):
            with self.clock.waiting(self.device.idle_since):
                batch = next(batches)
            placed = place_batch(mesh, batch, self.rows)
            if not self.compiled and jax.process_count() > 1:
                self.step.lower(state, placed, *scale).compile()
                meet("compiled")
            self.compiled = True
            self.profile.before(step)
            with jax.transfer_guard("disallow"):
                state, metrics = self.step(state, placed, *scale)
            self.device.give(metrics)
            if back := self._settle():
                return back
            self.pending = (step, metrics)
            if self.profile.after(step, metrics):
                self.progress.message(f"{self.config.stage}: trace in {self.profile.folder}")
            for hook in [hook for hook in self.hooks if hook.due(step)]:
                if back := self._settle():
                    return back
                answer = hook(step, state, self.metrics)
                if isinstance(answer, RollBack):
                    return answer
                if isinstance(answer, StageData):
                    self._read_from(answer)
                    batches = self._batches(step)
        return None  # the checkpoint of the last step has settled it

    def _batches(self, done: int) -> Iterator[Batch]:
        """Returns batches of the steps after `done`."""
        pipeline = self.data.pipeline
        if self.guard is None:
            return iter(pipeline.batches(done, self.rows.ids))
        first = self.guard.first_batch(done)
        return self.guard.without_skipped(pipeline.batches(first, self.rows.ids), first)

    def _settle(self) -> RollBack | None:
        """Calls the late hooks for the step before, while the present one computes."""
        if self.pending is None:
            return None
        step, metrics = self.pending
        self.pending = None
        self.metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
        for hook in self.hooks:
            answer = hook(step, None, self.metrics) if hook.late else None
            if isinstance(answer, RollBack):
                return answer
        return None
