"""The training loop of every stage: resume, step, log, evaluate, save."""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from m3jax.checkpoint import restore_params
from m3jax.config import prefix_tokens, validate
from m3jax.distributed import meet
from m3jax.errors import CheckpointError, ConfigError, DivergenceError
from m3jax.files import write_atomically
from m3jax.make_model import make_model
from m3jax.mesh import host_rows, make_mesh, to_global
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.train.checkpoints import Checkpoints, check_owner, claim
from m3jax.train.clock import Clock, Device, Speed
from m3jax.train.guard import Guard, describe
from m3jax.train.loss import Decode, inputs
from m3jax.train.metrics import Metrics, dropped_share, hit_share
from m3jax.train.optimizer import make_optimizer
from m3jax.train.plots import plot_stages
from m3jax.train.profile import Profile
from m3jax.train.progress import Progress
from m3jax.train.state import TrainState, abstract_state, init_state
from m3jax.train.step import make_step, scale_on
from m3jax.train.summary import Summary, summarize

Evaluate = Callable[[Params], Mapping[str, float]]


@runtime_checkable
class Batches(Protocol):
    """Where the loop gets its batches, `m3jax.data.pipeline.Pipeline`."""

    def batches(self, first_step: int, rows: np.ndarray) -> Iterator[Mapping[str, Any]]:
        """Host batches of the steps `first_step` …; a batch is a function of (seed, step) alone."""

    def report(self) -> Mapping[str, float]:
        """Counters for the metrics."""

    @property
    def decode(self) -> Decode | None:
        """Makes memories of what the bank stores, inside the step; None: batches hold them."""


class Source(NamedTuple):
    """What a run reads, for `train`.

    Attributes:
      pipeline: batches.
      evaluate: returns named numbers of parameters, or None.
      writer: `{"hash", "path", "step"}` of the checkpoint that wrote the memories, or None.
      version: of the knowledge, or None.
    """

    pipeline: Batches
    evaluate: Evaluate | None = None
    writer: Mapping[str, Any] | None = None
    version: int | None = None


Refresh = Callable[[int], Source]


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    pipeline: Batches,
    tokenizer_fingerprint: str,
    init_from: str | Path | None = None,
    evaluate: Evaluate | None = None,
    writer: Mapping[str, Any] | None = None,
    version: int | None = None,
    refresh: Refresh | None = None,
    profile_steps: tuple[int, int] | None = None,
) -> Summary:
    """Trains the stage `config.stage` in `<workdir>/<stage>`, or continues it.

    The same call after a kill ends bitwise equal to an undisturbed run. On SIGTERM the run is
    saved, and the process ends with code 0. With `guard.on` a run that goes wrong goes back to a
    checkpoint and on from there (`m3jax.train.guard`).

    Args:
      config: a config.
      workdir: folder of the run.
      pipeline: batches.
      tokenizer_fingerprint: of the tokenizer that made them.
      init_from: stage folder (or its `checkpoints/<step>`) whose parameters a new run starts from;
        not read when the run has a checkpoint of its own.
      evaluate: returns named numbers of parameters; called every `train.evaluate_every` steps and
        at the end.
      writer: `{"hash", "path", "step"}` of the checkpoint that wrote the memories that the batches
        carry; recorded in every checkpoint.
      version: of the knowledge that the batches are made of; recorded, too.
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
    mesh = make_mesh(config)
    clock, profile = Clock(), Profile(profile_steps, config.train.steps, folder)
    model = make_model(config, prefix_tokens(config), mesh)
    optimizer = make_optimizer(config)
    abstract = abstract_state(model, optimizer, mesh)
    checkpoints = Checkpoints(folder, config, tokenizer_fingerprint, writer, version)
    with contextlib.closing(checkpoints):
        first = checkpoints.latest_step() or 0 if guard is None else guard.resume(checkpoints)
        shown = jax.process_index() == 0
        progress = Progress(config.stage, config.train.steps, first, shown)
        with contextlib.closing(progress):
            if first == config.train.steps:
                progress.message(f"{config.stage}: finished before, at step {first}; nothing to do")
            else:

                def start() -> TrainState:
                    return _start(
                        config, model, optimizer, abstract, checkpoints, progress, mesh, init_from
                    )

                state = start()
                claim(folder, config)
                make = functools.partial(make_step, config, model, mesh, optimizer, abstract)
                source = Source(pipeline, evaluate, writer, version)
                loop = _Loop(config, folder, mesh, source, checkpoints, progress, clock)
                loop.refresh, loop.guard, loop.start = refresh, guard, start
                loop.run(make, state, first, profile)
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


def _start(
    config: ConfigDict,
    model: Model,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    checkpoints: Checkpoints,
    progress: Progress,
    mesh: Mesh,
    init_from: str | Path | None,
) -> TrainState:
    """The run's own newest checkpoint, else the parameters of `init_from`, else random ones."""
    latest = checkpoints.latest_step()
    if latest is not None:
        progress.message(f"{config.stage}: continuing from step {latest} of {config.train.steps}")
        return checkpoints.restore(abstract)
    params = None
    if init_from is not None:
        params, meta = restore_params(
            init_from, model, mesh=mesh, tokenizer_fingerprint=checkpoints.tokenizer_fingerprint
        )
        checkpoints.check_reads(meta, init_from)
        progress.message(f"{config.stage}: starting from step {meta['step']} of {init_from}")
    return init_state(config, model, optimizer, abstract, params)


