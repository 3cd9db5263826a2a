"""Plans a config on a topology: storage, bandwidth, memory, days and, with a price, cost.

    python launch/plan.py --config=configs/memory3.py:stage=continual --topology=v5e:16x16 \\
        --references=1.1e8
    python launch/plan.py … --mfu=0.5 --price_per_chip_hour=1.20 --json=plan.json

Arithmetic from the config and the data sheets of chips: nothing is run, no accelerator is needed.
"""

from __future__ import annotations

from absl.flags import FlagValues

from m3jax import cli
from m3jax.cli import Flag
from m3jax.printable import complain

COMMANDS = cli.Commands()
# Fields of `Assumptions`, by their names.
ASSUMPTIONS = (
    Flag("topology", "TPU slice, CHIP:SHAPE, for example v5e:16x16 or v5p:4x4x8.", required=True),
    Flag("references", "References, one memory each, for example 1.1e8.", float, required=True),
    Flag("bytes_per_vector", "Bytes of a compressed vector; the paper stores 14.", float, 14.0),
    Flag("mfu", "Assumed model FLOPs utilisation in training and writing, in (0, 1].", float, 0.4),
    Flag("price_per_chip_hour", "Price of a chip, in any currency; adds the costs.", float),
    Flag("chips_per_host", "Chips that share one host process and its network.", int, 4),
    Flag("host_bandwidth", "Bytes/s of a host from the bank; default its network's.", float),
    Flag("decode_batch", "Rows generated at once.", int, 32),
    Flag("decode_length", "Tokens of a generated row; default data.sequence_length.", int),
)


@COMMANDS.add(cli.CONFIG, *ASSUMPTIONS, cli.JSON.with_help("All quantities, in base units."))
def main(given: FlagValues) -> None:
    """Prints the plan and writes its JSON."""
    from m3jax.aot.capacity import (
        Assumptions,
        bucket_warning,
        capacity_report,
        capacity_table,
    )

    assumptions = Assumptions(**cli.values_of(given, ASSUMPTIONS))
    cli.show(
        capacity_table(given.config, assumptions),
        capacity_report(given.config, assumptions),
        given.json,
    )
    if warning := bucket_warning(given.config, assumptions):
        complain(warning)


if __name__ == "__main__":
    cli.run(__doc__, COMMANDS)
