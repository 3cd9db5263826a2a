"""Benchmark `overlap`: speed of the filter that drops references too similar to the row itself.

A row of T tokens has T/64 chunks, each with 16 retrieved references, as in training; the filter
compares all of them with the row at once. Times are CPU seconds of all threads of the process, so
that other programs have no influence.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3jax.bench.rounds import Rounds, timed
from m3jax.data.rows import Rows
from m3jax.retrieval.index import Index
from m3jax.text.corpus import Corpus
from m3jax.text.overlap import overlap as windowed
from m3jax.text.overlap import which_exceed
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer

ROW_LENGTHS = (512, 2048)
THRESHOLDS = {"train": 0.9, "evaluation": 2 / 3}
CHUNK, CANDIDATES = 64, 16


class Pairs(NamedTuple):
    """Row, and the references retrieved for its chunks; a reference repeats if several chunks
    retrieved it."""

    text: np.ndarray  # tokens of the row
    references: np.ndarray  # (n, W), tokens of each reference, padded at the end
    lengths: np.ndarray  # (n,), number of tokens of each reference


def overlap(rows: int = 8, workdir: str | Path | None = None) -> Rounds:
    """Measures the time of the filter relative to computing the exact overlap of every pair.

    Args:
      rows: number of rows of each length.
      workdir: folder of `launch/prepare.py` whose rows and index are used; None: synthetic text.

    Yields:
      For rows of 512 and 2048 tokens and the thresholds of training and evaluation: `ratios` of
      times, `filter_over_windowed_…`; `pairs_per_second` of the filter; `shares`: the fraction of
      pairs above each threshold and the median overlap, to compare synthetic with real text.
    """
    cases: list[tuple[str, list[Pairs], float]] = []
    shares = {}
    for length in ROW_LENGTHS:
        pairs = made_pairs(length, rows) if workdir is None else _retrieved(workdir, length, rows)
        overlaps = _windowed(pairs)
        shares[f"median_overlap_row_{length}"] = float(np.median(overlaps))
        for name, threshold in THRESHOLDS.items():
            shares[f"above_{name}_row_{length}"] = float(np.mean(overlaps > threshold))
            cases.append((f"row_{length}_{name}", pairs, threshold))
    while True:
        ratios, speed = {}, {}
        for case, pairs, threshold in cases:
            calls: dict[str, Callable[[], Any]] = {
                "filter": functools.partial(_filter, pairs, threshold),
                "windowed": functools.partial(_windowed, pairs),
            }
            seconds = timed(calls, clock=time.process_time)
            ratios[f"filter_over_windowed_{case}"] = seconds["filter"] / seconds["windowed"]
            speed[case] = sum(len(row.lengths) for row in pairs) / seconds["filter"]
        yield {"ratios": ratios, "pairs_per_second": speed, "shares": shares}


def _filter(rows: list[Pairs], threshold: float) -> None:
    for row in rows:
        which_exceed(row.text, row.references, row.lengths, threshold)


def _windowed(rows: list[Pairs]) -> np.ndarray:
    """Computes the exact overlap of every pair of row and reference."""
    return np.array(
        [
            windowed(row.text, tokens[:length])
            for row in rows
            for tokens, length in zip(row.references, row.lengths, strict=True)
        ]
    )


def _retrieved(workdir: str | Path, length: int, rows: int) -> list[Pairs]:
    """Reads rows of a prepared corpus and retrieves references for their chunks."""
    workdir = Path(workdir)
    tokenizer = Tokenizer.load(workdir / "tokenizer")
    references = References(workdir / "references")
    index = Index.open(workdir / "index", references)
    corpus = Rows(Corpus(workdir / "corpus" / "train"), length, CHUNK, "concat")
    chosen = np.random.default_rng(0).permutation(len(corpus))[:rows]
    pairs = []
    for row in chosen.tolist():
        ((text, _),) = corpus[row].texts
        queries = [tokenizer.decode(text[low : low + CHUNK]) for low in range(0, length, CHUNK)]
        ids, scores = index.search(index.embedder.embed_queries(queries), CANDIDATES)
        ids = ids[(ids >= 0) & (scores > 0)]
        pairs.append(Pairs(text, references.tokens(ids), np.asarray(references.lengths)[ids]))
    return pairs


# Synthetic text. The constants are fitted to English Wikipedia with a vocabulary of 8192 (figures
# in docs/performance.md). Tokens follow the Zipf-Mandelbrot law, mixed with tokens of a topic.
# Articles are also split into references, so that a chunk retrieves its own text.
_VOCABULARY, _WIDTH, _ARTICLE = 8192, 128, 4096
_TOPIC_TOKENS, _TOPIC_SHARES, _RARE_SHARES = 400, (0.0, 0.4), (0.0, 0.4)
_FROM_ARTICLE, _EDITED = 0.38, 0.04  # fractions of a chunk's candidates


def made_pairs(length: int, rows: int, seed: int = 0) -> list[Pairs]:
    """Makes synthetic rows of at most 4096 tokens with references like retrieved ones: copies,
    edited copies, and other texts of the same topic."""
    rng = np.random.default_rng([seed, length])
    return [_made_row(rng, length) for _ in range(rows)]


def _made_row(rng: np.random.Generator, length: int) -> Pairs:
    """Makes a row from a synthetic article, and candidates for each of its chunks."""
    topic = rng.choice(_VOCABULARY, _TOPIC_TOKENS, replace=False)
    article = _draw(rng, topic, _ARTICLE)
    begin = int(rng.integers(0, _ARTICLE - length + 1))
    cuts = np.cumsum(np.clip(rng.normal(106, 28, _ARTICLE // 60), 40, _WIDTH).astype(int))
    own = [piece[:_WIDTH] for piece in np.split(article, cuts[cuts < _ARTICLE])]
    pieces = []
    for first in range(begin, begin + length, CHUNK):
        edges = np.searchsorted(cuts, (first, first + CHUNK - 1), side="right")
        pieces += [own[at] for at in edges.tolist()]  # references that contain the chunk's text
        for draw in rng.random(CANDIDATES - len(edges)):
            piece = own[rng.integers(len(own))]
            if draw >= _FROM_ARTICLE:
                piece = _draw(rng, topic, len(piece))
            if draw < _EDITED:
                changed = rng.random(len(piece)) < rng.uniform(0.02, 0.4)
                piece = np.where(changed, _draw(rng, topic, len(piece)), piece)
            pieces.append(piece)
    references = np.zeros((len(pieces), _WIDTH), np.int32)
    for row, piece in zip(references, pieces, strict=True):
        row[: len(piece)] = piece
    lengths = np.array([len(piece) for piece in pieces], np.int32)
    return Pairs(article[begin : begin + length], references, lengths)


def _draw(rng: np.random.Generator, topic: np.ndarray, count: int) -> np.ndarray:
    """Draws tokens by frequency, mixed with tokens of the topic and uniformly drawn, mostly rare
    tokens (like names)."""
    tokens = rng.choice(_VOCABULARY, count, p=_zipf(_VOCABULARY))
    special = topic[rng.choice(len(topic), count, p=_zipf(len(topic)))]
    tokens = np.where(rng.random(count) < rng.uniform(*_TOPIC_SHARES), special, tokens)
    rare = rng.random(count) < rng.uniform(*_RARE_SHARES)
    return np.where(rare, rng.integers(0, _VOCABULARY, count), tokens)


def _zipf(count: int) -> np.ndarray:
    weights = (np.arange(count) + 2.0) ** -1.1
    return weights / weights.sum()
