"""Sets up and trains one stage: data, evaluator, base model of DPO, version, refresh."""

from __future__ import annotations

from pathlib import Path

import jax
from ml_collections import ConfigDict

from m3jax.checkpoint import FOLDER, checkpoint_steps
from m3jax.config import validate, with_epochs
from m3jax.data.pipeline import Pipeline, open_pipeline
from m3jax.errors import ConfigError
from m3jax.knowledge.current import read_current
from m3jax.knowledge.versions import (
    existing,
)
from m3jax.mesh import make_mesh
from m3jax.mirror import Mirror
from m3jax.train.checkpoints import knowledge_version
from m3jax.train.dpo_base import FOLDER as BASE_LOGPROBS
from m3jax.train.dpo_base import hold_base_logprobs
from m3jax.train.evaluator import evaluator
from m3jax.train.loop import train
from m3jax.train.metrics import Summary
from m3jax.train.refresh import rewrite
from m3jax.train.run import StageData
from m3jax.train.stage_files import StageFiles


def train_stage(
    config: ConfigDict,
    workdir: str | Path,
    *,
    init_from: str | Path | None = None,
    bank: str | Path | None = None,
    version: int | None = None,
    profile: tuple[int, int] | None = None,
) -> Summary:
    """Trains the stage `config.stage` of a prepared workdir, or continues it.

    With several processes, all must call it (`m3jax.train.loop.train`).

    Args:
      config: config of the stage.
      workdir: folder of the run, or its mirror.
      init_from: stage folder, or `checkpoints/<step>` in it, whose parameters a new run starts
        from; not read when the run has a checkpoint of its own. It is also the base model of DPO.
      bank: folder or URL of a bank; default the bank of the version.
      version: version of the knowledge base; default the version that the run's newest checkpoint
        records, for a new run the current version.
      profile: first and last step to trace.

    Raises:
      ConfigError, CheckpointError, TextError, RetrievalError, BankError, VersionError: a part is
        missing or does not fit the other parts.
      DivergenceError: the loss is not finite, or the guard has used up `guard.tries`.
      LockError: another process trains the stage.
    """
    if validate(config).train.refresh_every and bank is not None:
        raise ConfigError(
            f"config.train.refresh_every = {config.train.refresh_every} refreshes the workdir's"
            " bank; leave out --bank"
        )
    workdir = existing(Path(workdir))
    with StageFiles(workdir / config.stage).only_writer():
        return _train_stage(config, workdir, init_from, bank, version, profile)


def _train_stage(
    config: ConfigDict,
    workdir: Path,
    init_from: str | Path | None,
    bank: str | Path | None,
    version: int | None,
    profile: tuple[int, int] | None,
) -> Summary:
    mirror = Mirror.of(workdir)
    goes_on = knowledge_version(mirror.url(config.stage)) if version is None else None
    mesh = make_mesh(config)

    def read(version: int | None) -> tuple[Pipeline, StageData]:
        """Opens the data of a version of the knowledge base; None: the current version."""
        pipeline = open_pipeline(config, workdir, bank=bank, version=version)
        evaluate = evaluator(config, workdir, bank=bank, version=version, mesh=mesh)
        if config.data.packing == "pairs":
            pipelines = {"train": pipeline, "validation": evaluate.pipeline}
            stored = [f"{config.stage}/{BASE_LOGPROBS}/{split}" for split in pipelines]
            if jax.process_index() == 0:  # which alone opens them
                mirror.fetch(*mirror.published(*stored))
            hold_base_logprobs(config, workdir / config.stage, pipelines, init_from, mesh)
            for part in stored if jax.process_index() == 0 else ():
                mirror.publish(part)
        writer = None if pipeline.bank is None else pipeline.bank.writer
        number = None if pipeline.version is None else pipeline.version.number
        ingredients = {**evaluate.pipeline.ingredients, **pipeline.ingredients}
        return pipeline, StageData(pipeline, evaluate, writer, number, ingredients)

    def refresh(step: int) -> StageData:
        checkpoint = mirror.url(f"{config.stage}/{FOLDER}/{step}")
        return read(rewrite(config, workdir, checkpoint).number)[1]

    pipeline, data = read(goes_on if version is None else version)
    config = with_epochs(config, len(pipeline.rows))
    if config.train.epochs:
        _say(f"{config.stage}: {config.train.epochs:g} epochs are {config.train.steps} steps")
    if goes_on is not None:
        _tell_version(config, workdir, goes_on)
    return train(
        config,
        workdir,
        data,
        tokenizer_fingerprint=pipeline.tokenizer.fingerprint,
        init_from=init_from,
        refresh=refresh,
        profile_steps=profile,
    )


def _tell_version(config: ConfigDict, workdir: Path, version: int) -> None:
    """Prints a note if a run continues with a version that is no longer the current one."""
    train, step = config.train, checkpoint_steps(Mirror.of(workdir).url(config.stage))[-1]
    refreshes = train.refresh_every and step % train.refresh_every == 0
    current = read_current(workdir)["version"]
    if version != current and step < train.steps and not refreshes:
        _say(
            f"{config.stage} goes on with version {version} of the knowledge, which it has read"
            f" before; the current one is {current} (--bank_version={current})"
        )


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
