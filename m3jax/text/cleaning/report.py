"""The data report: what came in, what every step took out, with samples, and what is left."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from m3jax.files import committing, write_atomically
from m3jax.text.cleaning.blocks import place_of
from m3jax.text.cleaning.counters import SAMPLES, SHOWN, Tally
from m3jax.text.cleaning.dedup import Cleaned

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

INK, IN, LEFT, _GRID = "#22303c", "#b8c4cc", "#0b7a75", "#e6eaed"
_LANGUAGES = 20  # shown in the picture
# Steps that take documents out, in their order, with what the value of a sample is.
_STEPS = {
    "unreadable": "not a document: the reason",
    "empty": "white space only",
    "characters_max": "more characters than clean.characters_max: their number",
    "words_min": "fewer words than clean.words_min: their number",
    "word_length_max": "words longer on average than clean.word_length_max: the average",
    "nonalphabetic_max": "more that is no letter than clean.nonalphabetic_max: the share",
    "unique_max": "more different words than clean.unique_max: the share",
    "entropy_min": "less entropy than clean.entropy_min: nats",
    "quality_min": "a lower quality score than clean.quality_min: the score",
    "similarity": "near-duplicates of an earlier document: its id, and the similarity",
}


def write_data_report(cleaned: Cleaned, tally: Tally, folder: Path) -> str:
    """Writes `report.json`, `report.md`, `lengths.png` and `languages.png`.

    Args:
      cleaned: the documents that are left.
      tally: what all blocks counted.
      folder: where to write.

    Returns:
      One line of what came in and what is left.
    """
    lengths, languages, left, twins = _of_tables(cleaned)
    tally.counts.update(twins)
    for sample, text in _twins(cleaned):
        tally.show("similarity", sample, text)
    read, lost = tally.counts["read/documents"], tally.counts["unreadable/documents"]
    content: dict[str, Any] = {
        "read": _pair(tally, "read"),
        "repaired": _pair(tally, "repaired"),
        "removed": {step: _pair(tally, step) for step in _STEPS},
        "repeated_ids": len(cleaned.renames),
        "left": left,
        "words_read": _sorted(tally.lengths),
        "words_left": _sorted(lengths),
        "languages_read": dict(tally.languages.most_common()),
        "languages_left": dict(languages.most_common()),
        "samples": tally.samples,
    }
    data = json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
    write_atomically(folder / "report.json", data)
    _draw_lengths(folder / "lengths.png", tally.lengths, lengths)
    _draw_languages(folder / "languages.png", tally.languages, languages)
    write_atomically(folder / "report.md", _markdown(content).encode("utf-8", "backslashreplace"))
    removed = read + lost - left["documents"]
    return f"{read + lost} documents read, {removed} removed, {left['documents']} left"


def _pair(tally: Tally, step: str) -> dict[str, int]:
    return {what: tally.counts[f"{step}/{what}"] for what in ("documents", "characters")}


def _sorted(lengths: Counter[str]) -> dict[str, int]:
    return {power: lengths[power] for power in sorted(lengths, key=int)}


def _of_tables(
    cleaned: Cleaned,
) -> tuple[Counter[str], Counter[str], dict[str, int], dict[str, int]]:
    """Lengths, languages and counts of what is left; counts of the near-duplicates."""
    lengths, languages = Counter[str](), Counter[str]()
    left, twins = np.zeros(2, np.int64), np.zeros(2, np.int64)
    for name in cleaned.names:
        table = np.load(cleaned.cleaning.blocks / f"{name}.table.npy")
        dropped = np.isin(np.arange(len(table)), list(cleaned.left_out(name)))
        twins += (int(dropped.sum()), int(table["characters"][dropped].sum()))
        table = table[~dropped]
        left += (len(table), int(table["characters"].sum()))
        languages.update(table["language"].tolist())
        lengths.update(str(words.bit_length()) for words in table["words"].tolist())
    names = ("documents", "characters")
    return (
        lengths,
        languages,
        dict(zip(names, left.tolist(), strict=True)),
        dict(zip([f"similarity/{n}" for n in names], twins.tolist(), strict=True)),
    )


def _twins(cleaned: Cleaned) -> Iterator[tuple[dict[str, Any], str]]:
    """Some near-duplicates, beside the document that stays."""

    def order(row: tuple[int, int, float]) -> bytes:
        return hashlib.blake2b(row[0].to_bytes(8, "little"), digest_size=8).digest()

    for number, witness, similarity in sorted(cleaned.drops.tolist(), key=order)[:SAMPLES]:
        dropped, kept = (_document(cleaned, n) for n in (number, witness))
        value = f"{kept.id} ({kept.source}), {similarity:.2f}"
        names = {"id": dropped.id, "source": dropped.source, "value": value}
        half = SHOWN // 2
        yield names, f"{dropped.text[:half]}\n— is like —\n{kept.text[:half]}"


def _document(cleaned: Cleaned, number: int) -> Any:
    name, index = place_of(number)
    return cleaned.unfiltered(name)[index]


def _markdown(content: dict[str, Any]) -> str:
    """The report to read, with the pictures beside it."""

    def row(name: str, pair: dict[str, int]) -> str:
        share = pair["characters"] / max(content["read"]["characters"], 1)
        return f"| {name} | {pair['documents']} | {pair['characters']} | {share:.2%} |"

    steps = [row(f"− {step}", pair) for step, pair in content["removed"].items()]
    lines = [
        "# Data report",
        "",
        "| step | documents | characters | of those read |",
        "|---|---|---|---|",
        row("read", content["read"]),
        *steps,
        row("left", content["left"]),
        "",
        f"Repaired, and not counted above: {content['repaired']['documents']} documents. Ids that"
        f" an earlier document had too: {content['repeated_ids']}.",
        "",
        "![words of a document](lengths.png)",
        "",
        "![languages](languages.png)",
    ]
    meanings = {**_STEPS, "repaired": "repaired Unicode: before, and after"}
    for step, samples in content["samples"].items():
        lines += ["", f"## {step}", "", f"{meanings[step]}.", ""]
        for sample in samples:
            named = " · ".join(f"{sample[key]}" for key in ("id", "source") if sample.get(key))
            lines += [f"* {named} **{one_line(sample['value'])}**", ""]
            lines += [f"      {one_line(line)}" for line in sample["text"].split("\n") if line] + [
                ""
            ]
    return "\n".join(lines) + "\n"


def one_line(text: str) -> str:
    """A text in one line, without signs that a terminal would obey."""
    return "".join(c if c.isprintable() else "·" for c in text)


def _draw_lengths(path: Path, read: Counter[str], left: Counter[str]) -> None:
    """Documents by number of words, in powers of two: what came in, and what is left."""
    powers = sorted({int(power) for power in (*read, *left)}) or [0]
    places = range(powers[0], powers[-1] + 1)
    figure, axes = plt.subplots(figsize=(8, 4), constrained_layout=True)
    axes.bar(places, [read[str(i)] for i in places], color=IN, width=0.85, label="read")
    axes.bar(places, [left[str(i)] for i in places], color=LEFT, width=0.55, label="left")
    named = ["0" if i == 0 else f"{1 << (i - 1):,}–\n{(1 << i) - 1:,}" for i in places]
    axes.set_xticks(places, named, fontsize=8)
    axes.set_xlabel("words of a document", color=INK)
    axes.set_ylabel("documents", color=INK)
    finish_picture(figure, axes, path)


def _draw_languages(path: Path, read: Counter[str], left: Counter[str]) -> None:
    """Documents by language, on a logarithmic scale."""
    ranked = sorted(read, key=lambda name: (-read[name], name))[:_LANGUAGES] or ["–"]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(ranked) + 1.4), constrained_layout=True)
    rows = range(len(ranked))
    axes.barh(rows, [read[name] for name in ranked], color=IN, height=0.8, label="read")
    axes.barh(rows, [left[name] for name in ranked], color=LEFT, height=0.5, label="left")
    axes.set_yticks(rows, ranked, fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("documents", color=INK)
    finish_picture(figure, axes, path)


def finish_picture(figure: Any, axes: Any, path: Path) -> None:
    """Legend, grid and edges as in all pictures of these reports; writes the PNG."""
    axes.legend(frameon=False)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with committing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
