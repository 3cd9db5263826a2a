"""Report on filtered references: number dropped by each rule, with samples, and left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from m3jax.text.cleaning.counters import Tally
from m3jax.text.cleaning.report import draw_bars, show_near_duplicates, write_report
from m3jax.text.reference_filter.contamination import Contamination
from m3jax.text.references import References

_BINS = 16  # of the histogram
# Rules in order, with the meaning of their samples' values.
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
    """Writes `report.json`, `report.md` and `lengths.png`; returns a one-line summary.

    `references` are the references before filtering, `kept` the ids that stay, `drops` the
    near-duplicates with witnesses (`minhash.merged`), `tally` the counts of all ranges, and
    `questions` the evaluation questions that were searched for, if any.
    """
    for item in references.read(drops["number"].astype(np.int64)):
        tally.count("similarity", len(item.text))
    show_near_duplicates(tally, drops, lambda i: references[i].as_document(), lambda d: d.id)
    content: dict[str, Any] = {
        "cut": _counted(tally, "read"),
        "removed": {rule: _counted(tally, rule) for rule in _RULES},
        "left": {"references": len(kept), "tokens": int(references.lengths[kept].sum())},
        "documents_left": len(np.unique(references.documents()[kept])),
        "questions": 0 if questions is None else len(questions) + questions.too_short,
        "questions_too_short": 0 if questions is None else questions.too_short,
        "samples": tally.samples,
    }
    edges = np.linspace(0, references.length, _BINS + 1)
    lengths = {"cut": references.lengths, "left": references.lengths[kept]}
    draw_bars(
        folder / "lengths.png",
        ((edges[1:] + edges[:-1]) / 2).tolist(),
        {name: np.histogram(values, edges)[0].tolist() for name, values in lengths.items()},
        ("tokens of a reference", "references"),
        width=edges[1],
    )
    write_report(folder, content, _markdown(content), _RULES)
    dropped = len(references) - len(kept)
    return (
        f"selection: {len(references)} references cut, {dropped} dropped, {len(kept)} left, see"
        " report/knowledge/report.md"
    )


def _counted(tally: Tally, step: str) -> dict[str, int]:
    names = {"references": "documents", "characters": "characters"}
    return {name: tally.counts[f"{step}/{counted}"] for name, counted in names.items()}


def _markdown(content: dict[str, Any]) -> str:
    total = max(content["cut"]["references"], 1)

    def row(name: str, references: int, characters: int) -> str:
        return f"| {name} | {references} | {characters} | {references / total:.2%} |"

    removed = content["removed"]
    left = content["cut"]["characters"] - sum(n["characters"] for n in removed.values())
    lines = [
        "# Knowledge base",
        "",
        "| step | references | characters | of those cut |",
        "|---|---|---|---|",
        row("cut", *content["cut"].values()),
        *(row(f"− {rule}", *counted.values()) for rule, counted in removed.items()),
        row("left", content["left"]["references"], left),
        "",
        f"Left: {content['left']['tokens']} tokens of {content['documents_left']} documents."
        f" Evaluation questions looked for: {content['questions']}, of which"
        f" {content['questions_too_short']} were too short to be.",
        "",
        "![tokens of a reference](lengths.png)",
    ]
    return "\n".join(lines)
