"""Plots the results of evaluations as PNG files."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle

from m3jax.figures import GRID, INK, PALE, PINK, REFERENCE_LINE, SOFT, TEAL, drawing
from m3jax.printable import as_label


def accuracy_bars(
    path: Path,
    accuracy: dict[str, float],
    labels: dict[str, str],
    chance: float | None,
    title: str,
    axis: str = "share of right answers",
    coloured: Container[str] | None = None,
) -> None:
    """Plots one bar per condition, coloured if above 0.5, and chance as a vertical line.

    Args:
      path: PNG to write.
      accuracy: condition → share of right answers.
      labels: condition → label of its bar, in order from top to bottom.
      chance: accuracy of guessing; None if there is none.
      title: of the plot.
      axis: label of the axis.
      coloured: conditions with coloured bars, instead of those above 0.5.
    """
    shares = {labels[name]: accuracy[name] for name in labels if name in accuracy}
    right = [label for label, share in shares.items() if share > 0.5]
    if coloured is not None:
        right = [labels[name] for name in accuracy if name in coloured and name in labels]
    most = 1.09 if chance is not None else max(1.15 * max(shares.values()), 0.01)
    with drawing(path, 8, 0.55 * len(shares) + 1.6) as figure:
        axes = figure.subplots()
        _bars(axes, shares, right, [f"{share:.3f}" for share in shares.values()], chance)
        if chance is not None:
            axes.text(chance + 0.006, -0.72, f"chance {chance:.3f}", fontsize=9, va="center")
        axes.set(xlim=(0, most), ylim=(len(shares) - 0.5, -1), title=title)
        axes.set_xlabel(axis)


def speed_bars(
    path: Path,
    tokens_per_second: dict[str, float],
    first_token: dict[str, float],
    title: str,
    none: str = "none",
    *with_memory: str,
) -> None:
    """Plots the tokens per second of each mode, with the time to the first token beside the bar.

    Args:
      path: PNG to write.
      tokens_per_second: mode → tokens per second; that of `none` is also drawn as a line.
      first_token: mode → seconds to the first token, for modes where it was measured.
      title: of the plot.
      none, *with_memory: modes that read nothing, and memories; default those of the quickstart.
    """
    texts = [
        f"{speed:.1f}"
        + (f"   first token {first_token[mode]:.1f} s" if mode in first_token else "")
        for mode, speed in tokens_per_second.items()
    ]
    coloured = with_memory or ("explicit", "compressed", "cold")
    with drawing(path, 8, 0.55 * len(texts) + 1.6) as figure:
        axes = figure.subplots()
        _bars(axes, tokens_per_second, coloured, texts, tokens_per_second.get(none))
        most = max(tokens_per_second.values())
        axes.set(xlim=(0, 1.35 * most), ylim=(len(texts) - 0.4, -0.6), title=title)
        axes.set_xlabel("tokens a second, search and loading included")


def _bars(
    axes: Axes,
    values: Mapping[str, float],
    coloured: Container[str],
    texts: Sequence[str],
    line: float | None,
) -> None:
    """Draws horizontal bars with texts at their ends, and a vertical line for comparison."""
    colours = [TEAL if name in coloured else PALE for name in values]
    bars = axes.barh(list(values), list(values.values()), 0.62, color=colours)
    over_line = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.bar_label(bars, texts, padding=5, bbox=over_line)
    if line is not None:
        axes.axvline(line, **REFERENCE_LINE)


def needle_lines(path: Path, report: dict[str, Any]) -> None:
    """Plots the share of needles answered over the length of the text, with and without memory.

    Args:
      path: PNG to write.
      report: of `needle.needle_test`.
    """
    lengths, context = report["lengths"], report["context_tokens"]
    with drawing(path, 8, 4.2) as figure:
        axes = figure.subplots()
        for name, label, colour in (
            ("memory", "older text retrieved", TEAL),
            ("window", "older text forgotten", INK),
        ):
            axes.plot(lengths, report[name], color=colour, marker="o", linewidth=1.8)
            axes.text(lengths[-1], report[name][-1], f"   {label}", color=colour, va="center")
        axes.axvline(context, **REFERENCE_LINE)
        axes.text(context, 1.06, " the model's context", fontsize=9, va="center")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set(xlim=(min(context, lengths[0]) / 1.3, lengths[-1] * 4), ylim=(-0.03, 1.1))
        axes.set(xlabel="tokens of the text", ylabel="share of needles found")
        axes.set_title(f"A fact in a long text, {report['count']} texts of each length")
        axes.grid(axis="y")
        axes.minorticks_off()


def head_map(
    path: Path,
    increase: np.ndarray,
    title: str,
    *,
    chosen: Sequence[tuple[int, int]] = (),
    layers: Container[int] = (),
) -> None:
    """Plots the rise of the loss by layer and head as a heat map; chosen heads have a frame.

    Args:
      path: PNG to write.
      increase: `(layers, heads)`, nats per token; negative values have the opposite colour, NaN
        none.
      title: of the plot.
      chosen: (layer, head) of the heads to frame.
      layers: memory layers, marked on the axis.
    """
    L, N = increase.shape
    small = L * N <= 160
    width, height = (0.75 * N, 0.5 * L) if small else (0.3 * N, 0.24 * L)
    largest = max(float(np.nanmax(np.abs(increase))), 1e-12)
    colours = LinearSegmentedColormap.from_list("heads", [PINK, "#ffffff", TEAL])
    with drawing(path, max(5.0, width + 2.6), max(2.6, height + 1.4)) as figure:
        axes = figure.subplots()
        image = axes.imshow(increase, cmap=colours, vmin=-largest, vmax=largest, aspect="auto")
        for (layer, head), value in np.ndenumerate(increase) if small else ():
            if not np.isnan(value):
                colour = "white" if abs(value) > 0.6 * largest else INK
                text = f"{value:+.4f}" if largest < 1 else f"{value:+.2f}"
                axes.text(head, layer, text, ha="center", va="center", fontsize=8, color=colour)
        for layer, head in chosen:
            corner = head - 0.47, layer - 0.47
            axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor=INK, linewidth=1.6))
        axes.set_xticks(range(0, N, 1 if N <= 16 else 4))
        axes.set_yticks(range(L), [f"{i} •" if i in layers else str(i) for i in range(L)])
        axes.set(xlabel="head", ylabel="layer (• memory layer)", title=title)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("rise of the loss, nats a token", fontsize=8)


def count_map(path: Path, counts: np.ndarray, title: str, first_layer: int = 0) -> None:
    """Plots the number of tokens that each layer and head keeps as a heat map.

    Args:
      path: PNG to write.
      counts: `(layers, heads)`.
      title: of the plot.
      first_layer: layer of the first row.
    """
    L, K = counts.shape
    colours = LinearSegmentedColormap.from_list("counts", ["#ffffff", TEAL])
    with drawing(path, max(5.0, 0.42 * L + 1.2), max(2.2, 0.4 * K + 1.2)) as figure:
        axes = figure.subplots()
        axes.imshow(np.log1p(counts).T, cmap=colours, aspect="auto")
        for (layer, head), value in np.ndenumerate(counts):
            dark = np.log1p(value) > 0.6 * np.log1p(counts.max())
            colour = "white" if dark else INK
            axes.text(layer, head, str(value), ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(L), [str(first_layer + i) for i in range(L)])
        axes.set_yticks(range(K))
        axes.set(xlabel="layer", ylabel="key-value head", title=title)


def sweep_dots(
    path: Path, rows: Sequence[tuple[str, str, Sequence[float], Sequence[float]]], axis: str
) -> None:
    """Plots one row per sweep entry; each seed gives one dot with memory and one without.

    A vertical line marks the mean of the first entry's values with memory.

    Args:
      path: PNG to write.
      rows: (group, entry, values with memory, values without memory), from top to bottom.
      axis: label of the x axis, with its unit.
    """
    groups = {group for group, *_ in rows}
    with drawing(path, 8, 0.27 * (len(rows) + 0.6 * len(groups)) + 1.4) as figure:
        axes = figure.subplots()
        y, ticks, previous = 0.0, {}, None
        for group, name, with_memory, without in rows:
            if group != previous:
                heading: dict[str, Any] = {"fontsize": 9, "fontweight": "bold", "va": "center"}
                axes.text(
                    0,
                    y + 0.3,
                    f" {as_label(group)}",
                    transform=axes.get_yaxis_transform(),
                    **heading,
                )
                y, previous = y + 0.95, group
            for values, colour, size in ((without, PALE, 5), (with_memory, TEAL, 6)):
                axes.plot(
                    values, [y] * len(values), "o", color=colour, markersize=size, clip_on=False
                )
            ticks[y] = as_label(name)
            y += 1
        if rows[0][2]:
            axes.axvline(float(np.mean(rows[0][2])), **REFERENCE_LINE)
        axes.set_yticks(list(ticks), list(ticks.values()), fontsize=9)
        axes.set(
            ylim=(y - 0.3, -0.1), xlabel=f"{axis}; one dot per seed and colour"
        )  # y grows downwards
        axes.set_title(f"Sweep (dotted: mean of {as_label(rows[0][1])} with memory)")
        axes.grid(axis="x")
        for colour, label in ((TEAL, "with memory"), (PALE, "without")):
            axes.plot([], [], "o", color=colour, label=label)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


class Read(NamedTuple):
    """Attention of an answer on the memories that it read."""

    prompt: str
    answer: str
    predicted: str
    references: Sequence[Sequence[str]]  # tokens of each reference
    mass: Sequence[np.ndarray]  # attention on each token, mean over layers and heads
    kept: Sequence[np.ndarray]  # share of layers and heads whose memory kept the token


def attention_map(path: Path, reads: Sequence[Read], title: str) -> None:
    """Plots the references of each question token by token, coloured by the answer's attention.

    A token that no head kept is grey: no memory contains it.
    """
    rows = sum(len(read.references) + 1 for read in reads)
    references = [tokens for read in reads for tokens in read.references]
    widest = max(60.0, *(sum(len(t.strip(" ")) + 1.5 for t in tokens) for tokens in references))
    largest = max(float(np.max(mass, initial=1e-9)) for read in reads for mass in read.mass)
    colours = colormaps["YlGnBu"]
    with drawing(path, 0.13 * widest + 2, 0.36 * rows + 1.2) as figure:
        axes = figure.subplots()
        y = 0
        for read in reads:
            right = "" if read.predicted == read.answer else f", right would be “{read.answer}”"
            axes.text(0, y, as_label(f"{read.prompt} …"), fontweight="bold", va="center")
            axes.text(24, y, as_label(f"answers “{read.predicted}”{right}"), va="center")
            for tokens, mass, kept in zip(read.references, read.mass, read.kept, strict=True):
                y, x = y + 1, 1.0
                for token, weight, share in zip(tokens, mass / largest, kept, strict=True):
                    shown = as_label(token.replace("\n", "⏎"))
                    width = len(shown) + 1.2
                    box, colour = (colours(float(weight)), INK) if share else (GRID, SOFT)
                    axes.add_patch(Rectangle((x, y - 0.42), width, 0.84, color=box))
                    colour = "white" if weight > 0.55 else colour
                    font: dict[str, Any] = {"fontsize": 9, "family": "monospace", "color": colour}
                    axes.text(x + width / 2, y, shown, ha="center", va="center", **font)
                    x += width + 0.2
            y += 1
        axes.set(xlim=(0, 1.05 * widest), ylim=(y - 0.3, -0.8), title=title)
        axes.set_axis_off()
        scale = ScalarMappable(Normalize(0, largest), colours)
        bar = figure.colorbar(scale, ax=axes, shrink=0.6, pad=0.01)
        bar.set_label("attention of the answer, mean over memory layers and heads", fontsize=8)
