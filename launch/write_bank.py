"""Writes the bank: one explicit memory for every reference of a prepared workdir.

    python launch/write_bank.py --config=configs/wiki_small.py --workdir=runs/wiki

The checkpoint's writer encodes: the checkpoint itself, or, for one that was trained on memories of
another checkpoint, that one. Killed at any moment, the same command goes on with what is missing.

Several processes run the same command on a workdir and bank that all of them see, started as those
of launch/train.py: with --distributed on every host of a TPU pod, elsewhere with --coordinator,
--processes and --process_id. Each encodes on its own devices and writes its share of the shards.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from m3jax import launching

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
launching.define_process_flags()
launching.define_cache_flag()
flags.adopt_module_key_flags(launching)  # --help shows them


def main(argv: list[str]) -> None:
    """Joins the other processes, restores the writer and writes what is missing."""
    from m3jax.config import validate
    from m3jax.memory.storage import require_writable

    config = validate(_CONFIG.value)
    require_writable(_BANK.value or "")
    launching.use_compilation_cache()
    with launching.processes(config):
        _write(config, Path(str(_WORKDIR.value)))


def _write(config: ConfigDict, workdir: Path) -> None:
    import jax

    from m3jax.config import PREFIX_TOKENS
    from m3jax.data.knowledge import require_unedited
    from m3jax.memory.bank import Bank
    from m3jax.memory.write import write_bank
    from m3jax.mesh import writer_mesh
    from m3jax.model.transformer import Model
    from m3jax.text.references import References
    from m3jax.train.writer import restore_writer

    if _BANK.value is None:
        require_unedited(workdir)
    references = References.open(_REFERENCES.value or workdir / "references")
    tokenizer = references.tokenizer_fingerprint
    model = Model(config, PREFIX_TOKENS, writer_mesh(config))
    checkpoint = Path(_CHECKPOINT.value or workdir / "warmup")
    params, path, step = restore_writer(checkpoint, model, tokenizer)
    folder = _BANK.value or workdir / "bank"
    report = write_bank(
        config,
        model,
        params,
        references,
        folder,
        tokenizer_fingerprint=tokenizer,
        prefix_tokens=PREFIX_TOKENS,
        writer_path=str(path),
        writer_step=step,
        base=None if _BASE.value is None else Bank.open(_BASE.value),
    )
    if jax.process_index() != 0:
        return
    print(
        f"bank {folder}: {report['references']} memories by {path} step {step};"
        f" {report['encoded']} encoded, {report['copied']} copied, {report['kept']} there before;"
        f" {report['seconds']:.1f} s, {report['memories_per_second']:.0f} memories a second,"
        f" {report['encode_share']:.0%} of the time encoding"
    )


if __name__ == "__main__":
    launching.run(main, required=["config", "workdir"])
