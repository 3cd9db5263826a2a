"""Rule filters of documents: their measures, and the first rule a text breaks (Memory³ §7).

Ours, where the paper is silent: a *word* is a run of signs without white space, or one sign of
Chinese or Japanese, so that the same thresholds serve texts without spaces; words are compared
without case; the share of non-alphabetic characters leaves out white space.
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
_PIECE = 1 << 20  # about how many characters are split into words at once, to bound memory


class Measures(NamedTuple):
    """Holds the measures that the rules compare with thresholds."""

    words: int
    word_length: float  # mean characters of a word; 0 without words
    nonalphabetic: float  # share of the characters that are no letters, white space left out
    unique: float  # share of different words among all
    entropy: float  # of the distribution of words, nats


def measure(text: str) -> Measures:
    """Measures a text, a million characters at a time."""
    counts: Counter[str] = Counter()
    signs = letters = 0
    for piece in pieces(text):
        counts.update(_WORD.findall(piece.lower()))
        signs += len(piece) - sum(map(str.isspace, piece))
        letters += sum(map(str.isalpha, piece))
    words = counts.total()
    if not words:
        return Measures(0, 0.0, 1.0, 1.0, 0.0)
    # fsum is exact, so that the order in which words were met does not matter
    entropy = math.log(words) - math.fsum(n * math.log(n) for n in counts.values()) / words
    return Measures(words, signs / words, 1 - letters / signs, len(counts) / words, entropy)


def broken_rule(
    measures: Any, limits: Any, rules: Sequence[str] = RULES
) -> tuple[str, float] | None:
    """Returns the first rule that a text breaks, and the value that breaks it; None = it passes.

    A rule is the name of a threshold in the config section `limits`: that of a measure and `_min`,
    which it must not be below, or `_max`, which it must not be above.
    """
    for rule in rules:
        name, _, bound = rule.rpartition("_")
        value, limit = getattr(measures, name), getattr(limits, rule)
        if value < limit if bound == "min" else value > limit:
            return rule, float(value)
    return None


def normal_words(text: str) -> Iterator[list[str]]:
    """Yields words without signs and case, as near-duplicates are compared; a list a piece."""
    for piece in pieces(text):
        yield _NORMAL.findall(piece.casefold())


def words_of(text: str) -> list[str]:
    """Returns all `normal_words` of a text."""
    return [word for words in normal_words(text) for word in words]


def pieces(text: str) -> Iterator[str]:
    """Yields a text in parts of about a million characters, cut at white space where it can."""
    start = 0
    while len(text) - start > _PIECE:
        end = max(text.rfind(mark, start + 1, start + _PIECE) for mark in "\n ")
        end = end + 1 if end > start else start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:] if start else text