class _Loop:
    """Owns what changes while training runs, but for the state."""

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        mesh: Mesh,
        source: Source,
        checkpoints: Checkpoints,
        progress: Progress,
        clock: Clock,
    ):
        self.config, self.folder, self.mesh = config, folder, mesh
        self.source = source
        self.refresh: Refresh | None = None
        self.guard: Guard | None = None
        self.start: Callable[[], TrainState] | None = None  # from the newest checkpoint
        self.compiled = False
        self.checkpoints, self.progress = checkpoints, progress
        self.metrics: Metrics | None = None  # on the first process only
        self.retrieval: Mapping[str, float] = {}  # counters of the line before
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.clock, self.device = clock, Device()
        self.speed = Speed(config, mesh, clock)

    def run(
        self,
        make: Callable[[Decode | None], Any],
        state: TrainState,
        first: int,
        profile: Profile,
    ) -> None:
        """Trains from step `first` on with the step function that `make` makes."""
        step_function = make(self.source.pipeline.decode)
        if jax.process_index() == 0:
            (self.folder / "loss.png").unlink(missing_ok=True)
            self._open_metrics(first)
            assert self.metrics is not None
            self.speed.seconds_before = self.metrics.seconds
        with (
            contextlib.closing(self),
            contextlib.closing(profile),
            _Termination(self.checkpoints) as termination,
        ):
            while not self._steps(make, step_function, state, first, profile, termination):
                state, first = self._roll_back()
            self._end()
            self._write({"step": self.config.train.steps, "time": self.clock.take()})

    def _steps(
        self,
        make: Callable[[Decode | None], Any],
        step_function: Any,
        state: TrainState,
        first: int,
        profile: Profile,
        termination: _Termination,
    ) -> bool:
        """Trains from a step on, to the end unless the guard notices trouble: whether it did."""
        steps, every = self.config.train.steps, self.config.train.refresh_every
        scale = () if self.guard is None else (scale_on(self.mesh, self.guard.scale),)
        rows = host_rows(self.mesh, self.config.data.batch_size)
        batches = self._batches(first, rows.ids)
        for step in range(first + 1, steps + 1):
            if every and step > 1 and (step - 1) % every == 0:
                self._refresh(step - 1)
                batches = self._batches(step - 1, rows.ids)
                if self.source.pipeline.decode is not None:  # its tables are another bank's
                    step_function = make(self.source.pipeline.decode)
            with self.clock.waiting(self.device.idle_since):
                batch = inputs(next(batches))
            placed = to_global(self.mesh, batch, rows)
            if not self.compiled and jax.process_count() > 1:
                step_function.lower(state, placed, *scale).compile()
                meet("compiled")
            self.compiled = True
            profile.before(step)
            with jax.transfer_guard("disallow"):
                state, metrics = step_function(state, placed, *scale)
            self.device.give(metrics)
            if not self._settle():
                return False
            self.pending = (step, metrics)
            if profile.after(step, metrics):
                self.progress.message(f"{self.config.stage}: trace in {profile.folder}")
            stop = termination.requested(step)
            if not self._at(step, state, stop):
                return False
            if stop and step < steps:
                self._end()
                self.progress.message(
                    f"{self.config.stage}: told to stop; saved at step {step} of {steps}."
                    " The same command continues"
                )
                raise SystemExit(0)
        return True

    def _batches(self, done: int, rows: np.ndarray) -> Iterator[Mapping[str, Any]]:
        """Batches of the steps after `done`."""
        pipeline = self.source.pipeline
        if self.guard is None:
            return iter(pipeline.batches(done, rows))
        first = self.guard.first_batch(done)
        return self.guard.without_skipped(pipeline.batches(first, rows), first)

    def _roll_back(self) -> tuple[TrainState, int]:
        """The state that the guard goes back to, and its step."""
        assert self.guard is not None and self.start is not None
        with self.clock.spent_on("checkpoint"):
            rollback = self.guard.roll_back(self.checkpoints)
            self.progress.message(f"{self.config.stage}: {describe(rollback)}")
            step = self.guard.resume(self.checkpoints)
            if self.metrics is not None:
                self.metrics.close()
                self._open_metrics(step)
            state = self.start()
        self.speed.report()  # its seconds are lost, as after a kill
        return state, step

    def _open_metrics(self, step: int) -> None:
        running = self.clock.now() - self.clock.born
        rollbacks = [] if self.guard is None else self.guard.rollbacks
        self.metrics = Metrics(self.folder, step, running, rollbacks=rollbacks)

    def close(self) -> None:
        """Closes what is open, however the run ended."""
        self.device.close()
        if self.metrics is not None:
            self.metrics.close()

    def _end(self) -> None:
        """Waits for the last checkpoint."""
        with self.clock.spent_on("checkpoint"):
            self.checkpoints.wait()

    def _refresh(self, step: int) -> None:
        """Reads memories that the checkpoint of a step has written."""
        assert self.refresh is not None
        self._settle()
        self._end()
        self.progress.message(f"{self.config.stage}: refreshing the bank at step {step}")
        with self.clock.spent_on("checkpoint"):
            self.source = self.refresh(step)
        self.checkpoints.reads(self.source.writer, self.source.version)
        self.retrieval = {}

    def _at(self, step: int, state: TrainState, stop: bool) -> bool:
        """Evaluates and saves when due. All lines up to a checkpoint are written before it.

        Returns:
          False: the guard has noticed trouble, and nothing was saved.
        """
        train = self.config.train
        last = step == train.steps
        evaluating = last or (train.evaluate_every and step % train.evaluate_every == 0)
        evaluate = self.source.evaluate
        if evaluate is not None and evaluating:
            if not self._settle():
                return False
            with self.clock.spent_on("evaluation"):
                values = {name: float(x) for name, x in evaluate(state.params).items()}
            self._write({"step": step, "evaluation": values})
        if last or stop or step % train.checkpoint_every == 0:
            if not self._settle():
                return False
            with self.clock.spent_on("checkpoint"):
                if self.metrics is not None:
                    self.metrics.sync()
                more = None if self.guard is None else self.guard.meta()
                self.checkpoints.save(state, step, more)
        return True

    def _settle(self) -> bool:
        """Fetches and logs the metrics of the step before, while the present one computes.

        Returns:
          False: the guard has noticed trouble in them, and they are not logged.
        """
        if self.pending is None:
            return True
        step, metrics = self.pending
        self.pending = None
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        if self.guard is not None:
            self.guard.observe(step, values["loss"], values["gradient_norm"])
            if self.guard.trouble is not None:
                return False
        elif not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            latest = self.checkpoints.latest_step()
            saved = (
                "there is no checkpoint" if latest is None else f"last checkpoint: step {latest}"
            )
            raise DivergenceError(
                f"{self.config.stage}: not finite at step {step} (loss {values['loss']}, gradient"
                f" norm {values['gradient_norm']}); {saved} in {self.folder}. Lower"
                " optimizer.learning_rate, lengthen optimizer.lr_warmup_steps, look at the data, or"
                " let guard.on = True go back by itself"
            )
        self.speed.step()
        train = self.config.train
        self.progress.update(step, values["loss"], self.speed.tokens_per_second)
        if step % train.log_every == 0 or step == train.steps:
            before, self.retrieval = self.retrieval, dict(self.source.pipeline.report())
            self._write(
                {
                    "step": step,
                    "tokens": step * self.speed.tokens_per_step,
                    "loss": values["mean_loss"],
                    "accuracy": values["mean_accuracy"],
                    "gradient_norm": values["gradient_norm"],
                    "parameter_norm": values["parameter_norm"],
                    "learning_rate": values["learning_rate"],
                    **self.speed.report(),
                    "retrieval": {
                        **self.retrieval,
                        **dropped_share(before, self.retrieval),
                        **hit_share(before, self.retrieval),
                    },
                }
            )
        return True

    def _write(self, line: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(line)


class _Termination:
    """Notes SIGTERM, so that the step in progress can end and the run be saved."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints, self._noted = checkpoints, False
        self._previous: Any = None
        # With several processes JAX's own service notes the signal and agrees on a step.
        self._ours = (
            jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        )

    def __enter__(self) -> _Termination:
        if self._ours:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; the same answer on all processes."""
        if jax.process_count() > 1:  # said once; remembered where the guard goes back in between
            self._noted = self._noted or self._checkpoints.reached_preemption(step)
        return self._noted
