"""Rule filters of documents: measures of a text, and the first rule it breaks (Memory³ §7).

Our choices where the paper gives no details: a *word* is a run of characters without white space,
or a single Chinese or Japanese character, so that the same thresholds suit texts without spaces;
words are compared without case; the fraction of non-alphabetic characters ignores white space.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

RULES = ("words_min", "word_length_max", "nonalphabetic_max", "unique_max", "entropy_min")

_EAST = "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_EAST}]|[^\s{_EAST}]+")
_NORMAL = re.compile(rf"[{_EAST}]|[^\W_{_EAST}]+")
_PIECE = 1 << 20  # characters that are split into words at once, about: bounds RAM


class Measures(NamedTuple):
    """Holds the measures that the rules compare with thresholds."""

    words: int
    word_length: float  # mean characters of a word; 0 without words
    nonalphabetic: float  # fraction of non-space characters that are not letters
    unique: float  # number of different words / number of words
    entropy: float  # of the words' distribution, in nats


def measure(text: str) -> Measures:
    """Computes the measures of a text, about a million characters at a time."""
    counts: Counter[str] = Counter()
    signs = letters = 0
    for piece in pieces(text):
        counts.update(_WORD.findall(piece.lower()))
        signs += len(piece) - sum(map(str.isspace, piece))
        letters += sum(map(str.isalpha, piece))
    words = counts.total()
    if not words:
        return Measures(0, 0.0, 1.0, 1.0, 0.0)
    # fsum is exact, so that the order of the words does not matter
    entropy = math.log(words) - math.fsum(n * math.log(n) for n in counts.values()) / words
    return Measures(words, signs / words, 1 - letters / signs, len(counts) / words, entropy)


def broken_rule(
    measures: Any, limits: Any, rules: Sequence[str] = RULES
) -> tuple[str, float] | None:
    """Returns the first rule that a text breaks and the measure's value; None if it breaks none.

    A rule is named after its threshold in the config section `limits`: `<measure>_min`, which the
    measure must not be below, or `<measure>_max`, which it must not be above.
    """
    for rule in rules:
        name, _, bound = rule.rpartition("_")
        value, limit = getattr(measures, name), getattr(limits, rule)
        if value < limit if bound == "min" else value > limit:
            return rule, float(value)
    return None


def normal_words(text: str) -> Iterator[list[str]]:
    """Yields the words without punctuation and case, one list per piece (`pieces`)."""
    for piece in pieces(text):
        yield _NORMAL.findall(piece.casefold())


def words_of(text: str) -> list[str]:
    """Returns all `normal_words` of a text."""
    return [word for words in normal_words(text) for word in words]


def pieces(text: str) -> Iterator[str]:
    """Yields pieces of a text of about a million characters, cut at white space if possible."""
    start = 0
    while len(text) - start > _PIECE:
        end = max(text.rfind(mark, start + 1, start + _PIECE) for mark in "\n ")
        end = end + 1 if end > start else start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:] if start else text
