"""Trains one stage of a prepared workdir, or continues it: the same command after any interruption.

    python launch/train.py --config=configs/wiki_small.py --workdir=runs/wiki
    python launch/train.py --config=configs/wiki_small.py:stage=continual \\
        --workdir=runs/wiki --init_from=runs/wiki/warmup
    python launch/train.py --config=configs/wiki_small.py:stage=sft \\
        --workdir=runs/wiki --init_from=runs/wiki/continual
    python launch/train.py --config=configs/wiki_small.py:stage=dpo \\
        --workdir=runs/wiki --init_from=runs/wiki/sft

The stages sft and dpo read what `launch/prepare.py chats` has prepared. DPO first computes the
log-probabilities of the checkpoint that it starts from, once.

Checkpoints, metrics.jsonl, TensorBoard events and loss.png go to <workdir>/<stage>. SIGTERM and
Ctrl-C save and end with code 0. With --config.guard.on=True a run whose loss jumps, creeps up or
is no number any more goes back to a checkpoint and on with less learning rate (docs/stability.md).

Several processes run the same command on one workdir that all of them see, a folder on a shared
disk or in a bucket (gs://…, with pip install -e '.[gcs]'): with --distributed on every host of a
TPU pod, elsewhere with the address of process 0:

    python launch/train.py … --coordinator=10.0.0.1:8476 --processes=2 --process_id=0
    python launch/train.py … --coordinator=10.0.0.1:8476 --processes=2 --process_id=1

A process that dies ends the others with code 3 and a message; the same command continues, with any
number of processes.
"""

from __future__ import annotations

from absl.flags import FlagValues

from m3jax import cli, places
from m3jax.cli import Flag

COMMANDS = cli.Commands()


@COMMANDS.add(
    *cli.BUCKET_RUN,
    Flag(
        "init_from",
        "Stage folder, or checkpoints/STEP in it, whose parameters a new run starts from; a run"
        " that has a checkpoint of its own continues from that.",
        places.CHECKPOINT,
    ),
    cli.BANK.with_help("For memory.source = precomputed."),
    Flag(
        "bank_version",
        "Version of the knowledge, of launch/edit_bank.py list; default the one that the run has"
        " read before, for a new run the current one.",
        int,
    ),
    Flag(
        "profile_steps",
        "START:STOP, the first and last step of a trace for TensorBoard or XProf, in"
        " WORKDIR/<stage>/profile.",
    ),
    *cli.PROCESSES,
    cli.CACHE,
)
def main(given: FlagValues) -> None:
    """Joins the other processes and trains."""
    from m3jax.mirror import Mirror
    from m3jax.region import warn_of_regions
    from m3jax.train.hooks import parse_steps
    from m3jax.train.stage import train_stage

    profile = None if given.profile_steps is None else parse_steps(given.profile_steps)
    with cli.processes(given):
        import jax

        if jax.process_index() == 0:
            warn_of_regions(given.workdir, given.bank)
        summary = train_stage(
            given.config,
            Mirror(given.workdir, given.cache_dir).local,
            init_from=given.init_from,
            bank=given.bank,
            version=given.bank_version,
            profile=profile,
        )
        if jax.process_index() == 0:
            print(summary)


if __name__ == "__main__":
    cli.run(__doc__, COMMANDS)
