"""One of two processes that compute base log-probabilities; `test_dpo_base.py` starts it."""

import sys
from pathlib import Path

import numpy as np


def main(argv):
    from train.test_dpo_base import config_of, hold

    from m3jax import cli
    from m3jax.distributed import joined
    from m3jax.watch import Processes

    workdir, stage_folder, address, index = argv[1:]
    config = config_of("dpo", mesh__fsdp=2)
    processes = Processes(address, 2, int(index), join_timeout=600, heartbeat_timeout=20)
    with joined(processes, config, cli.show_error):
        for _ in range(2):  # computed, then stored
            values = hold(config, Path(workdir), Path(stage_folder), devices=2)
        np.save(f"{stage_folder}.npy", values)


if __name__ == "__main__":
    main(sys.argv)
