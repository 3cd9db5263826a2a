"""Draws the pictures of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from m3jax.figures import GRID, INK, PALE, PINK, TEAL, save_figure


def accuracy_bars(
    path: Path, accuracy: dict[str, float], labels: dict[str, str], chance: float, title: str
) -> None:
    """Draws a bar for every condition, right memories in colour, chance as a line.

    Args:
      path: PNG to write.
      accuracy: condition → share of right answers.
      labels: condition → name; also the order, first on top.
      chance: accuracy of guessing.
      title: of the picture.
    """
    names = [name for name in labels if name in accuracy]
    figure = Figure(figsize=(8, 0.55 * len(names) + 1.6), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        value = accuracy[name]
        axes.barh(row, value, color=TEAL if value > 0.5 else PALE, height=0.62)
        axes.text(value + 0.012, row, f"{value:.3f}", va="center", color=INK, fontsize=10)
    axes.axvline(chance, color=INK, linestyle=":", linewidth=1.2)
    axes.text(chance + 0.006, -0.72, f"chance {chance:.3f}", color=INK, fontsize=9, va="center")
    axes.set_yticks(range(len(names)), [labels[name] for name in names], fontsize=10)
    axes.set_xlim(0, 1.09)
    axes.set_ylim(len(names) - 0.5, -1)
    axes.set_xlabel("share of right answers", color=INK)
    _finish(figure, axes, title, path)


def speed_bars(
    path: Path, tokens_per_second: dict[str, float], first_token: dict[str, float], title: str
) -> None:
    """Draws tokens a second of each mode, and beside each bar the time to the first token.

    Args:
      path: PNG to write.
      tokens_per_second: mode → figure; `none` is drawn as a line to compare with.
      first_token: mode → seconds, where there is one.
      title: of the picture.
    """
    modes = list(tokens_per_second)
    figure = Figure(figsize=(8, 0.55 * len(modes) + 1.6), layout="constrained")
    axes = figure.subplots()
    most = max(tokens_per_second.values())
    for row, mode in enumerate(modes):
        value = tokens_per_second[mode]
        reads = mode in ("explicit", "compressed", "cold")
        axes.barh(row, value, color=TEAL if reads else PALE, height=0.62)
        text = f"{value:.1f}"
        if mode in first_token:
            text += f"   first token {first_token[mode]:.1f} s"
        over_line = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        at = value + 0.01 * most
        axes.text(at, row, text, va="center", color=INK, fontsize=10, bbox=over_line)
    if "none" in tokens_per_second:
        axes.axvline(tokens_per_second["none"], color=INK, linestyle=":", linewidth=1.2)
    axes.set_yticks(range(len(modes)), modes, fontsize=10)
    axes.set_xlim(0, 1.35 * most)
    axes.set_ylim(len(modes) - 0.4, -0.6)
    axes.set_xlabel("tokens a second, search and loading included", color=INK)
    _finish(figure, axes, title, path)


def needle_lines(path: Path, report: dict[str, Any]) -> None:
    """Draws the share of needles found over the length of the text, with and without memory.

    Args:
      path: PNG to write.
      report: of `needle.needle_test`.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    lines = (("memory", "older text retrieved", TEAL), ("window", "older text forgotten", INK))
    lengths = report["lengths"]
    for name, label, colour in lines:
        axes.plot(lengths, report[name], color=colour, marker="o", linewidth=1.8)
        axes.annotate(
            label,
            (lengths[-1], report[name][-1]),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=10,
        )
    context = report["context_tokens"]
    axes.axvline(context, color=INK, linestyle=":", linewidth=1.2)
    axes.text(context, 1.06, " the model's context", color=INK, fontsize=9, va="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlim(min(context, lengths[0]) / 1.3, lengths[-1] * 4)
    axes.set_ylim(-0.03, 1.1)
    axes.set_xlabel("tokens of the text", color=INK)
    axes.set_ylabel("share of needles found", color=INK)
    axes.grid(axis="y", color=GRID)
    axes.minorticks_off()
    _finish(figure, axes, f"A fact in a long text, {report['count']} texts of each length", path)


def head_map(
    path: Path,
    increase: np.ndarray,
    title: str,
    *,
    chosen: Sequence[tuple[int, int]] = (),
    layers: range | None = None,
    unit: str = "rise of the loss, nats a token",
) -> None:
    """Draws a figure for every layer and head as colours; chosen heads have a frame.

    Args:
      path: PNG to write.
      increase: `(layers, heads)`; what lowers the loss is drawn in the other colour, NaN not.
      title: of the picture.
      chosen: layer and head of those with a frame.
      layers: memory layers, marked at the side.
      unit: of the figures.
    """
    L, N = increase.shape
    small = L * N <= 160
    figure = Figure(
        figsize=(
            max(5.0, 0.75 * N + 2.6) if small else max(5.0, 0.3 * N + 2.6),
            max(2.6, (0.5 if small else 0.24) * L + 1.4),
        ),
        layout="constrained",
    )
    axes = figure.subplots()
    largest = max(float(np.nanmax(np.abs(increase))), 1e-12)
    colours = LinearSegmentedColormap.from_list("heads", [PINK, "#ffffff", TEAL])
    image = axes.imshow(increase, cmap=colours, vmin=-largest, vmax=largest, aspect="auto")
    if small:
        for layer in range(L):
            for head in range(N):
                value = float(increase[layer, head])
                if np.isnan(value):
                    continue
                colour = "white" if abs(value) > 0.6 * largest else INK
                text = f"{value:+.4f}" if largest < 1 else f"{value:+.2f}"
                axes.text(head, layer, text, ha="center", va="center", fontsize=8, color=colour)
    for layer, head in chosen:
        frame = Rectangle(
            (head - 0.47, layer - 0.47), 0.94, 0.94, fill=False, edgecolor=INK, linewidth=1.6
        )
        axes.add_patch(frame)
    step = 1 if N <= 16 else 4
    axes.set_xticks(range(0, N, step))
    names = [f"{i} •" if layers is not None and i in layers else str(i) for i in range(L)]
    axes.set_yticks(range(L), names)
    axes.set_xlabel("head", color=INK)
    axes.set_ylabel("layer (• memory layer)" if layers is not None else "layer", color=INK)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(unit, fontsize=8, color=INK)
    _finish(figure, axes, title, path)


def sweep_dots(
    path: Path, lines: Sequence[tuple[str, str, Sequence[float], Sequence[float]]], axis: str
) -> None:
    """Draws dots for every entry of a sweep, a dot a seed; the first entry's mean as a line.

    Args:
      path: PNG to write.
      lines: group, entry, values with memory, values without; first on top.
      axis: what the values are.
    """
    groups = list(dict.fromkeys(group for group, *_ in lines))
    rows = len(lines) + 0.6 * len(groups)
    figure = Figure(figsize=(8, 0.27 * rows + 1.4), layout="constrained")
    axes = figure.subplots()
    y, ticks, before = 0.0, [], None
    heading: dict[str, Any] = {"va": "center", "fontsize": 9, "color": INK, "fontweight": "bold"}
    for group, name, memory, none in lines:
        if group != before:
            y += 0.6
            before = group
            axes.text(0, y - 0.3, f" {group}", transform=axes.get_yaxis_transform(), **heading)
            y += 0.35
        axes.plot(none, [y] * len(none), "o", color=PALE, markersize=5, clip_on=False)
        axes.plot(memory, [y] * len(memory), "o", color=TEAL, markersize=6, clip_on=False)
        ticks.append((y, name))
        y += 1
    if lines[0][2]:
        axes.axvline(float(np.mean(lines[0][2])), color=INK, linestyle=":", linewidth=1.2)
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=9)
    axes.set_ylim(y - 0.3, -0.1)
    axes.set_xlabel(f"{axis}; a dot a seed", color=INK)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    for colour, label in ((TEAL, "with memory"), (PALE, "without")):
        axes.plot([], [], "o", color=colour, label=label)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)
    _finish(figure, axes, f"Sweep; dotted: mean of {lines[0][1]}, with memory", path)


