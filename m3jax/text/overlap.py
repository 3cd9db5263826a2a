"""How much of a reference occurs in a text, in order and close together (Memory³ §6.1).

    overlap(t, r) = (1/|r|) · max N  such that  t[i_1..i_N] = r[j_1..j_N],  i and j increasing,
                                                |i_N − i_1| ≤ 2|r|

that is, the longest common subsequence of r with any window of 2|r| + 1 tokens of t.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Integer
from rapidfuzz.distance import LCSseq

Tokens = Sequence[int | np.integer] | Integer[np.ndarray, "_"]


def overlap(text_tokens: Tokens, reference_tokens: Tokens) -> float:
    """The overlap of a reference with a text, 0 … 1; exactly the definition above.

    Args:
      text_tokens: tokens of the text t.
      reference_tokens: tokens of the reference r, without padding.

    Returns:
      The overlap; 0 if either is empty.
    """
    if not len(text_tokens) or not len(reference_tokens):
        return 0.0
    text, reference = _as_strings(text_tokens, reference_tokens)
    return _longest(text, reference, above=0, stop=len(reference)) / len(reference)


def exceeds(text_tokens: Tokens, reference_tokens: Tokens, threshold: float) -> bool:
    """Whether `overlap(text_tokens, reference_tokens) > threshold`, mostly without computing it."""
    tokens = np.asarray(reference_tokens, np.int64)[None]
    lengths = np.array([len(reference_tokens)])
    return bool(which_exceed(text_tokens, tokens, lengths, threshold)[0])


def which_exceed(
    text_tokens: Tokens,
    references: Integer[np.ndarray, "n W"],
    lengths: Integer[np.ndarray, " n"],
    threshold: float,
) -> Bool[np.ndarray, " n"]:
    """`exceeds` of many references against one text.

    Three bounds from cheap to exact: how many of the reference's tokens occur in the text at all
    (all references at once), the common subsequence without a window, the windowed one.

    Args:
      text_tokens: tokens of the text.
      references: tokens of the references, padded behind `lengths`.
      lengths: number of tokens of each reference.
      threshold: 0 … 1.

    Returns:
      True where the overlap is larger than the threshold.
    """
    text = np.asarray(text_tokens, np.int64)
    lengths = np.asarray(lengths)
    found = np.zeros(len(lengths), bool)
    if not text.size or not references.size:
        return found
    occurs = np.zeros(max(int(text.max()), int(references.max())) + 1, bool)
    occurs[text] = True
    real = np.arange(references.shape[1]) < lengths[:, None]
    shared = (occurs[references] & real).sum(axis=1)
    # The same division as in `overlap`, so that both agree in every rounding.
    for i in np.flatnonzero(shared / np.maximum(lengths, 1) > threshold).tolist():
        size = int(lengths[i])
        needed = next(n for n in range(int(threshold * size), size + 1) if n / size > threshold)
        whole, reference = _as_strings(text, references[i, :size])
        found[i] = _longest(whole, reference, above=needed - 1, stop=needed) >= needed
    return found


def _as_strings(*sequences: Tokens) -> list[str]:
    """Tokens as strings, one character each: rapidfuzz compares those without boxing integers."""
    arrays = [np.asarray(tokens) for tokens in sequences]
    if max(int(tokens.max()) for tokens in arrays) > 0x10FFFF:
        inverse = np.unique(np.concatenate(arrays), return_inverse=True)[1]
        arrays = np.split(inverse, np.cumsum([len(tokens) for tokens in arrays])[:-1])
    return [a.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass") for a in arrays]


def _longest(text: str, reference: str, above: int, stop: int) -> int:
    """Longest common subsequence within any window, if more than `above`, else `above`.

    Branch and bound over the first position of the window: the subsequence with the union of many
    windows bounds that with each of them. Ends early when `stop` is reached.
    """
    span = 2 * len(reference)  # a window from i holds i … i + span
    members = set(reference)
    starts = [i for i, token in enumerate(text) if token in members]
    best = above
    ranges = [(0, len(starts) - 1)] if starts else []
    while ranges and best < stop:
        low, high = ranges.pop()
        first, end = starts[low], min(starts[high] + span + 1, len(text))
        bound = LCSseq.similarity(text[first:end], reference, score_cutoff=best + 1)
        if bound <= best:
            continue
        if end - first <= span + 1:  # the union is itself a window
            best = bound
        else:
            middle = (low + high) // 2
            ranges += [(middle + 1, high), (low, middle)]
    return best
