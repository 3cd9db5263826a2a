"""Look of all pictures: one palette, one style of axes, PNG files that are whole or absent."""

from __future__ import annotations

import os

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m3jax.files import committing

INK, SOFT, GRID = "#22303c", "#7d8b99", "#e6eaed"  # text; quiet lines and edges; the grid
TEAL, PALE, PINK = "#0b7a75", "#b8c4cc", "#b8336a"  # the subject; what it is compared with; bad
BLUE, AMBER, GREEN, ORANGE, RED = "#2f6fb3", "#d99a2b", "#2a9d76", "#d9622b", "#c0392b"


def finish_axes(axes: Axes, grid: str = "both", hidden: tuple[str, ...] = ("top", "right")) -> None:
    """Draws a grid behind the data along the axes `grid` names, and hides edges."""
    axes.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[list(hidden)].set_visible(False)


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 130) -> None:
    """Writes a PNG atomically; the same figure gives the same bytes."""
    with committing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
