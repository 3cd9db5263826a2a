"""Report of a selection of references: what each rule dropped, with samples, what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from matplotlib.figure import Figure

from m3jax.figures import INK, PALE, TEAL, finish_axes, save_figure
from m3jax.text.cleaning.counters import Tally
from m3jax.text.cleaning.report import (
    near_duplicate_samples,
    samples_markdown,
    side_by_side,
    write_report,
)
from m3jax.text.reference_filter.contamination import Contamination
from m3jax.text.references import References

_BINS = 16  # of the picture
# Rules in their order, with what the value of a sample is.
_RULES = {
    "words_min": "fewer words than knowledge.words_min: their number",
    "nonalphabetic_max": "more that is no letter than knowledge.nonalphabetic_max: the share",
    "listed_max": "more lists, tables and markup than knowledge.listed_max: the share",
    "repeated_max": "more repeated runs of words than knowledge.repeated_max: the share",
    "contamination": "an evaluation question: the overlap, and the question",
    "similarity": "near-duplicates of an earlier reference: its key, and the similarity",
}


def write_selection_report(
    references: References,
    kept: Int[np.ndarray, " n"],
    drops: Shaped[np.ndarray, " d"],
    tally: Tally,
    questions: Contamination | None,
    folder: Path,
) -> str:
    """Writes `report.json`, `report.md` and `lengths.png`; returns one line of what is left.

    Of all `references` that were cut, the ids `kept` stay; `drops` are near-duplicates with
    witnesses (`minhash.merged`), `tally` is what all ranges counted, `questions` what was searched
    for.
    """
    _add_twins(references, drops, tally)
    content: dict[str, Any] = {
        "cut": _counted(tally, "read"),
        "removed": {rule: _counted(tally, rule) for rule in _RULES},
        "left": {"references": len(kept), "tokens": int(references.lengths[kept].sum())},
        "documents_left": len(np.unique(references.documents()[kept])),
        "questions": 0 if questions is None else len(questions) + questions.too_short,
        "questions_too_short": 0 if questions is None else questions.too_short,
        "samples": tally.samples,
    }
    _draw_lengths(folder / "lengths.png", references, kept)
    write_report(folder, content, _markdown(content))
    dropped = len(references) - len(kept)
    return (
        f"selection: {len(references)} references cut, {dropped} dropped, {len(kept)} left, see"
        " report/knowledge/report.md"
    )


def _counted(tally: Tally, step: str) -> dict[str, int]:
    names = {"references": "documents", "characters": "characters"}
    return {name: tally.counts[f"{step}/{counted}"] for name, counted in names.items()}


def _add_twins(references: References, drops: Shaped[np.ndarray, " d"], tally: Tally) -> None:
    for item in references.read(drops["number"].astype(np.int64)):
        tally.count("similarity", len(item.text))
    for number, witness, similarity in near_duplicate_samples(drops):
        dropped, stays = references.read([number, witness])
        value = f"{stays.key}, {similarity:.2f}"
        names = {"id": dropped.key, "source": dropped.title or dropped.source, "value": value}
        tally.show("similarity", names, side_by_side(dropped.text, stays.text))


def _markdown(content: dict[str, Any]) -> str:
    total = max(content["cut"]["references"], 1)

    def row(name: str, references: int, characters: int | str) -> str:
        return f"| {name} | {references} | {characters} | {references / total:.2%} |"

    removed = content["removed"].items()
    characters = {rule: counted["characters"] for rule, counted in removed}
    left = content["cut"]["characters"] - sum(characters.values())
    lines = [
        "# Knowledge base",
        "",
        "| step | references | characters | of those cut |",
        "|---|---|---|---|",
        row("cut", *content["cut"].values()),
        *(row(f"− {rule}", *counted.values()) for rule, counted in removed),
        row("left", content["left"]["references"], left),
        "",
        f"Left: {content['left']['tokens']} tokens of {content['documents_left']} documents."
        f" Evaluation questions looked for: {content['questions']}, of which"
        f" {content['questions_too_short']} were too short to be.",
        "",
        "![tokens of a reference](lengths.png)",
    ]
    return "\n".join(lines) + "\n" + samples_markdown(content["samples"], _RULES)


def _draw_lengths(path: Path, references: References, kept: Int[np.ndarray, " n"]) -> None:
    """Draws references by their number of tokens: those cut, and those left."""
    edges = np.linspace(0, references.length, _BINS + 1)
    middles, width = (edges[1:] + edges[:-1]) / 2, edges[1]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for chosen, colour, share, label in (
        (slice(None), PALE, 0.85, "cut"),
        (kept, TEAL, 0.55, "left"),
    ):
        counts, _ = np.histogram(references.lengths[chosen], edges)
        axes.bar(middles, counts, share * width, color=colour, label=label)
    axes.set_xlabel("tokens of a reference", color=INK)
    axes.set_ylabel("references", color=INK)
    axes.legend(frameon=False)
    finish_axes(axes)
    save_figure(figure, path)
