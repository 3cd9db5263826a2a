"""Writes the bank: one explicit memory for every reference of a prepared workdir.

    python launch/write_bank.py --config=configs/wiki_small.py --workdir=runs/wiki

The checkpoint's writer encodes: the checkpoint itself, or, for one that was trained on memories of
another checkpoint, that one. Killed at any moment, the same command goes on with what is missing.

Several processes run the same command on a workdir and bank that all of them see, started as those
of launch/train.py: with --distributed on every host of a TPU pod, elsewhere with --coordinator,
--processes and --process_id. Each encodes on its own devices and writes its share of the shards.

After more training the memories are not what the checkpoint would write now:

    python launch/write_bank.py --refresh=measure --config=… --workdir=runs/wiki
    python launch/write_bank.py --refresh=all     --config=… --workdir=runs/wiki
    python launch/write_bank.py --refresh=worst   --config=… --workdir=runs/wiki --share=0.25

The first says how far they are from those and whether a rewrite pays; the others make a version
(launch/edit_bank.py list, rollback) written by the checkpoint itself, or in which it has written
those that the first memory layer alone finds most changed.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from m3jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, made by launch/prepare.py.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Stage folder, or checkpoints/STEP in it; default WORKDIR/warmup."
)
_REFERENCES = flags.DEFINE_string(
    "references", None, "Folder of the references; default WORKDIR/references."
)
_BANK = flags.DEFINE_string("bank", None, "Folder or bucket to write; default WORKDIR/bank.")
_BASE = flags.DEFINE_string(
    "base", None, "Older bank of the same writer: memories of unchanged references are copied."
)
_REFRESH = flags.DEFINE_enum(
    "refresh",
    None,
    ["measure", "all", "worst"],
    "Compare the current version's bank with what --checkpoint (default WORKDIR/<config.stage>)"
    " writes, or make a version that it has written.",
)
_SHARE = flags.DEFINE_float(
    "share", 0.25, "--refresh=worst: share of the references to write anew.", 0.0, 1.0
)
_SAMPLE = flags.DEFINE_integer("sample", 512, "--refresh=measure: references to compare.", 1)
_JSON = flags.DEFINE_string("json", None, "--refresh=measure: write the figures to this file.")
cli.define_process_flags()
cli.define_cache_flag()
flags.adopt_module_key_flags(cli)  # --help shows them


def main(argv: list[str]) -> None:
    """Joins the other processes, restores the writer and writes what is missing."""
    from m3jax.config import validate
    from m3jax.memory.storage import require_writable

    config = validate(_CONFIG.value)
    require_writable(_BANK.value or "")
    cli.use_compilation_cache()
    with cli.processes(config):
        (_write if _REFRESH.value is None else _refresh)(config, Path(str(_WORKDIR.value)))


def _write(config: ConfigDict, workdir: Path) -> None:
    import jax

    from m3jax.knowledge.memory_writer import MemoryWriter
    from m3jax.knowledge.versions import require_unedited
    from m3jax.memory.bank import Bank
    from m3jax.text.references import References

    if _BANK.value is None:
        require_unedited(workdir)
    references = References.open(_REFERENCES.value or workdir / "references")
    base = None if _BASE.value is None else Bank.open(_BASE.value)
    write = MemoryWriter(config, workdir, _CHECKPOINT.value or workdir / "warmup")
    folder = _BANK.value or workdir / "bank"
    report = write(references, folder, base)
    if jax.process_index() != 0:
        return
    _, path, step = write.restore(references.tokenizer_fingerprint)
    print(
        f"bank {folder}: {report['references']} memories by {path} step {step};"
        f" {report['encoded']} encoded, {report['copied']} copied, {report['kept']} there before;"
        f" {report['seconds']:.1f} s, {report['memories_per_second']:.0f} memories a second,"
        f" {report['encode_share']:.0%} of the time encoding"
    )


def _refresh(config: ConfigDict, workdir: Path) -> None:
    import jax

    from m3jax.evaluation import staleness
    from m3jax.files import write_atomically
    from m3jax.train import refresh

    if jax.process_count() > 1:
        raise app.UsageError("--refresh is the work of one process, with all devices of its host")
    for flag in (_REFERENCES, _BANK, _BASE):
        if flag.value is not None:
            raise app.UsageError(f"--refresh reads the workdir's version; leave out --{flag.name}")
    checkpoint = Path(_CHECKPOINT.value or workdir / config.stage)
    if _REFRESH.value == "measure":
        found = staleness.measure(config, workdir, checkpoint, sample=int(_SAMPLE.value or 1))
        print(staleness.table(found))
        if _JSON.value:
            figures = {**dataclasses.asdict(found), "verdict": found.verdict}
            write_atomically(_JSON.value, (json.dumps(figures, indent=2) + "\n").encode())
        return
    share = 1.0 if _REFRESH.value == "all" else float(_SHARE.value or 0.0)
    version = refresh.rewrite(config, workdir, checkpoint, share=share)
    print(f"{workdir}: version {version.number} is current ({version.note})")


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir"])
