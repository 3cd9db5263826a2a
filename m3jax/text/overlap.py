"""Overlap of a reference with a text: the share of it that occurs in order, close together.

    overlap(t, r) = (1/|r|) · max N  such that  t[i_1..i_N] = r[j_1..j_N],  i and j increasing,
                                                |i_N − i_1| ≤ 2|r|

that is, the longest common subsequence of r with any window of 2|r| + 1 tokens of t
(Memory³ §6.1).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Integer
from rapidfuzz.distance import LCSseq

_Ints = Integer[np.ndarray, "_"]
_Rows = Integer[np.ndarray, "n W"]
Tokens = Sequence[int | np.integer] | _Ints


def overlap(text_tokens: Tokens, reference_tokens: Tokens) -> float:
    """Computes the overlap, 0 … 1, exactly as defined above; 0 if a side is empty."""
    if not len(text_tokens) or not len(reference_tokens):
        return 0.0
    text = np.asarray(text_tokens, np.int64)
    reference = np.asarray(reference_tokens, np.int64)
    numbers = _no_numbers(max(int(text.max()), int(reference.max())) + 1, len(reference))
    return _longest(text, reference, numbers, above=0, stop=len(reference)) / len(reference)


def which_exceed(
    text_tokens: Tokens,
    references: Integer[np.ndarray, "n W"],
    lengths: Integer[np.ndarray, " n"],
    threshold: float,
) -> Bool[np.ndarray, " n"]:
    """Tests which references overlap with a text by more than `threshold`, 0 … 1.

    `references` are padded behind `lengths`. Four bounds, each tighter and dearer than the one
    before, are taken of the references that are left: tokens that occur in the text, tokens that
    occur as often as in the reference (both of all references at once), the common subsequence
    without a window, the windowed one.
    """
    text = np.asarray(text_tokens, np.int64)
    lengths = np.asarray(lengths)
    above = np.zeros(len(lengths), bool)
    if not text.size or not references.size:
        return above
    size = max(int(text.max()), int(references.max())) + 1
    counts = np.bincount(text, minlength=size)
    left = np.arange(len(lengths))
    for shared in (_occurring, _occurring_as_often):
        # The same division as in `overlap`, so that both agree in every rounding.
        bound = shared(counts, references[left], lengths[left]) / np.maximum(lengths[left], 1)
        left = left[bound > threshold]
    numbers = _no_numbers(size, references.shape[1])
    for i in left.tolist():
        length = int(lengths[i])
        least = fewest_above(threshold, length)
        above[i] = _longest(text, references[i, :length], numbers, least - 1, least) >= least
    return above


def fewest_above(threshold: float, length: int) -> int:
    """Returns the fewest of `length` tokens that are a larger share of them than `threshold`."""
    return next(n for n in itertools.count(int(threshold * length)) if n / length > threshold)


def shared(
    text_tokens: Tokens,
    references: Integer[np.ndarray, "n W"],
    lengths: Integer[np.ndarray, " n"],
) -> Integer[np.ndarray, " n"]:
    """Counts tokens that a text and each reference share, as multisets; bounds both overlaps."""
    text = np.asarray(text_tokens, np.int64)
    if not text.size or not references.size:
        return np.zeros(len(lengths), np.int64)
    counts = np.bincount(text, minlength=max(int(text.max()), int(references.max())) + 1)
    return _occurring_as_often(counts, references, np.asarray(lengths))


def _occurring(counts: _Ints, references: _Rows, lengths: _Ints) -> _Ints:
    """Counts tokens of each reference that the text has, given how often it has each."""
    real = np.arange(references.shape[1]) < lengths[:, None]
    return np.count_nonzero((counts > 0).take(references) & real, axis=1)


def _occurring_as_often(counts: _Ints, references: _Rows, lengths: _Ints) -> _Ints:
    """Computes the size of the intersection of text and each reference as multisets."""
    offsets = np.arange(references.shape[1])
    padded = np.where(offsets < lengths[:, None], references, len(counts))
    padded.sort(axis=1)
    begins = np.ones(padded.shape, bool)  # of a run of equal tokens
    begins[:, 1:] = padded[:, 1:] != padded[:, :-1]
    before = offsets - np.maximum.accumulate(np.where(begins, offsets, 0), axis=1)
    return np.count_nonzero(np.append(counts, 0).take(padded) > before, axis=1)


def _no_numbers(size: int, width: int) -> _Ints:
    return np.zeros(size, np.uint8 if width <= 0xFF else np.uint32)


def _longest(text: _Ints, reference: _Ints, numbers: _Ints, above: int, stop: int) -> int:
    """Finds the longest common subsequence within any window, if more than `above`, else `above`.

    The tokens of the reference are numbered from 1 (in the table `numbers`, zero before and after),
    and all others taken out of the text: the rest is short, and fits in bytes.

    The window with most tokens of the reference comes first, which decides for nearly all copies.
    Then branch and bound over the first position of the window: the subsequence with the union of
    many windows bounds that with each of them. Ends early when `stop` is reached.
    """
    numbers[reference] = np.arange(1, len(reference) + 1)
    numbered, pattern = numbers.take(text), _as_sequence(numbers.take(reference))
    numbers[reference] = 0
    inside = _as_sequence(numbered)
    if LCSseq.similarity(inside, pattern, score_cutoff=above + 1) <= above:
        return above
    places = np.flatnonzero(numbered > 0)  # in the text, of what is inside
    span = 2 * len(reference)  # a window from i holds i … i + span
    ends = np.searchsorted(places, places + span, side="right")
    fullest = int(np.argmax(ends - np.arange(len(ends))))
    window = inside[fullest : ends[fullest]]
    best = max(above, LCSseq.similarity(window, pattern, score_cutoff=above + 1))
    ranges = [(0, len(places) - 1)]
    while ranges and best < stop:
        low, high = ranges.pop()
        bound = LCSseq.similarity(inside[low : ends[high]], pattern, score_cutoff=best + 1)
        if bound <= best:
            continue
        if ends[high] == ends[low]:  # the union is itself a window
            best = bound
        else:
            middle = (low + high) // 2
            ranges += [(middle + 1, high), (low, middle)]
    return best


def _as_sequence(numbers: _Ints) -> bytes | str:
    """Packs numbers without zeros so that rapidfuzz compares them without boxing integers."""
    if numbers.dtype == np.uint8:
        return numbers.tobytes().translate(None, b"\0")
    return numbers[numbers > 0].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
