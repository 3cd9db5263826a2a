"""Plots of a training run: loss and learning rate over steps and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from m3jax.figures import BLUE, GREEN, ORANGE, PINK, RED, SOFT, drawing
from m3jax.train.metrics import read_metrics

_RATE = "#8a6fb0"  # the learning rate
_OTHERS = ("#c79a1b", "#5b5f97")  # evaluated losses that have no colour of their own
_SMOOTHED_SHARE = 1 / 40  # span of the running mean over the points of the longest stage
_MODES = {
    "loss_memory": "validation, with memory",
    "loss_none": "validation, no memory",
    "loss_wrong": "validation, wrong memories",
}
_COLOURS = {"loss_memory": GREEN, "loss_none": ORANGE, "loss_wrong": PINK}


def plot_stages(stage_folders: Sequence[str | Path], path: str | Path, title: str = "") -> None:
    """Draws one or more stages of a run, one after the other, into a PNG.

    The upper panel shows the training loss (logged values and a running mean) and evaluated losses,
    the lower panel the learning rate, over optimizer steps and tokens. Losses of branches that a
    guarded run has abandoned are shown with a mark at the step that it went back to.

    Args:
      stage_folders: folders with `metrics.jsonl`; stages without a logged loss are left out.
      path: the PNG, written atomically.
      title: heading; default the names of the stages.

    Raises:
      ValueError: no stage has a logged loss.
    """
    stages = [(Path(folder).name, read_metrics(folder)) for folder in stage_folders]
    stages = [(name, lines) for name, lines in stages if any("loss" in line for line in lines)]
    if not stages:
        raise ValueError(f"no training metrics in {', '.join(map(str, stage_folders))}")
    names = " → ".join(name for name, _ in stages)
    with drawing(path, 9, 5.4) as figure:
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        ends = _draw_stages(losses, rates, stages)
        _decorate(losses, rates, stages, ends)
        losses.set_title(title or f"Training: {names}", pad=12)


def _draw_stages(losses: Axes, rates: Axes, stages: Sequence[tuple[str, list]]) -> list[int]:
    """Draws the curves; returns the last step of every stage, counted over all stages."""
    ends, colours, labelled = [0], dict(_COLOURS), set[str]()
    longest = max(sum("loss" in line for line in lines) for _, lines in stages)

    def once(label: str) -> str | None:
        """Returns the label at its first use, then None, so that the legend has it once."""
        new = label not in labelled
        labelled.add(label)
        return label if new else None

    for _, lines in stages:
        offset = ends[-1]
        trained = [line for line in lines if "loss" in line]
        steps = offset + np.array([line["step"] for line in trained])
        values = np.array([line["loss"] for line in trained])
        losses.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.9)
        mean = _smoothed(values, longest * _SMOOTHED_SHARE)
        losses.plot(steps, mean, color=BLUE, linewidth=1.9, label=once("training"))
        rate = [line["learning_rate"] for line in trained]
        rates.plot(steps, rate, color=_RATE, linewidth=1.4)
        rates.fill_between(steps, rate, color=_RATE, alpha=0.15, linewidth=0)
        for rollback in (line["guard"] for line in lines if "guard" in line):
            _draw_left(losses, offset, rollback, once("left again; the run went back to ▲"))
        points: dict[str, list[tuple[int, float]]] = {}
        for line in lines:
            for name, value in line.get("evaluation", {}).items():
                if "loss" in name:
                    points.setdefault(name, []).append((offset + line["step"], value))
        for name in sorted(points):
            colour = colours.setdefault(name, _OTHERS[len(colours) % len(_OTHERS)])
            losses.plot(
                *zip(*points[name], strict=True),
                color=colour,
                marker="o",
                markersize=3.5,
                linewidth=1.3,
                label=once(_readable(name)),
            )
        ends.append(offset + max(line["step"] for line in lines))
    return ends[1:]


def _draw_left(axes: Axes, offset: int, rollback: Mapping[str, Any], label: str | None) -> None:
    """Draws the losses of an abandoned branch, and a mark at the step that the run went back to."""
    points = [(offset + step, loss) for step, loss in rollback["losses"] if loss is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=RED, alpha=0.7, linewidth=1.0)
    axes.plot(
        [offset + rollback["to"]],
        [0.02],
        transform=axes.get_xaxis_transform(),
        color=RED,
        marker="^",
        markersize=5,
        linewidth=1.0,
        label=label,
    )


def _decorate(
    losses: Axes, rates: Axes, stages: Sequence[tuple[str, list]], ends: list[int]
) -> None:
    for axes in (losses, rates):
        axes.grid()
        for end in ends[:-1]:
            axes.axvline(end, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    if len(stages) > 1:
        top = losses.get_xaxis_transform()
        for (name, _), start in zip(stages, [0, *ends], strict=False):
            losses.text(start, 0.99, f" {name}", transform=top, va="top", color=SOFT, fontsize=9)
    losses.set_ylabel("loss, nats a token")
    rates.set(xlim=(0, ends[-1]), ylabel="learning rate", xlabel="optimizer steps (tokens below)")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    _label_tokens(rates, stages, ends)
    losses.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0.2)


def _label_tokens(axes: Axes, stages: Sequence[tuple[str, list]], ends: list[int]) -> None:
    """Labels every tick of the step axis with the step and the number of tokens seen."""
    steps, tokens = [0.0], [0.0]
    for (_, lines), start in zip(stages, [0, *ends], strict=False):
        before = tokens[-1]
        for line in lines:
            if "tokens" in line:
                steps.append(start + line["step"])
                tokens.append(before + line["tokens"])
    short, engineering = EngFormatter(sep=""), EngFormatter(places=1, sep="")

    def label(step: float, _: Any) -> str:
        seen = float(np.interp(step, steps, tokens))
        return f"{short(step)}\n{engineering(seen) if seen else '0'}"

    axes.xaxis.set_major_formatter(label)


def _smoothed(values: np.ndarray, span: float) -> np.ndarray:
    """Computes a running mean over the last `span` points, at most a quarter of all points."""
    span = max(1, round(min(span, len(values) / 4)))
    total = np.cumsum(np.concatenate([[0.0], values]))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(0, stop - span)
    return (total[stop] - total[start]) / (stop - start)


def _readable(name: str) -> str:
    return _MODES.get(name, name.replace("/", " ").replace(".", " ").replace("_", " "))
