"""Measures leakage: the overlap of retrieved references with the text that retrieves them.

Chunks of corpus rows, or of questions, are queries, without the overlap filter; every retrieved
reference is compared with the whole row or question (Memory³ §6.1).
"""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import PercentFormatter
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.data.rows import Rows
from m3jax.errors import LeakageError
from m3jax.figures import AMBER, BLUE, INK, PINK, drawing
from m3jax.knowledge.versions import open_index, open_references, open_version
from m3jax.mirror import Mirror
from m3jax.printable import as_label, one_line
from m3jax.reading import only_field, read_records
from m3jax.retrieval.retriever import Retriever
from m3jax.text.corpus import Corpus
from m3jax.text.overlap import overlap
from m3jax.text.references import References
from m3jax.text.tokenizer import PAD, Tokenizer

SPLITS = ("train", "validation")
BINS = 30  # of the histogram over 0 … 1; 2/3 and 0.9 are edges
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_EXAMPLES = 4  # per kind: dropped, kept
_COLUMN = 52  # width of a column of examples, characters
_BANDS = (
    (0.0, 2 / 3, BLUE, "read in training and evaluation"),
    (2 / 3, 0.9, AMBER, "dropped in evaluation (above 2/3)"),
    (0.9, 1.0, PINK, "dropped in training too (above 0.9)"),
)


class Text(NamedTuple):
    """Text whose retrieved references are examined: a row of a corpus, or a question."""

    name: str
    tokens: np.ndarray


class Pair(NamedTuple):
    """Text, the id of a reference that it retrieved, and their overlap."""

    overlap: float
    text: Text
    reference: int


def leakage(
    config: ConfigDict,
    workdir: str | Path,
    *,
    against: str | Path = "train",
    sample: int = 1000,
    threshold: float = 0.9,
) -> dict[str, Any]:
    """Measures the overlap of a sample of texts with the references that they retrieve.

    Args:
      config: a validated config.
      workdir: folder of `launch/prepare.py`.
      against: `train` or `validation` for rows of the corpus, or a .jsonl file of questions
        (`prompt` or `question`; `reading.rows`). The overlap is that of the reference with the
        text or of the text
        with the reference, whichever is larger: a question is often shorter than a reference.
      sample: most texts, drawn at random with the config's seed.
      threshold: overlap above which a reference counts as dropped.

    Returns:
      `against` and `threshold`; counts of `texts`, of `queries` with a result, and of `pairs` of a
      query and a reference; `quantiles` of the overlap; `histogram` (counts in BINS equal bins over
      0 … 1); `above`, the share of pairs above the threshold, 0.9 and 2/3; `queries_leaking`, the
      share of queries whose best reference is above the threshold; `queries_emptied`, the share of
      queries all of whose references are above it; `dropped` and `kept`, examples above the
      threshold and not above it, by descending overlap, no title twice: `overlap`, `key`, `title`,
      `text`, `reference`, `name` of the text.

    Raises:
      LeakageError: `threshold` or `sample` out of range, or nothing retrieved.
      TextError, RetrievalError, VersionError: unusable questions; the workdir is not prepared.
    """
    if not 0 <= threshold <= 1:
        raise LeakageError(f"threshold = {threshold}: an overlap is between 0 and 1")
    if sample < 1:
        raise LeakageError(f"sample = {sample}: an empty sample says nothing; take at least 1 text")
    workdir = Path(workdir)
    questions = None if against in SPLITS else _questions(Path(against))
    mirror = Mirror.of(workdir)
    mirror.fetch("tokenizer", *([f"corpus/{against}"] if against in SPLITS else []))
    tokenizer = Tokenizer.load(workdir / "tokenizer")
    rng = np.random.default_rng(config.seed)
    if questions is None:
        texts = _rows(config, workdir / "corpus" / against, sample, rng)
    else:
        chosen = np.sort(rng.permutation(len(questions))[:sample]).tolist()
        named = ((f"{Path(against).name}:{i + 1}", questions[i]) for i in chosen)
        texts = [Text(name, np.asarray(tokenizer.encode(text))) for name, text in named]
    version = open_version(workdir)
    references = open_references(config, version, tokenizer)
    index = open_index(version, references)
    retriever = Retriever(index, references, config.retrieval.candidates, 1.0)
    pairs, overlaps, chunk = [], [], config.memory.chunk_length
    for text in tqdm(texts, desc="leakage", unit="text", disable=None, dynamic_ncols=True):
        inputs = max(1, len(text.tokens) - 1)  # the last token of a row is a target
        starts = range(0, inputs, chunk)
        queries = [tokenizer.decode(text.tokens[low : low + chunk]) for low in starts]
        ids = retriever.retrieve(queries, None, retriever.candidates)
        unique = np.unique(ids[ids >= 0]).tolist()
        measured = {i: _overlap(text, references, i) for i in unique}
        pairs += [Pair(value, text, i) for i, value in measured.items()]
        overlaps += [[measured[i] for i in row if i >= 0] for row in ids.tolist() if max(row) >= 0]
    values = np.array([value for of_query in overlaps for value in of_query])
    if not len(values):
        raise LeakageError(
            f"no reference was found for any of {len(texts)} texts of {against}: they share no word"
            " with the knowledge base; look at the text, or prepare again with other --knowledge"
        )
    limits = {f"{limit:.3g}": limit for limit in sorted({2 / 3, 0.9, threshold})}
    return {
        "against": str(against),
        "threshold": threshold,
        "texts": len(texts),
        "queries": len(overlaps),
        "pairs": len(values),
        "quantiles": {str(q): float(np.quantile(values, q)) for q in _QUANTILES},
        "histogram": np.histogram(values, BINS, (0, 1))[0].tolist(),
        "above": {name: float(np.mean(values > limit)) for name, limit in limits.items()},
        "queries_leaking": float(np.mean([of_query[0] > threshold for of_query in overlaps])),
        "queries_emptied": float(np.mean([min(of_query) > threshold for of_query in overlaps])),
        "dropped": _examples([p for p in pairs if p.overlap > threshold], references, tokenizer),
        "kept": _examples([p for p in pairs if p.overlap <= threshold], references, tokenizer),
    }


