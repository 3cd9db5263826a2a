"""Data report: documents read, removed by every step (with samples), and left."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from m3jax.figures import PALE, TEAL, drawing
from m3jax.files import json_text, write_atomically
from m3jax.printable import as_markdown, clean
from m3jax.text.cleaning.blocks import place_of
from m3jax.text.cleaning.clean import CleanFolder
from m3jax.text.cleaning.counters import SAMPLES, SHOWN, Tally
from m3jax.text.documents import Document

_LANGUAGES = 20  # shown in the figure
# Steps that remove documents, in order, with the meaning of their samples' values.
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


def write_data_report(
    cleaned: CleanFolder, tally: Tally, left_out: Mapping[str, Sequence[str]], folder: Path
) -> str:
    """Writes `report.json`, `report.md`, `lengths.png` and `languages.png` to `folder`.

    `cleaned` holds the documents that are left, `tally` the counts of all blocks, to which the
    near-duplicates are added, `left_out` the files that were not read, by reason. Returns a
    one-line summary: documents read, removed and left.
    """
    left = _count_left(cleaned, tally)

    def document_of(number: int) -> Document:
        name, index = place_of(number)
        return cleaned.unfiltered(name)[index]

    show_near_duplicates(tally, cleaned.drops, document_of, lambda d: f"{d.id} ({d.source})")
    content: dict[str, Any] = {
        "read": _pair(tally, "read"),
        "not_read": {
            "blank lines": tally.counts["not read/blank lines"],
            **{reason: list(paths) for reason, paths in left_out.items()},
        },
        "repaired": _pair(tally, "repaired"),
        "removed": {step: _pair(tally, step) for step in _STEPS},
        "repeated_ids": len(cleaned.renames),
        "left": _pair(left, "left"),
        "words_read": _sorted(tally.lengths),
        "words_left": _sorted(left.lengths),
        "languages_read": dict(tally.languages.most_common()),
        "languages_left": dict(left.languages.most_common()),
        "samples": tally.samples,
    }
    powers = sorted({int(power) for power in (*tally.lengths, *left.lengths)}) or [0]
    places = list(range(powers[0], powers[-1] + 1))
    draw_bars(
        folder / "lengths.png",
        places,
        {
            "read": [tally.lengths[str(i)] for i in places],
            "left": [left.lengths[str(i)] for i in places],
        },
        ("words of a document", "documents"),
        ticks=["0" if i == 0 else f"{1 << (i - 1):,}–\n{(1 << i) - 1:,}" for i in places],
    )
    _draw_languages(folder / "languages.png", tally.languages, left.languages)
    meanings = _STEPS | {"repaired": "repaired Unicode: before, and after"}
    write_report(folder, content, _markdown(content), meanings)
    came = tally.counts["read/documents"] + tally.counts["unreadable/documents"]
    stay = left.counts["left/documents"]
    return f"{came} documents read, {came - stay} removed, {stay} left"


def write_report(
    folder: Path, content: dict[str, Any], markdown: str, meanings: dict[str, str]
) -> None:
    """Writes `content` as `report.json`, and `markdown` with every step's samples as `report.md`.

    `meanings` describes, for every step, the value of its samples.
    """
    lines = [markdown]
    for step, samples in content["samples"].items():
        lines += ["", f"## {step}", "", f"{meanings[step]}.", ""]
        for sample in samples:
            named = (as_markdown(sample[key]) for key in ("id", "source") if sample.get(key))
            lines += [f"* {' · '.join(named)} **{as_markdown(sample['value'])}**", ""]
            # Indented by six, it is code of the list item: no markup, no HTML.
            shown = clean(sample["text"]).split("\n")
            lines += [f"      {line}" for line in shown if line.strip()]
            lines += [""]
    data = json_text(content, indent=1, ensure_ascii=False)
    for name, text in (("report.json", data), ("report.md", "\n".join(lines) + "\n")):
        write_atomically(folder / name, text.encode("utf-8", "backslashreplace"))


def show_near_duplicates(
    tally: Tally,
    drops: Shaped[np.ndarray, " d"],
    document_of: Callable[[int], Document],
    name_of: Callable[[Document], str],
) -> None:
    """Adds samples of near-duplicates to `tally`, chosen by a hash of the documents' numbers.

    `drops` are rows of `minhash.DROP`, `document_of` returns a document by its number, and
    `name_of` the name by which a sample cites the similar document that is kept.
    """

    def order(row: tuple[int, int, float]) -> bytes:
        return hashlib.blake2b(row[0].to_bytes(8, "little"), digest_size=8).digest()

    for number, witness, similarity in sorted(drops.tolist(), key=order)[:SAMPLES]:
        dropped, kept = document_of(number), document_of(witness)
        text = f"{dropped.text[: SHOWN // 2]}\n— is like —\n{kept.text[: SHOWN // 2]}"
        tally.show("similarity", f"{name_of(kept)}, {similarity:.2f}", text, dropped)


def _count_left(cleaned: CleanFolder, tally: Tally) -> Tally:
    """Returns counts of the documents that are left; adds the near-duplicates to `tally`."""
    left = Tally()
    for name in cleaned.names():
        table = np.load(cleaned.blocks / f"{name}.table.npy")
        dropped = np.isin(np.arange(len(table)), list(cleaned.left_out(name)))
        for characters in table["characters"][dropped].tolist():
            tally.count("similarity", characters)
        for words, characters, language in table[~dropped].tolist():
            left.count("left", characters)
            left.languages[language] += 1
            left.lengths[str(words.bit_length())] += 1
    return left


def _pair(tally: Tally, step: str) -> dict[str, int]:
    return {what: tally.counts[f"{step}/{what}"] for what in ("documents", "characters")}


def _sorted(lengths: Counter[str]) -> dict[str, int]:
    return {power: lengths[power] for power in sorted(lengths, key=int)}


def _markdown(content: dict[str, Any]) -> str:
    def row(name: str, pair: dict[str, int]) -> str:
        share = pair["characters"] / max(content["read"]["characters"], 1)
        return f"| {name} | {pair['documents']} | {pair['characters']} | {share:.2%} |"

    lines = [
        "# Data report",
        "",
        "| step | documents | characters | of those read |",
        "|---|---|---|---|",
        row("read", content["read"]),
        *(row(f"− {step}", pair) for step, pair in content["removed"].items()),
        row("left", content["left"]),
        "",
        f"Repaired, and not counted above: {content['repaired']['documents']} documents. Ids that"
        f" an earlier document had too: {content['repeated_ids']}.",
        "",
        _not_read(content["not_read"]),
        "",
        "![words of a document](lengths.png)",
        "",
        "![languages](languages.png)",
    ]
    return "\n".join(lines)


def _not_read(counts: dict[str, Any]) -> str:
    """Formats what was not read, with the paths of files."""
    told = [f"blank lines ({counts['blank lines']})"]
    for reason, paths in counts.items():
        if reason != "blank lines":
            told.append(f"{reason} ({len(paths)}: {', '.join(map(as_markdown, paths))})")
    return f"Not read: {'; '.join(told)}."


def draw_bars(
    path: Path,
    places: Sequence[float],
    counts: dict[str, Sequence[float]],
    labels: tuple[str, str],
    width: float = 1.0,
    ticks: Sequence[str] | None = None,
) -> None:
    """Draws two bars at each position: a wide one for the input and, in front, a narrow one (kept).

    `counts` has two entries, input and kept: label in the legend → values at `places`; `labels`
    are those of the x and y axes, `width` is the distance between positions, and `ticks` are the
    positions' labels, by default numbers.
    """
    (input_label, inputs), (kept_label, kept) = counts.items()
    with drawing(path, 8, 4) as figure:
        axes = figure.subplots()
        axes.bar(places, inputs, 0.85 * width, color=PALE, label=input_label)
        axes.bar(places, kept, 0.55 * width, color=TEAL, label=kept_label)
        if ticks is not None:
            axes.set_xticks(places, ticks, fontsize=8)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.legend()
        axes.grid()


def _draw_languages(path: Path, read: Counter[str], left: Counter[str]) -> None:
    ranked = sorted(read, key=lambda name: (-read[name], name))[:_LANGUAGES] or ["–"]
    with drawing(path, 8, 0.32 * len(ranked) + 1.4) as figure:
        axes = figure.subplots()
        axes.barh(ranked, [read[name] for name in ranked], 0.8, color=PALE, label="read")
        axes.barh(ranked, [left[name] for name in ranked], 0.5, color=TEAL, label="left")
        axes.invert_yaxis()
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlabel("documents")
        axes.legend()
        axes.grid()
