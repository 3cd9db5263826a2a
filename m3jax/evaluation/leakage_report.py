"""Shows the leakage report: a table with examples side by side, and a histogram."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from m3jax.figures import AMBER, BLUE, INK, PINK, SOFT, finish_axes, save_figure

_COLUMN = 52  # characters of a column of examples
_BANDS = {
    0.0: (BLUE, "read in training and evaluation"),
    2 / 3: (AMBER, "dropped in evaluation (above 2/3)"),
    0.9: (PINK, "dropped in training too (above 0.9)"),
}


def leakage_table(report: dict[str, Any]) -> str:
    """Returns the report as Markdown, examples side by side."""
    above = ", ".join(f"{share:.2%} above {limit}" for limit, share in report["above"].items())
    lines = [
        f"{report['pairs']} references found by {report['queries']} chunks of {report['texts']}"
        f" texts ({report['against']}), without filter",
        "",
        "| quantile | " + " | ".join(report["quantiles"]) + " |",
        "|---|" + "---|" * len(report["quantiles"]),
        "| overlap | " + " | ".join(f"{x:.3f}" for x in report["quantiles"].values()) + " |",
        "",
        f"Of the references found: {above}.",
        f"Of the chunks: {report['queries_leaking']:.2%} find first a reference above"
        f" {report['threshold']:.3g}, {report['queries_emptied']:.2%} find nothing else.",
    ]
    for kind in ("dropped", "kept"):
        for example in report[kind]:
            title = f"{example['title']} ({example['key']}) with {example['name']}"
            lines += ["", f"{kind}, overlap {example['overlap']:.3f}: {title}"]
            lines += _side_by_side(example["reference"], example["text"])
    return "\n".join(lines)


def _side_by_side(reference: str, text: str) -> list[str]:
    columns = [
        [name, *textwrap.wrap(shown.strip(), _COLUMN, max_lines=7, placeholder=" …")]
        for name, shown in (("REFERENCE", reference), ("TEXT", text))
    ]
    both = itertools.zip_longest(*columns, fillvalue="")
    return [f"    {left:<{_COLUMN}} │ {right}" for left, right in both]


def leakage_histogram(report: dict[str, Any], path: str | Path) -> None:
    """Draws the histogram of the overlap as a PNG, coloured by what the paper's limits drop.

    Args:
      report: of `m3jax.evaluation.leakage.leakage`.
      path: the PNG, written atomically.
    """
    counts = np.array(report["histogram"])
    shares, edges = counts / counts.sum(), np.linspace(0, 1, len(counts) + 1)
    figure = Figure(figsize=(9, 4.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    middles, width = (edges[:-1] + edges[1:]) / 2, edges[1]
    ends = [*list(_BANDS)[1:], 1.0]
    for (begin, (colour, label)), end in zip(_BANDS.items(), ends, strict=True):
        inside = (middles > begin) & (middles < end)
        of_band = _share(report["above"], begin) - _share(report["above"], end)
        axes.bar(
            middles[inside],
            shares[inside],
            0.9 * width,
            color=colour,
            label=f"{of_band:.1%} {label}",
        )
    _decorate(axes, report)
    save_figure(figure, path, dpi=150)


def _share(above: dict[str, float], limit: float) -> float:
    """Share of pairs above one of the limits that every report has."""
    return 1.0 - limit if limit in (0.0, 1.0) else above[f"{limit:.3g}"]


def _decorate(axes: Axes, report: dict[str, Any]) -> None:
    axes.axvline(report["threshold"], color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"threshold {report['threshold']:.3g}",
        (report["threshold"], 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-5, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=INK,
        fontsize=9,
    )
    axes.set_xlim(0, 1)
    axes.set_xlabel("overlap of a reference found with the text (Memory³ §6.1)", color=INK)
    axes.set_ylabel("share of references found", color=INK)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    finish_axes(axes, "y", ("top", "right", "left"))
    axes.spines["bottom"].set_color(SOFT)
    axes.tick_params(colors=INK, labelsize=9, left=False)
    axes.set_ylim(top=1.12 * axes.get_ylim()[1])
    axes.legend(
        loc="upper center",
        fontsize=10,
        labelcolor=INK,
        facecolor="white",
        edgecolor="white",
        framealpha=1,
    )
    axes.set_title(
        f"What retrieval finds for {report['texts']} texts ({Path(report['against']).name}),"
        " before the filter",
        loc="left",
        color=INK,
        fontsize=13,
        pad=12,
    )
