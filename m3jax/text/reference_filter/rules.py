"""Rule filters of references: the measures that are compared with thresholds.

The rules are ours: the paper says only that its knowledge base had texts of high quality (Memory³
§7). A word is defined as in `m3jax.text.cleaning.rules`: a single Chinese or Japanese character is
a word, so that the same thresholds suit texts with and without spaces.
"""

from __future__ import annotations

from typing import NamedTuple

from m3jax.text.cleaning.rules import measure, words_of

RULES = ("words_min", "nonalphabetic_max", "listed_max", "repeated_max")

_RUN = 3  # words of a run whose repetitions are counted
_SHORT = 80  # bytes of UTF-8: about 13 English words, 26 Chinese characters
_MARKS = tuple("*#|!{}<•·◦▪■●–—-+=;:")  # first characters of lines of lists, tables and markup
_ENDS = tuple(".!?…。！？:：;；,，")
_CLOSING = "\"'”’»)]）】』」"


class ReferenceMeasures(NamedTuple):
    """Holds the measures that the rules compare with thresholds."""

    words: int
    nonalphabetic: float  # fraction of non-space characters that are not letters
    listed: float  # fraction of non-space characters in lines of lists, tables, markup
    repeated: float  # fraction of runs of three words that repeat an earlier run


def measure_reference(text: str) -> ReferenceMeasures:
    """Computes the measures of a reference's text."""
    whole = measure(text)
    return ReferenceMeasures(whole.words, whole.nonalphabetic, _listed(text), _repeated(text))


def _listed(text: str) -> float:
    inside = total = 0
    for line in map(str.strip, text.split("\n")):
        signs = len(line) - sum(map(str.isspace, line))
        total += signs
        inside += signs if _is_listed(line) else 0
    return inside / total if total else 0.0


def _is_listed(line: str) -> bool:
    ends = line.rstrip(_CLOSING).endswith(_ENDS)
    short = len(line.encode("utf-8", "surrogatepass")) < _SHORT
    if line.startswith(_MARKS):
        return short or not ends
    return short and not ends


def _repeated(text: str) -> float:
    words = words_of(text)
    runs = list(zip(*(words[i:] for i in range(_RUN)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
