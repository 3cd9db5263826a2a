"""Shapes of the paper's size, for a pod (Memory³ §3: L:H near 1 learned fastest).

    python launch/sweep.py --sweep=configs/sweeps/shapes.py --workdir=/mnt/m3/sweep \\
        --data=/mnt/m3/run --dry_run

prints what trains the warmup of each. The shapes are ours, with 2.1 to 2.4B parameters: the paper
does not say which it compared. Runs are as long as those of configs/memory3.py; `changes` would
make them shorter. None of them has been run yet.
"""

from configs.ablation import SHAPES
from m3jax.sweep.spec import Entry, Sweep

BASE = "base=memory3_2b"


def get_sweep() -> Sweep:
    """The sweep."""
    shapes = [Entry(f"shape-{shape}", options=f"{BASE},shape={shape}") for shape in SHAPES]
    entries = [Entry("shape-44x40x80", options=BASE), *shapes]
    return Sweep(
        config="configs/ablation.py",
        entries=[_warmup(entry) for entry in entries],
    )


def _warmup(entry: Entry) -> Entry:
    return Entry(entry.name, options=entry.options, stages=("warmup",), group="layers x heads")
