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

from absl import flags
from ml_collections import config_flags

from m3jax import cli
from m3jax.config import validate

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
    """Joins the other processes and trains."""
    config = validate(_CONFIG.value)  # before the slow imports
    cli.use_compilation_cache()
    from m3jax.train.profile import parse_steps
    from m3jax.train.stage import train_stage

    profile = None if _PROFILE.value is None else parse_steps(_PROFILE.value)
    with cli.processes(config):
        import jax

        summary = train_stage(
            config,
            str(_WORKDIR.value),
            init_from=_INIT_FROM.value,
            bank=_BANK.value,
            version=_VERSION.value,
            profile=profile,
        )
        if jax.process_index() == 0:
            print(summary)


if __name__ == "__main__":
    cli.run(main, required=["config"])
