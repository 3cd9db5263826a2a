"""Shows on a laptop that facts live in the bank: two stages, a bank, edits; then a report.

    python launch/quickstart.py
    python launch/quickstart.py --seed=1 --workdir=runs/seed1

The report (README.md, summary.json, pictures) is in WORKDIR/report. Stopped at any moment, the same
command goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags, logging

from m3jax import cli

_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder for everything it makes.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of people, parameters and data order.")
_FROM_SCRATCH = flags.DEFINE_bool(
    "compare_from_scratch",
    False,
    "Also train with memory from the start, at equal compute (Memory³ §6.1); doubles the time.",
)


def main(argv: list[str]) -> None:
    """Runs the demonstration."""
    logging.set_verbosity(logging.ERROR)
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/, which is not installed
    from configs import quickstart as config
    from m3jax.quickstart.run import Demonstration, run

    workdir = Path(_WORKDIR.value).absolute()
    demonstration = Demonstration(config.get_config, workdir, dict(config.WORLD), _SEED.value)
    run(demonstration, compare_from_scratch=_FROM_SCRATCH.value)
    report = workdir / "report" / "README.md"
    print(report.read_text(encoding="utf-8"))
    print(f"report: {report}")


if __name__ == "__main__":
    cli.run(main)
