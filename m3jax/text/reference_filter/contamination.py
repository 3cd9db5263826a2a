"""Contamination: references that contain an evaluation question, or are part of one (Memory³ §6.1).

The measure is the overlap of `m3jax.text.overlap` in both directions, as in the leakage report: of
the question with the reference (mostly the longer text), and of the reference with the question
(which may include a whole passage). Three choices are ours. The items are words without punctuation
and case instead of tokens, so that neither the tokenizer nor a capital letter matters. Answers are
not compared: a knowledge base should hold them. And the common words must also carry more than the
threshold's fraction of the information of the contained text, where a word in n of N questions
carries log(1 + N / n): many texts have the words "which of the following is an example of a …?"
without the rest of the question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from m3jax.text.cleaning.rules import words_of
from m3jax.text.overlap import fewest_above, overlap, shared, which_exceed

_Ints = Integer[np.ndarray, "_"]  # numbers of words, or indices of questions


class Contamination:
    """Searches references for evaluation questions.

    Every word of the questions has a number ≥ 1, rare words (in few questions) first; all other
    words have the number 0. If m of the n words of a text must be shared, at least one of any
    n − m + 1 of them is. So a pair is compared only if it shares one of the n − m + 1 rarest words
    of the contained text.
    """

    def __init__(self, questions: Sequence[str], threshold: float, least: int) -> None:
        """Indexes the words of questions.

        A reference is contaminated if an overlap exceeds `threshold` (0 … 1). Questions of fewer
        than `least` words are left out (`too_short` is their number); references of fewer words are
        not searched for in questions.
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
        # By word: number of questions with it; 1 for words of no question (number 0).
        times = np.array([1, *(counts[word] for word in ranked)])
        self._information = np.log1p(len(kept) / times)
        rare = [_rarest(words, threshold) for words in self._questions]
        self._by_rare_word = _postings(rare, size)
        self._by_word = _postings([np.unique(words) for words in self._questions], size)

    def __len__(self) -> int:
        return len(self._questions)

    def find(self, text: str) -> tuple[str, float] | None:
        """Returns the question that overlaps most (above `threshold`), and the overlap; or None."""
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
        """Returns the questions that a reference of these words contains, with overlaps."""
        near = _union(self._by_rare_word, np.unique(words))
        if not near.size:
            return []
        matrix, lengths = self._matrix(near)
        above = near[which_exceed(words, matrix, lengths, self.threshold)].tolist()
        told = (i for i in above if self._tells(self._questions[i], words))
        return [(i, overlap(words, self._questions[i])) for i in told]

    def _around(self, words: _Ints) -> list[tuple[int, float]]:
        """Returns the questions that contain a reference of these words, with overlaps."""
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
        """Returns True if the common words carry enough of the information of `inner`."""
        size = len(self._information)
        counts, others = (np.bincount(words, minlength=size) for words in (inner, outer))
        others[0] = 0  # number 0 stands for different words, which are not shared
        common = np.minimum(counts, others) @ self._information
        return bool(common > self.threshold * (counts @ self._information))

    def _matrix(self, ids: _Ints) -> tuple[Integer[np.ndarray, "q W"], _Ints]:
        """Returns the words of questions, a row each, padded with 0, and their lengths."""
        lengths = self._lengths[ids]
        matrix = np.zeros((len(ids), int(lengths.max())), np.int64)
        for row, i in zip(matrix, ids.tolist(), strict=True):
            row[: self._lengths[i]] = self._questions[i]
        return matrix, lengths


def _rarest(words: _Ints, threshold: float) -> _Ints:
    """Returns the rarest words, at least one of which a text above the threshold must share."""
    return np.sort(words)[: max(0, len(words) - fewest_above(threshold, len(words)) + 1)]


def _postings(words: Sequence[_Ints], size: int) -> tuple[_Ints, _Ints]:
    """Returns an inverted index: start of each word's questions in a list, and the list."""
    flat = np.concatenate([np.empty(0, np.int64), *words])
    owners = np.repeat(np.arange(len(words)), [len(each) for each in words])
    order = np.argsort(flat, kind="stable")
    return np.searchsorted(flat[order], np.arange(size + 1)), owners[order]


def _union(postings: tuple[_Ints, _Ints], words: _Ints) -> _Ints:
    """Returns the questions that an index lists under any of the words, ascending."""
    starts, owners = postings
    parts = [owners[starts[word] : starts[word + 1]] for word in words.tolist()]
    return np.unique(np.concatenate([np.empty(0, np.int64), *parts]))
