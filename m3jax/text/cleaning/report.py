"""Data report: what came in, what every step took out, with samples, and what is left."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from matplotlib.figure import Figure

from m3jax.figures import INK, PALE, TEAL, finish_axes, save_figure
from m3jax.files import write_atomically
from m3jax.text.cleaning.blocks import place_of
from m3jax.text.cleaning.counters import SAMPLES, SHOWN, Tally
from m3jax.text.cleaning.dedup import Cleaned

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
    """Writes `report.json`, `report.md`, `lengths.png` and `languages.png` to `folder`.

    `cleaned` are the documents that are left, `tally` what all blocks counted. Returns one line of
    what came in and what is left.
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
    _draw_lengths(folder / "lengths.png", tally.lengths, lengths)
    _draw_languages(folder / "languages.png", tally.languages, languages)
    write_report(folder, content, _markdown(content))
    removed = read + lost - left["documents"]
    return f"{read + lost} documents read, {removed} removed, {left['documents']} left"


def write_report(folder: Path, content: dict[str, Any], markdown: str) -> None:
    """Writes `report.json` and `report.md`."""
    data = json.dumps(content, indent=1, ensure_ascii=False)
    for name, text in (("report.json", data), ("report.md", markdown)):
        write_atomically(folder / name, text.encode("utf-8", "backslashreplace"))


def near_duplicate_samples(drops: Shaped[np.ndarray, " d"]) -> list[tuple[int, int, float]]:
    """Chooses near-duplicates to show, by a hash of their number: rows of `minhash.DROP`."""

    def order(row: tuple[int, int, float]) -> bytes:
        return hashlib.blake2b(row[0].to_bytes(8, "little"), digest_size=8).digest()

    return sorted(drops.tolist(), key=order)[:SAMPLES]


def side_by_side(dropped: str, kept: str) -> str:
    """Joins the beginnings of a near-duplicate and of the text that stays."""
    return f"{dropped[: SHOWN // 2]}\n— is like —\n{kept[: SHOWN // 2]}"


def _pair(tally: Tally, step: str) -> dict[str, int]:
    return {what: tally.counts[f"{step}/{what}"] for what in ("documents", "characters")}


def _sorted(lengths: Counter[str]) -> dict[str, int]:
    return {power: lengths[power] for power in sorted(lengths, key=int)}


def _of_tables(
    cleaned: Cleaned,
) -> tuple[Counter[str], Counter[str], dict[str, int], dict[str, int]]:
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
    for number, witness, similarity in near_duplicate_samples(cleaned.drops):
        dropped, kept = (_document(cleaned, n) for n in (number, witness))
        value = f"{kept.id} ({kept.source}), {similarity:.2f}"
        names = {"id": dropped.id, "source": dropped.source, "value": value}
        yield names, side_by_side(dropped.text, kept.text)


def _document(cleaned: Cleaned, number: int) -> Any:
    name, index = place_of(number)
    return cleaned.unfiltered(name)[index]


def _markdown(content: dict[str, Any]) -> str:

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
    return "\n".join(lines) + "\n" + samples_markdown(content["samples"], meanings)


def samples_markdown(samples: dict[str, list[dict[str, Any]]], meanings: dict[str, str]) -> str:
    """Formats the samples of every step, under the meaning of their value."""
    lines = []
    for step, members in samples.items():
        lines += ["", f"## {step}", "", f"{meanings[step]}.", ""]
        for sample in members:
            named = " · ".join(f"{sample[key]}" for key in ("id", "source") if sample.get(key))
            lines += [f"* {named} **{_printable(sample['value'])}**", ""]
            lines += [f"      {_printable(line)}" for line in sample["text"].split("\n") if line]
            lines += [""]
    return "\n".join(lines) + "\n" if lines else ""


def _printable(text: str) -> str:
    """Replaces control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else "·" for c in text)


def _draw_lengths(path: Path, read: Counter[str], left: Counter[str]) -> None:
    """Draws documents by number of words, in powers of two: what came in, and what is left."""
    powers = sorted({int(power) for power in (*read, *left)}) or [0]
    places = range(powers[0], powers[-1] + 1)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(places, [read[str(i)] for i in places], color=PALE, width=0.85, label="read")
    axes.bar(places, [left[str(i)] for i in places], color=TEAL, width=0.55, label="left")
    named = ["0" if i == 0 else f"{1 << (i - 1):,}–\n{(1 << i) - 1:,}" for i in places]
    axes.set_xticks(places, named, fontsize=8)
    axes.set_xlabel("words of a document", color=INK)
    axes.set_ylabel("documents", color=INK)
    axes.legend(frameon=False)
    finish_axes(axes)
    save_figure(figure, path)


def _draw_languages(path: Path, read: Counter[str], left: Counter[str]) -> None:
    ranked = sorted(read, key=lambda name: (-read[name], name))[:_LANGUAGES] or ["–"]
    figure = Figure(figsize=(8, 0.32 * len(ranked) + 1.4), layout="constrained")
    axes = figure.subplots()
    rows = range(len(ranked))
    axes.barh(rows, [read[name] for name in ranked], color=PALE, height=0.8, label="read")
    axes.barh(rows, [left[name] for name in ranked], color=TEAL, height=0.5, label="left")
    axes.set_yticks(rows, ranked, fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("documents", color=INK)
    axes.legend(frameon=False)
    finish_axes(axes)
    save_figure(figure, path)
