"""The training loop of every stage: runs the steps, and calls hooks for everything else."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from m3jax.checkpoint import identity_of, restore_params
from m3jax.config import validate
from m3jax.data.batch import Batch
from m3jax.distributed import meet
from m3jax.errors import CheckpointError, ConfigError
from m3jax.mesh import host_rows, make_mesh
from m3jax.store import Store
from m3jax.train.checkpoints import CONFIG, Checkpoints, check_owner, claim
from m3jax.train.clock import Device, Progress, RunClock
from m3jax.train.guard import FILE as GUARD_FILE
from m3jax.train.guard import Guard
from m3jax.train.hooks import (
    Evaluation,
    GoBack,
    Hook,
    Log,
    RefreshBank,
    Save,
    StopAtNaN,
    Trace,
    known_lines,
)
from m3jax.train.loss import place_batch
from m3jax.train.metrics import FILE as METRICS_FILE
from m3jax.train.metrics import Summary, summarize
from m3jax.train.plots import plot_stages
from m3jax.train.run import Run, StageData
from m3jax.train.stage_files import StageFiles
from m3jax.train.state import Program, TrainState
from m3jax.train.step import make_step, scale_on


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

    The same call after a kill ends bitwise equal to an uninterrupted run. On SIGTERM or Ctrl-C the
    run is saved, and the process ends with code 0. With `guard.on` a diverging run is rolled back
    to a checkpoint and continued from it (`m3jax.train.guard`).

    Args:
      config: config of the run; it is validated.
      workdir: folder of the run.
      data: batches and evaluator; its writer, version and ingredients are recorded in every
        checkpoint, and must be those that the run's newest checkpoint records.
      tokenizer_fingerprint: fingerprint of the tokenizer that made the batches.
      init_from: stage folder (or its `checkpoints/<step>`) whose parameters a new run starts from;
        not read when the run has a checkpoint of its own.
      refresh: rewrites the memories with the checkpoint of a step, and returns the data to read
        from then on; called every `train.refresh_every` steps, and again after a kill.
      profile_steps: first and last step of a trace in `<workdir>/<stage>/profile`.

    With several processes all call this alike, and `workdir` is on a disk that all of them share,
    or is the mirror of a bucket (`m3jax.mirror`), which each of them may have for itself.

    Raises:
      ConfigError, CheckpointError: the config, workdir or checkpoint does not fit.
      DivergenceError: the loss or the gradient is not finite; names the step and the last
        checkpoint. With a guard: the run was rolled back `guard.tries` times already.
    """
    validate(config)
    folder, steps = Path(workdir).absolute() / config.stage, config.train.steps
    if config.train.refresh_every and jax.process_count() > 1:
        raise ConfigError(
            f"config.train.refresh_every = {config.train.refresh_every}: only a run of one process"
            " refreshes its bank. Set it to 0; launch/write_bank.py --refresh=all does it between"
            " two calls"
        )
    if profile_steps is not None and profile_steps[0] > steps:
        raise ConfigError(
            f"--profile_steps={profile_steps[0]}:{profile_steps[1]} begins after the last step,"
            f" config.train.steps = {steps}"
        )
    files = StageFiles(folder)
    files.take(CONFIG, GUARD_FILE, METRICS_FILE)
    _check_shared(files)
    check_owner(folder, config)
    guard, clock = Guard.of(config, folder), RunClock()
    program = Program(config, make_mesh(config))
    reads = data.writer, data.version, data.ingredients
    checkpoints = Checkpoints(folder, config, tokenizer_fingerprint, *reads)
    with contextlib.closing(checkpoints):
        latest = checkpoints.latest()
        first = latest or 0 if guard is None else guard.resume(checkpoints)
        shown = jax.process_index() == 0
        with contextlib.closing(Progress(config.stage, steps, first, shown)) as progress:
            run = Run(config, folder, checkpoints, guard, clock, progress, files)
            if first == steps:
                known_lines(run, first)
                run.say(f"finished before, at step {first}; nothing to do")
            else:
                hooks = _hooks(run, program, refresh, profile_steps)
                Loop(run, program, data, hooks, init_from).train(first)
    if shown and not (folder / "loss.png").exists():
        plot_stages([folder], folder / "loss.png")
        files.put("loss.png")
    meet("finished")  # process 0 has written its files
    if not shown:
        files.take(METRICS_FILE)
    return summarize(config, folder)


def _check_shared(files: StageFiles) -> None:
    """Raises `CheckpointError` if a process does not see the files that process 0 writes."""
    if jax.process_count() == 1:
        return
    store, probe = Store(files.place), "seen_by_all.tmp"
    if jax.process_index() == 0:
        store.write(probe, b"")
    meet("probe written")
    if store.read(probe) is None:
        raise CheckpointError(
            f"process {jax.process_index()} does not see what process 0 writes in {files.place};"
            " put --workdir into a bucket, or on a disk that all processes share"
        )
    meet("probe seen")
    if jax.process_index() == 0:
        store.delete(probe)


