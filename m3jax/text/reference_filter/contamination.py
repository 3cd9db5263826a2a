"""Contamination: references that hold a question of an evaluation, or stand in one (Memory³ §6.1).

The measure is the overlap of `m3jax.text.overlap`, both ways, as in the leakage report: of the
question with the reference, mostly the longer of the two, and of the reference with the question,
which may carry a whole passage. Ours: its items are words without signs and case instead of tokens,
so that neither the tokenizer nor the spelling of a question's beginning matters, and answers are
not compared: a knowledge base is there to hold them. And what both have in common must carry as
large a share of the information of the shorter one, a word that n of N questions have carrying
log(1 + N / n): "which of the following is an example of a …?" is in many texts, the question is in
few of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from m3jax.text.cleaning.rules import words_of
from m3jax.text.overlap import fewest_above, overlap, shared, which_exceed

_Ints = Integer[np.ndarray, "_"]  # words by their numbers, or numbers of questions


class Contamination:
    """Finds questions in references.

    Every word of a question has a number, the more questions it stands in the larger; all other
    words have one together, the smallest. A reference and a question can only overlap enough if one
    of the rarest words of the shorter is in both: of n words of which m must be shared, one of any
    n − m + 1. So few pairs are compared.
    """

    def __init__(self, questions: Sequence[str], threshold: float, least: int) -> None:
        """Numbers the words of questions.

        A reference is contaminated above the overlap `threshold`. Questions of fewer words than
        `least` are left out, and references of fewer words are not searched for in questions.
        """
        split = [words_of(question) for question in questions]
        kept = [i for i, words in enumerate(split) if len(words) >= least]
        self.threshold, self.least, self.too_short = threshold, least, len(questions) - len(kept)
        self._texts = [questions[i] for i in kept]
        counts = Counter(word for i in kept for word in set(split[i]))
        ranked = sorted(counts, key=lambda word: (counts[word], word))
        self._numbers = {word: number for number, word in enumerate(ranked, 1)}
        self._questions = [self._number(split[i]) for i in kept]
        self._lengths = np.array([len(words) for words in self._questions], np.int64)
        size = len(ranked) + 1
        times = np.array([1, *(counts[word] for word in ranked)])  # a word of no question: once
        self._information = np.log1p(len(kept) / times)
        rare = [_rarest(words, threshold) for words in self._questions]
        self._by_rare_word = _postings(rare, size)
        self._by_word = _postings([np.unique(words) for words in self._questions], size)

    def __len__(self) -> int:
        return len(self._questions)

    def find(self, text: str) -> tuple[str, float] | None:
        """Returns the question that a reference overlaps most with, and the overlap."""
        words = self._number(words_of(text))
        if not self._questions or not words.size:
            return None
        overlaps = [*self._inside(words), *self._around(words)]
        if not overlaps:
            return None
        number, value = max(overlaps, key=lambda pair: (pair[1], -pair[0]))
        return self._texts[number], value

    def _number(self, words: list[str]) -> _Ints:
        return np.array([self._numbers.get(word, 0) for word in words], np.int64)

    def _inside(self, words: _Ints) -> list[tuple[int, float]]:
        near = _union(self._by_rare_word, np.unique(words))
        if not near.size:
            return []
        matrix, lengths = self._matrix(near)
        above = near[which_exceed(words, matrix, lengths, self.threshold)].tolist()
        told = (i for i in above if self._tells(self._questions[i], words))
        return [(i, overlap(words, self._questions[i])) for i in told]

    def _around(self, words: _Ints) -> list[tuple[int, float]]:
        if len(words) < self.least:
            return []
        rarest = np.unique(_rarest(words, self.threshold))
        near = _union(self._by_word, rarest[rarest > 0])
        near = near[self._lengths[near] > self.threshold * len(words)]
        if not near.size:
            return []
        matrix, lengths = self._matrix(near)
        near = near[shared(words, matrix, lengths) > self.threshold * len(words)]
        told = (i for i in near.tolist() if self._tells(words, self._questions[i]))
        values = ((i, overlap(self._questions[i], words)) for i in told)
        return [(i, value) for i, value in values if value > self.threshold]

    def _tells(self, inner: _Ints, outer: _Ints) -> bool:
        """Tests whether the words in common carry enough of the information of `inner`."""
        size = len(self._information)
        counts, others = (np.bincount(words, minlength=size) for words in (inner, outer))
        others[0] = 0  # where all words of no question are counted: they are not one word
        common = np.minimum(counts, others) @ self._information
        return bool(common > self.threshold * (counts @ self._information))

    def _matrix(self, ids: _Ints) -> tuple[Integer[np.ndarray, "q W"], _Ints]:
        """Returns the words of some questions, a row each, and their numbers."""
        lengths = self._lengths[ids]
        matrix = np.zeros((len(ids), int(lengths.max())), np.int64)
        for row, i in zip(matrix, ids.tolist(), strict=True):
            row[: self._lengths[i]] = self._questions[i]
        return matrix, lengths


def _rarest(words: _Ints, threshold: float) -> _Ints:
    """Returns the words with the smallest numbers of which one at least must be shared."""
    return np.sort(words)[: max(0, len(words) - fewest_above(threshold, len(words)) + 1)]


def _postings(words: Sequence[_Ints], size: int) -> tuple[_Ints, _Ints]:
    """Returns where the questions of each word begin in a list of questions, and the list."""
    flat = np.concatenate([np.empty(0, np.int64), *words])
    owners = np.repeat(np.arange(len(words)), [len(each) for each in words])
    order = np.argsort(flat, kind="stable")
    return np.searchsorted(flat[order], np.arange(size + 1)), owners[order]


def _union(postings: tuple[_Ints, _Ints], words: _Ints) -> _Ints:
    """Returns the questions of any of these words, ascending."""
    starts, owners = postings
    parts = [owners[starts[word] : starts[word + 1]] for word in words.tolist()]
    return np.unique(np.concatenate([np.empty(0, np.int64), *parts]))
