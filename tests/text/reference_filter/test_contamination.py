"""Contamination: the questions that are found against a loop over all pairs."""

import random
from collections import Counter

import numpy as np
import pytest

from m3jax.text.cleaning.rules import words_of
from m3jax.text.overlap import overlap
from m3jax.text.reference_filter.contamination import Contamination

QUESTION = "When was the last time that anyone was on the moon?"
MOON = "The moon was visited six times. The last landing was in December 1972, and no one returned."
NOUNS = ["compound", "mammal", "mineral", "virus", "planet", "reflex", "solvent", "verb"]
CHINESE = "斯托克曼百货公司大楼建于哪一年？"


def test_a_question_is_found_whatever_stands_around_it_and_however_it_is_written():
    looked_for = Contamination([QUESTION, CHINESE], 2 / 3, 5)
    quoted = f"A quiz. 1) «{QUESTION.upper()}» Answer: December 1972. 2) Who was the first?"
    assert looked_for.find(quoted) == (QUESTION, 1.0)
    changed = "when, he asked, was the last time anyone walked on the moon"
    question, value = looked_for.find(changed)
    assert question == QUESTION and value == pytest.approx(9 / 11)
    assert looked_for.find(MOON) is None
    assert looked_for.find(f"问：{CHINESE}答：1930年。") == (CHINESE, 1.0)
    # 13 of the question's 15 signs, and of the 14 words of the reference
    assert looked_for.find("斯托克曼百货公司大楼建于1930年。") == (CHINESE, pytest.approx(13 / 14))
    assert looked_for.find("") is None and looked_for.find("?!") is None


def test_a_reference_that_stands_in_a_passage_is_found():
    passage = f"Passage: {MOON} It was cold. Question: did anyone land on the moon in 1972?"
    looked_for = Contamination([passage], 2 / 3, 8)
    assert looked_for.find(MOON) == (passage, 1.0)
    assert (
        looked_for.find("The last landing was in December.") is None
    )  # too short to be looked for
    assert Contamination([passage], 2 / 3, 4).find("The last landing was in December.") is not None


def test_short_questions_are_left_out_and_1_means_none():
    looked_for = Contamination(["why was it?", QUESTION], 2 / 3, 8)
    assert len(looked_for) == 1 and looked_for.too_short == 1
    assert looked_for.find("why was it?") is None
    assert Contamination([QUESTION], 1.0, 1).find(QUESTION) is None
    assert Contamination([], 0.5, 1).find(QUESTION) is None


@pytest.mark.parametrize("threshold", [0.4, 2 / 3, 0.9])
def test_as_a_loop_over_all_pairs(threshold):
    """What is skipped by rare words would not have been found."""
    rng = random.Random(round(threshold * 100))
    words = [f"w{i}" for i in range(30)]
    weights = [1 / (i + 1) for i in range(30)]

    def text(least, most):
        return " ".join(rng.choices(words, weights, k=rng.randint(least, most)))

    questions = [text(3, 12) for _ in range(25)] + [text(30, 60) for _ in range(12)]
    texts = [text(3, 40) for _ in range(25)]
    # Parts of questions, and questions between other words, with a word changed here and there.
    for question in rng.sample(questions, 25):
        part = question.split()[: rng.randint(3, 30)]
        part = [f"x{rng.random()}" if rng.random() < 0.2 else word for word in part]
        texts.append(" ".join([text(0, 5), *part, text(0, 5)]))
    least, found = 4, 0
    looked_for = Contamination(questions, threshold, least)
    asked = [words for words in map(words_of, questions) if len(words) >= least]
    times = Counter(word for words in asked for word in set(words))

    def information(words):
        return sum(np.log(1 + len(asked) / max(times[word], 1)) for word in words)

    for one in texts:
        best, r = threshold, words_of(one)
        for q in asked:
            numbers = {word: i for i, word in enumerate(sorted({*q, *r}))}
            for outer, inner in [(r, q)] + [(q, r)] * (len(r) >= least):
                value = overlap([numbers[w] for w in outer], [numbers[w] for w in inner])
                common = (Counter(outer) & Counter(inner)).elements()
                if information(common) > threshold * information(inner):
                    best = max(best, value)
        got = looked_for.find(one)
        assert (got[1] if got else threshold) == pytest.approx(best)
        found += got is not None
    assert 5 < found < len(texts) + (threshold < 0.5)


def test_common_words_alone_are_no_question():
    common = [f"Which of the following is an example of a {word}?" for word in NOUNS]
    others = [f"Which of the following is an example of a x{i} y{i} z{i}?" for i in range(300)]
    looked_for = Contamination([*common, *others], 2 / 3, 8)
    near = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert overlap(*near) == 0.9  # as of the first two texts below
    assert looked_for.find("Which of the following is an example of a constitution?") is None
    quoted = f"Which of the following is an example of a {NOUNS[3]}: salt, iron?"
    assert looked_for.find(quoted) == (common[3], 1.0)