@dataclass(frozen=True)
class Read:
    """Attention of an answer on its memories."""

    prompt: str
    answer: str
    predicted: str
    references: Sequence[Sequence[str]]  # tokens of each reference
    mass: Sequence[np.ndarray]  # attention on each of those tokens, mean over layers and heads
    kept: Sequence[np.ndarray]  # how many layer-and-head slots kept it, as a share of all


def attention_map(path: Path, reads: Sequence[Read], title: str) -> None:
    """Draws the references of each question token by token, coloured by the answer's attention.

    A token that no head kept is grey: the reader cannot see it.
    """
    rows = sum(len(read.references) + 1 for read in reads)
    widest = max(
        sum(len(t.strip(" ")) + 1.5 for t in ref) for read in reads for ref in read.references
    )
    widest = max(widest, 60.0)
    figure = Figure(figsize=(0.13 * widest + 2, 0.36 * rows + 1.2), layout="constrained")
    axes = figure.subplots()
    largest = max(float(np.max(m, initial=1e-9)) for read in reads for m in read.mass)
    colours = colormaps["YlGnBu"]
    y = 0.0
    for read in reads:
        axes.text(0, y, f"{read.prompt} …", fontweight="bold", fontsize=10, color=INK, va="center")
        verdict = f"answers “{read.predicted}”" + (
            "" if read.predicted == read.answer else f", right would be “{read.answer}”"
        )
        axes.text(24, y, verdict, fontsize=10, color=INK, va="center")
        y += 1
        for tokens, mass, kept in zip(read.references, read.mass, read.kept, strict=True):
            x = 1.0
            for token, weight, share in zip(tokens, mass, kept, strict=True):
                shown = token.replace("\n", "⏎").strip(" ")
                box = Rectangle(
                    (x, y - 0.42),
                    len(shown) + 1.2,
                    0.84,
                    facecolor=colours(float(weight) / largest) if share else GRID,
                    edgecolor="white",
                )
                axes.add_patch(box)
                dark = weight / largest > 0.55
                colour = "white" if dark else (INK if share else "#9aa5ad")
                axes.text(
                    x + (len(shown) + 1.2) / 2,
                    y,
                    shown,
                    ha="center",
                    va="center",
                    fontsize=9,
                    family="monospace",
                    color=colour,
                )
                x += len(shown) + 1.4
            y += 1
    axes.set_xlim(0, 1.05 * widest)
    axes.set_ylim(y - 0.3, -0.8)
    axes.set_axis_off()
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, largest), colours), ax=axes, shrink=0.6, pad=0.01
    )
    bar.set_label("attention of the answer, mean over memory layers and heads", fontsize=8)
    _finish(figure, axes, title, path)


def _finish(figure: Figure, axes: Axes, title: str, path: Path) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=12)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False, colors=INK)
    save_figure(figure, path)
