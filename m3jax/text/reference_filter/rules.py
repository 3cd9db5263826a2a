"""Rule filters of references: their measures, and the first rule a reference breaks.

Ours: the paper says of its knowledge base only that the texts were of high quality (Memory³ §7). A
word is what it is in `m3jax.text.cleaning.rules`, so one sign of Chinese or Japanese is a word, and
one set of thresholds serves texts with and without spaces.
"""

from __future__ import annotations

from typing import NamedTuple

from m3jax.text.cleaning.rules import measure, words_of

RULES = ("words_min", "nonalphabetic_max", "listed_max", "repeated_max")

_RUN = 3  # words that are looked for again
_SHORT = 80  # bytes of UTF-8: about 13 words of English, 26 signs of Chinese
_MARKS = tuple("*#|!{}<•·◦▪■●–—-+=;:")  # what lines of lists, tables and markup begin with
_ENDS = tuple(".!?…。！？:：;；,，")
_CLOSING = "\"'”’»)]）】』」"


class ReferenceMeasures(NamedTuple):
    """Holds the measures that the rules compare with thresholds."""

    words: int
    nonalphabetic: float  # share of the characters that are no letters, white space left out
    listed: float  # share of the same in lines of lists, tables and markup
    repeated: float  # share of the runs of three words that the reference has had before


def measure_reference(text: str) -> ReferenceMeasures:
    """Measures a reference."""
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
