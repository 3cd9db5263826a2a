"""Makes the quickstart's model a chat model: SFT on generated chats, DPO on generated preferences.

    python launch/quickstart.py
    python launch/quickstart_chat.py

The report (CHAT.md, chat.json) is in WORKDIR/report. Stopped at any moment, the same command goes
on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags, logging

from m3jax import cli

_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder of a finished quickstart.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of that quickstart.")


def main(argv: list[str]) -> None:
    """Runs both stages and prints the report."""
    logging.set_verbosity(logging.ERROR)
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/, which is not installed
    from configs import quickstart as config
    from m3jax.quickstart.chat import run
    from m3jax.quickstart.run import Demonstration

    workdir = Path(_WORKDIR.value).absolute()
    run(Demonstration(config.get_config, workdir, dict(config.WORLD), _SEED.value))
    report = workdir / "report" / "CHAT.md"
    print(report.read_text(encoding="utf-8"))
    print(f"report: {report}")


if __name__ == "__main__":
    cli.run(main)