def _hooks(
    run: Run,
    program: Program,
    refresh: Callable[[int], StageData] | None,
    profile_steps: tuple[int, int] | None,
) -> list[Hook]:
    """Returns the hooks of a run, in the order in which they are called."""
    log = Log(run, program.mesh)
    hooks: list[Hook] = [StopAtNaN(run) if run.guard is None else GoBack(run), log]
    if profile_steps is not None:
        hooks.append(Trace(run, profile_steps))
    hooks += [Evaluation(run, log), Save(run, log)]
    if run.config.train.refresh_every:
        assert refresh is not None
        hooks.append(RefreshBank(run, refresh))
    return hooks


class Loop:
    """Runs the steps of a stage from a checkpoint to the end.

    Args:
      run: its guard skips batches and scales the learning rate; its clock counts the time of
        waiting for batches and of rollbacks.
      program: model, optimizer and state of the stage.
      data: data to begin with.
      hooks: called in this order, see `Hook`.
      init_from: as in `train`.
    """

    def __init__(
        self,
        run: Run,
        program: Program,
        data: StageData,
        hooks: Sequence[Hook],
        init_from: str | Path | None,
    ):
        self.run, self.program, self.data, self.hooks = run, program, data, hooks
        self.init_from, self.device = init_from, Device()
        self.rows = host_rows(program.mesh, run.config.data.batch_size)
        self.pending: tuple[int, dict[str, jax.Array]] | None = None  # not yet seen by hooks
        self.step: Any = None
        self.compiled = False

    def train(self, first: int) -> None:
        """Trains from the newest checkpoint, at step `first`, to the end of the stage."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.device.close)
            state = self._restore()
            claim(self.run.folder, self.run.config)
            for hook in self.hooks:
                stack.callback(hook.close)
            self._read_from(self.data)
            while (back := self._steps(state, first)) is not None:
                self.pending, first = None, back
                with self.run.clock.spent_on("checkpoint"):
                    state = self._restore()
            for hook in reversed(self.hooks):
                hook.finish()

    def _restore(self) -> TrainState:
        """Returns the newest checkpoint's state, else step 0 with `init_from` or random weights."""
        checkpoints, program = self.run.checkpoints, self.program
        latest = checkpoints.latest()
        if latest is not None:
            self.run.say(f"continuing from step {latest} of {self.run.config.train.steps}")
            return checkpoints.restore(program.abstract)
        params = None
        if self.init_from is not None:
            params, meta = restore_params(
                self.init_from,
                program.model,
                mesh=program.mesh,
                tokenizer_fingerprint=checkpoints.tokenizer_fingerprint,
            )
            checkpoints.check_reads(meta, self.init_from)
            checkpoints.begin(identity_of(meta))
            self.run.say(f"starting from step {meta['step']} of {self.init_from}")
        return program.init(params)

    def _read_from(self, data: StageData) -> None:
        """Switches to `data`, and to a new step if memories are dequantized by tables of a bank."""
        if self.step is None or data.pipeline.dequantize is not None:
            self.step = make_step(self.program, data.pipeline.dequantize)
        self.data = data
        for hook in self.hooks:
            hook.read_from(data)

    def _steps(self, state: TrainState, first: int) -> int | None:
        """Runs the steps after `first`; returns the step to roll back to, or None at the end."""
        for hook in self.hooks:
            if (data := hook.start(first)) is not None:
                self._read_from(data)
        mesh, guard = self.program.mesh, self.run.guard
        scale = () if guard is None else (scale_on(mesh, guard.scale),)
        batches = self._batches(first)
        for step in range(first + 1, self.run.config.train.steps + 1):
            with self.run.clock.waiting(self.device.idle_since):
                batch = next(batches)
            placed = place_batch(mesh, batch, self.rows)
            if not self.compiled and jax.process_count() > 1:
                self.step.lower(state, placed, *scale).compile()
                meet("compiled")
            self.compiled = True
            for hook in self.hooks:
                hook.before(step)
            with jax.transfer_guard("disallow"):
                state, metrics = self.step(state, placed, *scale)
            self.device.give(metrics)
            if (back := self._settle()) is not None:
                return back
            self.pending = (step, metrics)
            for hook in [hook for hook in self.hooks if hook.due(step)]:
                if (back := self._settle()) is not None:
                    return back
                if (data := hook.at(step, state)) is not None:
                    self._read_from(data)
                    batches = self._batches(step)
        return None  # `Save` is due at the last step, which settles its metrics

    def _batches(self, done: int) -> Iterator[Batch]:
        """Returns the batches of the steps after `done`."""
        read = functools.partial(self.data.pipeline.batches, rows=self.rows.ids)
        return read(done) if self.run.guard is None else self.run.guard.batches(read, done)

    def _settle(self) -> int | None:
        """Passes the pending metrics to the hooks; returns the step to roll back to, or None."""
        if self.pending is None:
            return None
        (step, metrics), self.pending = self.pending, None
        values: Mapping[str, float] = jax.tree.map(float, jax.device_get(metrics))
        for hook in self.hooks:
            if (back := hook.after(step, values)) is not None:
                return back
        return None
