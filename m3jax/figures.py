"""Common look of all figures: palette, style of axes, PNG files that are written atomically."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from m3jax.files import committing

INK, SOFT, GRID = "#22303c", "#7d8b99", "#e6eaed"  # text; secondary lines, edges; grid
TEAL, PALE, PINK = "#0b7a75", "#b8c4cc", "#b8336a"  # main series; baseline; limits or bad
BLUE, AMBER, GREEN, ORANGE, RED = "#2f6fb3", "#d99a2b", "#2a9d76", "#d9622b", "#c0392b"
REFERENCE_LINE: dict[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1.2}  # baselines

_STYLE: Any = {
    **{f"{name}.color": INK for name in ("text", "xtick", "ytick")},
    "axes.axisbelow": True,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "figure.constrained_layout.use": True,
    "grid.color": GRID,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "ytick.left": False,
}


@contextlib.contextmanager
def drawing(path: str | os.PathLike[str], width: float, height: float) -> Iterator[Figure]:
    """Yields an empty figure, and saves it as a PNG when the block ends without an error.

    Everything drawn inside the block has the common style. Equal figures give equal bytes.

    Args:
      path: PNG file, written atomically.
      width, height: inches.
    """
    with matplotlib.rc_context(_STYLE), committing(path) as temporary:
        figure = Figure(figsize=(width, height))
        yield figure
        figure.savefig(temporary, format="png", metadata={"Software": None})
