"""Trains one stage of a prepared workdir, or continues it: the same command after any interruption.

    python launch/train.py --config=configs/wiki_small.py --workdir=runs/wiki
    python launch/train.py --config=configs/wiki_small.py:stage=continual \\
        --workdir=runs/wiki --init_from=runs/wiki/warmup
    python launch/train.py --config=configs/wiki_small.py:stage=sft \\
        --workdir=runs/wiki --init_from=runs/wiki/continual
    python launch/train.py --config=configs/wiki_small.py:stage=dpo \\
        --workdir=runs/wiki --init_from=runs/wiki/sft

The stages sft and dpo read what launch/prepare_chats.py has prepared. DPO first computes the
log-probabilities of the checkpoint that it starts from, once.

Checkpoints, metrics.jsonl, TensorBoard events and loss.png go to <workdir>/<stage>. SIGTERM saves
and ends with code 0. With --config.guard.on=True a run whose loss jumps, creeps up or is no number
any more goes back to a checkpoint and on with less learning rate (docs/stability.md).

Several processes run the same command on one workdir that all of them see: with --distributed on
every host of a TPU pod, elsewhere with the address of process 0:

    python launch/train.py … --coordinator=10.0.0.1:8476 --processes=2 --process_id=0
    python launch/train.py … --coordinator=10.0.0.1:8476 --processes=2 --process_id=1

A process that dies ends the others with code 3 and a message; the same command continues, with any
number of processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from m3jax import cli
from m3jax.config import validate, with_epochs

if TYPE_CHECKING:
    from m3jax.train.loop import Source

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, made by launch/prepare.py.", required=True
)
_INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "Stage folder, or checkpoints/STEP in it, whose parameters a new run starts from; a run that"
    " has a checkpoint of its own continues from that.",
)
_BANK = flags.DEFINE_string(
    "bank",
    None,
    "Folder or URL of a bank for memory.source = precomputed; default WORKDIR/bank.",
)
_VERSION = flags.DEFINE_integer(
    "bank_version",
    None,
    "Version of the knowledge, of launch/edit_bank.py list; default the one that the run has read"
    " before, for a new run the current one.",
)
_PROFILE = flags.DEFINE_string(
    "profile_steps",
    None,
    "START:STOP, the first and last step of a trace for TensorBoard or XProf, in"
    " WORKDIR/<stage>/profile.",
)
cli.define_process_flags()
cli.define_cache_flag()
flags.adopt_module_key_flags(cli)  # --help shows them


def main(argv: list[str]) -> None:
    """Joins the other processes, opens the data and trains."""
    config = validate(_CONFIG.value)  # before the slow imports
    cli.use_compilation_cache()
    from m3jax.train.profile import parse_steps

    profile_steps = None if _PROFILE.value is None else parse_steps(_PROFILE.value)
    with cli.processes(config):
        _train(config, profile_steps)


def _train(config: ConfigDict, profile_steps: tuple[int, int] | None) -> None:
    import jax

    from m3jax.checkpoint import FOLDER
    from m3jax.knowledge.versions import read_current
    from m3jax.text.tokenizer import Tokenizer
    from m3jax.train.checkpoints import knowledge_version
    from m3jax.train.guard import describe
    from m3jax.train.loop import train
    from m3jax.train.metrics import describe_time
    from m3jax.train.refresh import rewrite

    workdir = Path(str(_WORKDIR.value))
    stage = workdir / config.stage
    version = _VERSION.value
    if version is None:  # a run goes on with what it has read
        version = knowledge_version(stage)
        current = read_current(workdir)["version"]
        if version not in (None, current) and jax.process_index() == 0:
            print(
                f"{config.stage} goes on with version {version} of the knowledge, which it has read"
                f" before; the current one is {current} (--bank_version={current})"
            )
    if config.train.refresh_every and _BANK.value is not None:
        raise app.UsageError("train.refresh_every refreshes the workdir's bank; leave out --bank")

    def refresh(step: int) -> Source:
        return _source(config, rewrite(config, workdir, stage / FOLDER / str(step)).number)[0]

    source, rows = _source(config, version)
    config = with_epochs(config, rows)
    if config.train.epochs and jax.process_index() == 0:
        print(f"{config.stage}: {config.train.epochs:g} epochs are {config.train.steps} steps")
    summary = train(
        config,
        workdir,
        tokenizer_fingerprint=Tokenizer.load(workdir / "tokenizer").fingerprint,
        init_from=_INIT_FROM.value,
        refresh=refresh,
        profile_steps=profile_steps,
        **source._asdict(),
    )
    if jax.process_index() != 0:
        return
    print(f"{summary['stage']}: loss {summary['loss']:.4f} after {summary['step']} steps")
    for name, value in summary["evaluation"].items():
        print(f"  {name}: {value:.4f}")
    for rollback in summary["rollbacks"]:
        print(f"  {describe(rollback)}")
    print(f"checkpoint: {summary['checkpoint']}")
    print(f"time: {describe_time(summary['time'])}")


def _source(config: ConfigDict, version: int | None) -> tuple[Source, int]:
    """What a version of the knowledge (None: the current one) gives to read, and its rows."""
    from m3jax.data.pipeline import open_pipeline
    from m3jax.mesh import make_mesh
    from m3jax.train.dpo_base import hold_reference
    from m3jax.train.evaluator import evaluator
    from m3jax.train.loop import Source

    workdir, bank = str(_WORKDIR.value), _BANK.value
    pipeline = open_pipeline(config, workdir, split="train", bank=bank, version=version)
    mesh = make_mesh(config)
    evaluate = evaluator(config, workdir, bank=bank, version=version, mesh=mesh)
    if config.data.packing == "pairs":
        pipelines = {"train": pipeline, "validation": evaluate.pipeline}
        hold_reference(config, Path(workdir) / config.stage, pipelines, _INIT_FROM.value, mesh)
    writer = None if pipeline.bank is None else pipeline.bank.writer
    number = None if pipeline.version is None else pipeline.version.number
    return Source(pipeline, evaluate, writer, number), len(pipeline.rows)


if __name__ == "__main__":
    cli.run(main, required=["config"])