def _rows(config: ConfigDict, folder: Path, sample: int, rng: np.random.Generator) -> list[Text]:
    data = config.data
    rows = Rows(Corpus(folder), data.sequence_length, config.memory.chunk_length, data.packing)
    chosen = np.sort(rng.permutation(len(rows))[:sample]).tolist()
    return [Text(f"row {row} of {folder.name}", rows[row].texts[0][0]) for row in chosen]


def _questions(path: Path) -> list[str]:
    if not path.exists():
        raise LeakageError(
            f"{path}: no such file; give 'train', 'validation' or a .jsonl file of questions"
        )

    def parse(record: dict[str, Any]) -> str:
        text = record[only_field(record, "prompt", "question")]
        if not isinstance(text, str) or not text.strip():
            raise TypeError("an empty text, or none")
        return text

    return read_records(path, parse, "questions", "an object with `prompt` or `question`")


def _overlap(text: Text, references: References, i: int) -> float:
    """Returns the larger overlap of a text with reference `i` and of the reference with it."""
    reference = references.tokens([i])[0, : references.lengths[i]]
    share = overlap(text.tokens, reference)
    if len(reference) <= share * len(text.tokens):  # more of the text cannot be in the reference
        return share
    return max(share, overlap(reference, text.tokens))


def _examples(
    pairs: list[Pair], references: References, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Returns the pairs with the largest overlap, one per title, as records of the report."""
    chosen: dict[str, dict[str, Any]] = {}
    for value, text, i in sorted(pairs, key=lambda pair: -pair.overlap):
        reference = references[i]
        title = reference.title or reference.key
        if title not in chosen:
            shown = tokenizer.decode(_densest(text.tokens, reference.tokens))
            names = {"overlap": value, "key": reference.key, "title": title, "name": text.name}
            chosen[title] = {**names, "text": shown, "reference": reference.text}
        if len(chosen) == _EXAMPLES:
            break
    return list(chosen.values())


def _densest(text: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns the part of the text, as long as the reference, that shares most tokens with it."""
    shared = np.concatenate([[0], np.cumsum(np.isin(text, reference) & (text != PAD))])
    length = min(len(reference), len(text))
    begin = int(np.argmax(shared[length:] - shared[:-length]))
    return text[begin : begin + length]


def leakage_table(report: dict[str, Any]) -> str:
    """Returns the report of `leakage` as Markdown, with texts and references side by side."""
    above = ", ".join(f"{share:.2%} above {limit}" for limit, share in report["above"].items())
    lines = [
        f"{report['pairs']} references found by {report['queries']} chunks of {report['texts']}"
        f" texts ({report['against']}), without filter",
        "",
        "| quantile | " + " | ".join(report["quantiles"]) + " |",
        "|---" * (1 + len(report["quantiles"])) + "|",
        "| overlap | " + " | ".join(f"{x:.3f}" for x in report["quantiles"].values()) + " |",
        "",
        f"Of the references found: {above}.",
        f"Of the chunks: {report['queries_leaking']:.2%} find first a reference above"
        f" {report['threshold']:.3g}, {report['queries_emptied']:.2%} find nothing else.",
    ]
    for kind in ("dropped", "kept"):
        for example in report[kind]:
            title = one_line(f"{example['title']} ({example['key']}) with {example['name']}")
            lines += ["", f"{kind}, overlap {example['overlap']:.3f}: {title}"]
            columns = [
                [name, *textwrap.wrap(text.strip(), _COLUMN, max_lines=7, placeholder=" …")]
                for name, text in (("REFERENCE", example["reference"]), ("TEXT", example["text"]))
            ]
            both = itertools.zip_longest(*columns, fillvalue="")
            lines += [f"    {left:<{_COLUMN}} │ {right}" for left, right in both]
    return "\n".join(lines)


def leakage_histogram(report: dict[str, Any], path: str | Path) -> None:
    """Plots the histogram of the overlap as a PNG, coloured by the filter limits of Memory³.

    Args:
      report: of `leakage`.
      path: the PNG, written atomically.
    """
    shares = np.array(report["histogram"]) / sum(report["histogram"])
    middles = (np.arange(BINS) + 0.5) / BINS
    above = [1.0, report["above"]["0.667"], report["above"]["0.9"], 0.0]
    with drawing(path, 9, 4.6) as figure:
        axes = figure.subplots()
        for band, more, less in zip(_BANDS, above[:-1], above[1:], strict=True):
            low, high, colour, meaning = band
            inside = (middles > low) & (middles < high)
            label = f"{more - less:.1%} {meaning}"
            axes.bar(middles[inside], shares[inside], 0.9 / BINS, color=colour, label=label)
        threshold, top = report["threshold"], axes.get_xaxis_transform()
        axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(
            threshold, 0.99, f"threshold {threshold:.3g} ", ha="right", va="top", transform=top
        )
        axes.set(xlim=(0, 1), ylim=(0, 1.2 * shares.max()), ylabel="share of references found")
        axes.set_xlabel("overlap of a reference found with the text (Memory³ §6.1)")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="y")
        axes.legend(loc="upper center", frameon=True, edgecolor="white", framealpha=1, fontsize=10)
        against = as_label(Path(report["against"]).name)
        axes.set_title(
            f"What retrieval finds for {report['texts']} texts ({against}), before the filter"
        )
