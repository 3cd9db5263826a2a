"""Reports how much of what retrieval finds stands in the text already, before any filter.

    python launch/leakage.py --config=configs/wiki_small.py --workdir=runs/wiki
    python launch/leakage.py … --against=validation --threshold=0.667
    python launch/leakage.py … --against=questions.jsonl

Prints quantiles of the overlap (Memory³ §6.1), shares above the thresholds and the worst pairs side
by side, and draws a histogram. Questions are JSON lines with `prompt` or `question`.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from m3jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, made by launch/prepare.py.")
_AGAINST = flags.DEFINE_string(
    "against", "train", "What must not leak: train, validation, or a .jsonl file of questions."
)
_SAMPLE = flags.DEFINE_integer("sample", 1000, "Most rows or questions, drawn at random.")
_THRESHOLD = flags.DEFINE_float("threshold", 0.9, "Overlap above which a reference is dropped.")
_JSON = flags.DEFINE_string("json", None, "Write the figures and examples to this file.")
_PNG = flags.DEFINE_string("png", None, "The histogram; default WORKDIR/report/leakage.png.")


def main(argv: list[str]) -> None:
    """Prints a table, draws a picture and writes JSON."""
    from m3jax.config import validate
    from m3jax.evaluation.leakage import leakage
    from m3jax.evaluation.leakage_report import picture, table
    from m3jax.files import write_atomically

    workdir = Path(str(_WORKDIR.value))
    report = leakage(
        validate(_CONFIG.value),
        workdir,
        against=str(_AGAINST.value),
        sample=int(str(_SAMPLE.value)),
        threshold=float(str(_THRESHOLD.value)),
    )
    print(table(report))
    path = Path(_PNG.value or workdir / "report" / "leakage.png")
    picture(report, path)
    print(f"\npicture: {path}")
    if _JSON.value:
        write_atomically(Path(_JSON.value), (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir"])
