"""Evaluates a checkpoint: loss and accuracy with memory, without, and with wrong memories.

    python launch/evaluate.py --config=configs/wiki_small.py:stage=continual --workdir=runs/wiki
    python launch/evaluate.py … --questions=questions.jsonl

Losses are those of `corpus/validation` at `evaluation.shift` 1 unless --shift says otherwise: a
chunk's memories are found with the text before it. Questions are JSON lines with `prompt` and
`answer`.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from m3jax import launching

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, made by launch/prepare.py.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Stage folder, or checkpoints/STEP in it; default WORKDIR/<config.stage>."
)
_BANK = flags.DEFINE_string(
    "bank", None, "Folder or URL of a bank of explicit memories; default WORKDIR/bank."
)
_VERSION = flags.DEFINE_integer(
    "bank_version",
    None,
    "Version of the knowledge, of launch/edit_bank.py list; default current.",
)
_SHIFT = flags.DEFINE_enum(
    "shift",
    None,
    ["0", "1"],
    "Whose text retrieves a chunk's memories: 0 its own, 1 the previous chunk's; default from the"
    " config, 1.",
)
_QUESTIONS = flags.DEFINE_string("questions", None, "Also answer these questions (JSON lines).")
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
launching.define_cache_flag()
flags.adopt_module_key_flags(launching)  # --help shows them


def main(argv: list[str]) -> None:
    """Prints a table and writes JSON."""
    launching.use_compilation_cache()
    from m3jax.config import validate
    from m3jax.evaluation.report import evaluate, table
    from m3jax.text.files import write_atomically

    config = _CONFIG.value
    if _SHIFT.value is not None:
        with config.unlocked():
            config.evaluation.shift = int(_SHIFT.value)
    report = evaluate(
        validate(config),
        Path(str(_WORKDIR.value)),
        checkpoint=_CHECKPOINT.value,
        bank=_BANK.value,
        questions=_QUESTIONS.value,
        version=_VERSION.value,
    )
    print(table(report))
    if _JSON.value:
        write_atomically(Path(_JSON.value), (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    launching.run(main, required=["config", "workdir"])
