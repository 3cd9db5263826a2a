"""Writes the bank: one explicit memory for every reference of a prepared workdir.

    python launch/write_bank.py --config=configs/wiki_small.py --workdir=runs/wiki

The checkpoint's writer encodes: the checkpoint itself, or, for one that was trained on memories of
another checkpoint, that one. Killed at any moment, the same command goes on with what is missing.

Several processes run the same command on a workdir and bank that all of them see, on a shared disk
or in a bucket (gs://…), started as processes of launch/train.py: with --distributed on every host
of a TPU pod, elsewhere with --coordinator, --processes and --process_id. Each encodes on its own
devices and writes its share of the shards.

After more training the memories are not what the checkpoint would write now:

    python launch/write_bank.py --refresh=measure --config=… --workdir=runs/wiki
    python launch/write_bank.py --refresh=all     --config=… --workdir=runs/wiki
    python launch/write_bank.py --refresh=worst   --config=… --workdir=runs/wiki --share=0.25

The first says how far they are from that and whether a rewrite pays; the others make a version
(launch/edit_bank.py list, rollback) written by the checkpoint itself, all of it or the references
that the first memory layer alone finds most changed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from absl.flags import FlagValues

from m3jax import cli, places
from m3jax.cli import Flag, count, share

COMMANDS = cli.Commands()


@COMMANDS.add(
    *cli.BUCKET_RUN,
    cli.CHECKPOINT.with_help("Default WORKDIR/warmup; with --refresh that of the stage."),
    Flag("references", "Folder of the references; default WORKDIR/references.", places.FOLDER),
    dataclasses.replace(cli.BANK, kind=places.NEW_BANK),
    Flag(
        "base",
        "Older bank of the writer: memories of unchanged references are copied.",
        places.BANK,
    ),
    Flag(
        "refresh",
        "Compare the current version's bank with what --checkpoint writes, or make a version that"
        " it has written.",
        choices=("measure", "all", "worst"),
    ),
    share("share", "--refresh=worst: share of the references to write anew.", 0.25),
    count("sample", "--refresh=measure: references to compare.", 512),
    cli.JSON.with_help("With --refresh=measure."),
    *cli.PROCESSES,
    cli.CACHE,
)
def main(given: FlagValues) -> None:
    """Joins the other processes and writes missing memories, or refreshes."""
    from m3jax.memory.storage import require_writable

    require_writable(given.bank or "")
    with cli.processes(given):
        (write if given.refresh is None else refresh)(given)


def write(given: FlagValues) -> None:
    """Writes missing memories with the checkpoint's writer."""
    import contextlib

    import jax

    from m3jax.knowledge.memory_writer import MemoryWriter
    from m3jax.knowledge.versions import existing, require_unedited
    from m3jax.memory.bank import Bank
    from m3jax.mirror import Mirror
    from m3jax.region import warn_of_regions
    from m3jax.text.references import References

    mirror = Mirror(given.workdir, given.cache_dir)
    if jax.process_index() == 0:
        warn_of_regions(given.workdir, given.bank)
    workdir, folder = existing(mirror.local), given.bank or mirror.url("bank")
    # Then it is a part of the knowledge, which is not edited meanwhile.
    own = _resolved(folder) == _resolved(mirror.url("bank"))
    alone = own and jax.process_index() == 0
    with mirror.only_writer() if alone else contextlib.nullcontext():
        if own:
            require_unedited(workdir)
        if not given.references:
            mirror.fetch("references")
        references = References(given.references or workdir / "references")
        base = None if given.base is None else Bank.open(given.base)
        checkpoint = given.checkpoint or mirror.url("warmup")
        writer = MemoryWriter(given.config, workdir, checkpoint)
        report = writer(references, folder, base)
    if jax.process_index() != 0:
        return
    written = writer.restore(references.tokenizer_fingerprint)
    print(
        f"bank {folder}: {report['references']} memories by {written.folder} step"
        f" {written.step}; {report['encoded']} encoded, {report['copied']} copied,"
        f" {report['kept']} there before;"
        f" {report['seconds']:.1f} s, {report['memories_per_second']:.0f} memories a second,"
        f" {report['encode_share']:.0%} of the time encoding"
    )


def _resolved(folder: Path | str) -> Path | str:
    """Returns the absolute path of a local folder, or a URL as it is."""
    return str(folder).rstrip("/") if "://" in str(folder) else Path(folder).resolve()


def refresh(given: FlagValues) -> None:
    """Measures how stale the memories are, or rewrites them as a version."""
    import jax

    from m3jax.errors import CommandError
    from m3jax.evaluation import staleness
    from m3jax.mirror import Mirror
    from m3jax.train.refresh import rewrite

    if jax.process_count() > 1:
        raise CommandError("--refresh is the work of one process, with all devices of its host")
    for name in ("references", "bank", "base"):
        if given[name].value is not None:
            raise CommandError(f"--refresh reads the workdir's version; leave out --{name}")
    mirror = Mirror(given.workdir, given.cache_dir)
    workdir, checkpoint = mirror.local, given.checkpoint or mirror.url(given.config.stage)
    if given.refresh == "measure":
        measured = staleness.measure_staleness(
            given.config, workdir, checkpoint, sample=given.sample
        )
        figures = {**dataclasses.asdict(measured), "verdict": measured.verdict}
        cli.show(staleness.staleness_table(measured), figures, given.json)
        return
    share = 1.0 if given.refresh == "all" else given.share
    version = rewrite(given.config, workdir, checkpoint, share=share)
    print(f"{mirror.place}: version {version.number} is current ({version.note})")


if __name__ == "__main__":
    cli.run(__doc__, COMMANDS)
