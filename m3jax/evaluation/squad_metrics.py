"""Computes exact match and F1 of short answers, as SQuAD's evaluation defines them.

All comparisons use SQuAD's normal form, as published results do; it keeps accents. One thing
differs: an answer of articles and punctuation alone, such as the letter A, keeps them. SQuAD's
script leaves nothing of it, and then an empty answer would be right.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def normalise(answer: str) -> str:
    """Returns an answer in lower case without punctuation, articles and superfluous space."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def _compared(answer: str) -> str:
    return normalise(answer) or answer.lower().strip()


def exact_match(answer: str, right: Sequence[str]) -> float:
    """Returns 1 if the answer equals one of the right answers in normal form, else 0."""
    given = _compared(answer)
    return float(bool(given) and given in map(_compared, right))


def f1(answer: str, right: Sequence[str]) -> float:
    """Returns the harmonic mean of word precision and recall, for the best of the right answers."""
    return max(
        (_f1(_compared(answer).split(), _compared(text).split()) for text in right), default=0
    )


def _f1(words: list[str], right: list[str]) -> float:
    shared = sum((Counter(words) & Counter(right)).values())
    return 2 * shared / max(len(words) + len(right), 1)


def last_number(text: str) -> str | None:
    """Returns the first number after `####`, else the last number; None if there is none."""
    _, marked, rest = text.partition("####")
    numbers = _NUMBER.findall(rest if marked else text)
    if not numbers:
        return None
    number = (numbers[0] if marked else numbers[-1]).replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
