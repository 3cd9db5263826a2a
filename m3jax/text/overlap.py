"""Overlap of a reference with a text: fraction of it that occurs there in order, close together.

    overlap(t, r) = (1/|r|) · max N  such that  t[i_1..i_N] = r[j_1..j_N],  i and j increasing,
                                                |i_N − i_1| ≤ 2|r|

that is, the length of the longest common subsequence of r and any window of 2|r| + 1 tokens of t,
divided by |r| (Memory³ §6.1).
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
    """Computes the overlap, 0 … 1, exactly as defined above; 0 if either sequence is empty."""
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
    """Returns True for each reference that overlaps with a text by more than `threshold`, 0 … 1.

    Row i of `references` holds `lengths[i]` tokens, then padding. Four bounds, each tighter and
    costlier than the previous, are applied to the references that are still undecided: number of
    tokens that occur in the text, size of the multiset intersection (both vectorized over the
    references), longest common subsequence without a window, and within any window.
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


def which_exceed_either_way(
    text_tokens: Tokens,
    references: Integer[np.ndarray, "n W"],
    lengths: Integer[np.ndarray, " n"],
    threshold: float,
) -> Bool[np.ndarray, " n"]:
    """Returns True for each reference if its overlap with a text, or the text's with it, exceeds.

    A question is often shorter than a reference: a reference that contains all of it overlaps with
    it by a small fraction of the reference. Arguments as in `which_exceed`; a text of n tokens
    cannot exceed the threshold with references of up to `threshold` · n tokens.
    """
    text, lengths = np.asarray(text_tokens, np.int64), np.asarray(lengths)
    above = which_exceed(text, references, lengths, threshold)
    size = np.array([len(text)])
    for i in np.flatnonzero(~above & (lengths > threshold * len(text))).tolist():
        above[i] = which_exceed(references[i, : lengths[i]], text[None], size, threshold)[0]
    return above


def fewest_above(threshold: float, length: int) -> int:
    """Returns the smallest n with n / `length` > `threshold`."""
    return next(n for n in itertools.count(int(threshold * length)) if n / length > threshold)


def shared(
    text_tokens: Tokens,
    references: Integer[np.ndarray, "n W"],
    lengths: Integer[np.ndarray, " n"],
) -> Integer[np.ndarray, " n"]:
    """Returns the size of the multiset intersection of a text with each reference, (n,).

    It is an upper bound of the common subsequence's length, in either direction of the overlap.
    """
    text = np.asarray(text_tokens, np.int64)
    if not text.size or not references.size:
        return np.zeros(len(lengths), np.int64)
    counts = np.bincount(text, minlength=max(int(text.max()), int(references.max())) + 1)
    return _occurring_as_often(counts, references, np.asarray(lengths))


def _occurring(counts: _Ints, references: _Rows, lengths: _Ints) -> _Ints:
    """Counts each reference's tokens that occur in the text (token t: `counts[t]` times)."""
    real = np.arange(references.shape[1]) < lengths[:, None]
    return np.count_nonzero((counts > 0).take(references) & real, axis=1)


def _occurring_as_often(counts: _Ints, references: _Rows, lengths: _Ints) -> _Ints:
    """Computes the size of the multiset intersection of the text and each reference."""
    offsets = np.arange(references.shape[1])
    padded = np.where(offsets < lengths[:, None], references, len(counts))
    padded.sort(axis=1)
    begins = np.ones(padded.shape, bool)  # True where a run of equal tokens begins
    begins[:, 1:] = padded[:, 1:] != padded[:, :-1]
    before = offsets - np.maximum.accumulate(np.where(begins, offsets, 0), axis=1)
    return np.count_nonzero(np.append(counts, 0).take(padded) > before, axis=1)


def _no_numbers(size: int, width: int) -> _Ints:
    return np.zeros(size, np.uint8 if width <= 0xFF else np.uint32)


def _longest(text: _Ints, reference: _Ints, numbers: _Ints, above: int, stop: int) -> int:
    """Returns the longest common subsequence's length over all windows, at least `above`.

    The reference's tokens are renumbered from 1 (by the lookup table `numbers`, all zero before and
    after the call), and all other tokens are removed from the text: the rest is short, and a number
    fits in a byte for references of up to 255 tokens.

    The window with the most tokens of the reference is tried first; it decides nearly all texts
    that contain a copy of the reference. Then branch and bound over the window's first position:
    the common subsequence with the union of several windows bounds that with each of them. Ends
    early when `stop` is reached.
    """
    numbers[reference] = np.arange(1, len(reference) + 1)
    numbered, pattern = numbers.take(text), _as_sequence(numbers.take(reference))
    numbers[reference] = 0
    inside = _as_sequence(numbered)
    if LCSseq.similarity(inside, pattern, score_cutoff=above + 1) <= above:
        return above
    places = np.flatnonzero(numbered > 0)  # positions in the text of the tokens of `inside`
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
    """Packs the nonzero numbers into bytes or text, which rapidfuzz compares without boxing."""
    if numbers.dtype == np.uint8:
        return numbers.tobytes().translate(None, b"\0")
    return numbers[numbers > 0].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
