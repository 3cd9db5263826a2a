"""Formats the report of `select_references` as a table, and plots it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from m3jax.figures import PINK, SOFT, TEAL, drawing
from m3jax.selection.budget import WorthEstimates

_BINS = 40


def choice_table(report: dict[str, Any]) -> str:
    """Returns the report of `select_references` as Markdown."""
    rows, losses, expected = report["rows"], report["losses"], report["expected_drop"]
    names = {
        "all": f"all {report['references']} references",
        "chosen": f"the {report['chosen']} chosen",
        "random": f"{report['chosen']} at random, {len(report['random_draws'])} draws",
        "none": "no memory",
    }
    lines = [
        f"{report['checkpoint']} at step {report['step']}, version {report['version']}, retrieval"
        f" shift {report['shift']}",
        f"{report['chosen']} of {report['references']} references chosen:"
        f" {report['chosen_bytes']} of {report['budget']} bytes, {report['bytes_each']} each;"
        f" {report['chosen_never_found']} of them were never found",
        f"expected drop of the loss: {expected['chosen']:.4f} of {expected['all']:.4f} nats a"
        f" token, from {report['measured']} references measured on {rows['measured']} rows;"
        f" {report['never_found']} were never found",
        "",
        f"| {rows['checked']} validation rows of other documents | loss (nats a token) | ± |",
        "|---|---|---|",
        *(
            f"| {names[name]} | {loss:.4f} | {error:.4f} |"
            for name, (loss, error) in losses.items()
        ),
        "",
    ]
    for name, (change, error) in report["differences"].items():
        lines.append(f"{name}: {change:+.4f} ± {error:.4f} nats a token")
    return "\n".join([*lines, choice_verdict(report)])


def choice_verdict(report: dict[str, Any]) -> str:
    """Returns a sentence that says whether the choice beats random ones by two standard errors."""
    change, error = report["differences"].get("random - chosen", (float("nan"),) * 2)
    if not np.isfinite(change + error):
        return "not compared with random choices"
    if change > 2 * error:
        return "the choice is better than a random one"
    if change < -2 * error:
        return "the choice is worse than a random one"
    return "no difference from a random choice is shown"


def choice_picture(
    estimates: WorthEstimates, live: Int[np.ndarray, " n"], report: dict[str, Any], path: str | Path
) -> None:
    """Plots the histogram of the worth of live references, and the worth that each budget buys."""
    millionths, counted = 1e6 * estimates.worth[live], estimates.counted[live] > 0
    edges = np.histogram_bin_edges(millionths, _BINS)
    best_first = np.cumsum(np.sort(estimates.worth[live])[::-1])
    number = np.arange(1, len(best_first) + 1)
    size = report["bytes_each"] * number / 1e6
    with drawing(path, 11, 4.4) as figure:
        left, right = figure.subplots(1, 2)
        for chosen, colour, label in (
            (counted, TEAL, "found by a row"),
            (~counted, SOFT, "never found: estimated from the others"),
        ):
            label = f"{int(chosen.sum())} {label}"
            left.hist(millionths[chosen], edges, color=colour, label=label, alpha=0.85)
        left.axvline(0, color=PINK, linewidth=1)
        left.set_yscale("symlog", linthresh=1)
        left.set(title="What references are worth", ylabel="references")
        left.set_xlabel("expected drop of the loss, millionths of a nat a token")
        right.plot(size, best_first, color=TEAL, label="best first")
        in_any_order = best_first[-1] * number / len(best_first)
        right.plot(size, in_any_order, color=SOFT, linestyle=":", label="in any order")
        right.axvline(report["budget"] / 1e6, color=PINK, linewidth=1, label="budget")
        right.set(xlim=(0, 1.05 * size[-1]), xlabel="memories, MB", title="What a budget buys")
        right.set_ylabel("expected drop of the loss, nats a token")
        for axes in (left, right):
            axes.grid()
            axes.legend()
