"""Exact match and F1 of short answers, as SQuAD's evaluation defines them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def normalise(answer: str) -> str:
    """Lower case, without punctuation, articles and superfluous space."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is one of the right ones, else 0."""
    return float(normalise(answer) in {normalise(one) for one in right})


def f1(answer: str, right: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the answer's words; of the right answer it fits."""
    return max((_f1(normalise(answer).split(), normalise(one).split()) for one in right), default=0)


def _f1(words: list[str], right: list[str]) -> float:
    if not words or not right:
        return float(words == right)
    shared = sum((Counter(words) & Counter(right)).values())
    return 2 * shared / (len(words) + len(right))


def last_number(text: str) -> str | None:
    """The number after `####`, or else the last one; None if there is none."""
    _, marked, rest = text.partition("####")
    found = _NUMBER.findall(rest if marked else text)
    if not found:
        return None
    number = (found[0] if marked else found[-1]).replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
