"""What a config needs on a topology: storage, bandwidth, memory, days and, with a price, cost.

    python launch/plan.py --config=configs/memory3_2b.py:stage=continual --topology=v5e:16x16 \\
        --references=1.1e8
    python launch/plan.py ... --mfu=0.5 --price_per_chip_hour=PRICE --json=plan.json

Arithmetic from the config and the data sheets of chips: nothing is run, no accelerator is needed.
"""

from __future__ import annotations

import json

from absl import flags
from ml_collections import config_flags

from m3jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, for example configs/….py.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU slice as CHIP:SHAPE, for example v5e:16x16 or v5p:4x4x8."
)
_REFERENCES = flags.DEFINE_float(
    "references", None, "References of the knowledge base, one memory each, for example 1.1e8."
)
_BYTES_PER_VECTOR = flags.DEFINE_float(
    "bytes_per_vector", 14.0, "Bytes of a compressed key or value vector; the paper stores 14."
)
_MFU = flags.DEFINE_float(
    "mfu",
    0.4,
    "Model FLOPs utilisation in training and writing, in (0, 1]: an assumption, not a measurement.",
)
_PRICE = flags.DEFINE_float(
    "price_per_chip_hour", None, "Price of one chip for one hour, in any currency; adds the costs."
)
_CHIPS_PER_HOST = flags.DEFINE_integer(
    "chips_per_host", 4, "Chips that share one host process and its network."
)
_HOST_BANDWIDTH = flags.DEFINE_float(
    "host_bandwidth",
    None,
    "Bytes/s between one host and the storage of the bank; default the network of the data sheet.",
)
_DECODE_BATCH = flags.DEFINE_integer("decode_batch", 32, "Rows decoded at once.")
_DECODE_LENGTH = flags.DEFINE_integer(
    "decode_length", None, "Tokens of a decoded row, prompt included; default data.sequence_length."
)
_JSON = flags.DEFINE_string("json", None, "Write all quantities, in base units, to this file.")


def main(argv: list[str]) -> None:
    """Prints the plan and writes its JSON."""
    from m3jax.aot.capacity import Assumptions, report, table
    from m3jax.config import validate
    from m3jax.errors import ConfigError
    from m3jax.files import write_atomically

    config = validate(_CONFIG.value)
    assumptions = Assumptions(
        topology=str(_TOPOLOGY.value),
        references=_REFERENCES.value or 0.0,
        bytes_per_vector=_BYTES_PER_VECTOR.value,
        mfu=_MFU.value,
        chips_per_host=_CHIPS_PER_HOST.value,
        host_bandwidth=_HOST_BANDWIDTH.value,
        price_per_chip_hour=_PRICE.value,
        decode_batch=_DECODE_BATCH.value,
        decode_length=_DECODE_LENGTH.value,
    )
    print(table(config, assumptions))
    if _JSON.value:
        text = json.dumps(report(config, assumptions), indent=2, ensure_ascii=False)
        try:
            write_atomically(_JSON.value, (text + "\n").encode())
        except OSError as error:
            raise ConfigError(f"--json={_JSON.value} could not be written: {error}") from error


if __name__ == "__main__":
    cli.run(main, required=["config", "topology", "references"])
