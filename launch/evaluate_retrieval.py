"""Measures how often retrieval finds a reference that holds the answer.

    python launch/evaluate_retrieval.py --config=configs/wiki_small.py --workdir=runs/wiki \\
        --questions=questions.jsonl

Questions are JSON lines with `question` and `answer` (a string or a list; `aliases` count, too).
Hits are counted among the questions that the knowledge base can answer: those with an answer in any
reference, as a run of whole words.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from m3jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, made by launch/prepare.py.")
_QUESTIONS = flags.DEFINE_string("questions", None, "Questions with answers (JSON lines).")
_AT = flags.DEFINE_list("at", ["1", "5"], "How many references count.")
_VERSION = flags.DEFINE_integer(
    "bank_version", None, "Version of the knowledge, of launch/edit_bank.py list; default current."
)
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")

flags.register_validator(
    "at",
    lambda sizes: bool(sizes) and all(size.isdigit() and int(size) for size in sizes),
    "a list of numbers of at least 1, for example 1,5",
)


def main(argv: list[str]) -> None:
    """Prints a table and writes JSON."""
    from m3jax.config import validate
    from m3jax.evaluation.answer_recall import hit_rates, table
    from m3jax.files import write_atomically

    report = hit_rates(
        validate(_CONFIG.value),
        str(_WORKDIR.value),
        str(_QUESTIONS.value),
        at=sorted(int(size) for size in _AT.value or []),
        version=_VERSION.value,
    )
    print(table(report))
    if _JSON.value:
        write_atomically(Path(_JSON.value), (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir", "questions"])
