"""The report of a selection of references: what each rule dropped, with samples, what is left."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Int, Shaped

from m3jax.files import write_atomically
from m3jax.text.cleaning.counters import SAMPLES, SHOWN, Tally
from m3jax.text.cleaning.report import IN, INK, LEFT, finish_picture, one_line
from m3jax.text.reference_filter.contamination import Contamination
from m3jax.text.references import References

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

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
    looked_for: Contamination | None,
    folder: Path,
) -> str:
    """Writes `report.json`, `report.md` and `lengths.png`.

    Args:
      references: all that were cut.
      kept: ids of those that are kept.
      drops: near-duplicates and their witnesses, of `duplicates.merged`.
      tally: what all ranges counted.
      looked_for: the evaluation questions, if there are some.
      folder: where to write.

    Returns:
      One line of what came in and what is left.
    """
    _add_twins(references, drops, tally)
    content: dict[str, Any] = {
        "cut": _counted(tally, "read"),
        "removed": {rule: _counted(tally, rule) for rule in _RULES},
        "left": {"references": len(kept), "tokens": int(references.lengths[kept].sum())},
        "documents_left": len(np.unique(references.documents()[kept])),
        "questions": 0 if looked_for is None else len(looked_for) + looked_for.too_short,
        "questions_too_short": 0 if looked_for is None else looked_for.too_short,
        "samples": tally.samples,
    }
    data = json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
    write_atomically(folder / "report.json", data)
    _draw_lengths(folder / "lengths.png", references, kept)
    write_atomically(folder / "report.md", _markdown(content).encode("utf-8", "backslashreplace"))
    dropped = len(references) - len(kept)
    return (
        f"selection: {len(references)} references cut, {dropped} dropped, {len(kept)} left, see"
        " report/knowledge/report.md"
    )


def _counted(tally: Tally, step: str) -> dict[str, int]:
    names = {"references": "documents", "characters": "characters"}
    return {name: tally.counts[f"{step}/{counted}"] for name, counted in names.items()}


def _add_twins(references: References, drops: Shaped[np.ndarray, " d"], tally: Tally) -> None:
    """Counts the near-duplicates, and shows some beside the reference that stays."""

    def order(row: tuple[int, int, float]) -> bytes:
        return hashlib.blake2b(row[0].to_bytes(8, "little"), digest_size=8).digest()

    for item in references.read(drops["number"].astype(np.int64)):
        tally.count("similarity", len(item.text))
    for number, witness, similarity in sorted(drops.tolist(), key=order)[:SAMPLES]:
        dropped, stays = references.read([number, witness])
        value = f"{stays.key}, {similarity:.2f}"
        names = {"id": dropped.key, "source": dropped.title or dropped.source, "value": value}
        half = SHOWN // 2
        text = f"{dropped.text[:half]}\n— is like —\n{stays.text[:half]}"
        tally.show("similarity", names, text)


def _markdown(content: dict[str, Any]) -> str:
    """The report to read, with the picture beside it."""
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
    for rule, samples in content["samples"].items():
        lines += ["", f"## {rule}", "", f"{_RULES[rule]}.", ""]
        for sample in samples:
            named = " · ".join(f"{sample[key]}" for key in ("id", "source") if sample.get(key))
            lines += [f"* {named} **{one_line(sample['value'])}**", ""]
            lines += [f"      {one_line(line)}" for line in sample["text"].split("\n") if line]
            lines += [""]
    return "\n".join(lines) + "\n"


def _draw_lengths(path: Path, references: References, kept: Int[np.ndarray, " n"]) -> None:
    """References by their number of tokens: those cut, and those left."""
    edges = np.linspace(0, references.length, _BINS + 1)
    middles, width = (edges[1:] + edges[:-1]) / 2, edges[1]
    figure, axes = plt.subplots(figsize=(8, 4), constrained_layout=True)
    for chosen, colour, share, label in (
        (slice(None), IN, 0.85, "cut"),
        (kept, LEFT, 0.55, "left"),
    ):
        counts, _ = np.histogram(references.lengths[chosen], edges)
        axes.bar(middles, counts, share * width, color=colour, label=label)
    axes.set_xlabel("tokens of a reference", color=INK)
    axes.set_ylabel("references", color=INK)
    finish_picture(figure, axes, path)
