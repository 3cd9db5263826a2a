"""Exact match, F1 and numbers, by hand."""

import pytest

from m3jax.evaluation.squad_metrics import exact_match, f1, last_number, normalise


def test_answers_are_compared_without_case_articles_and_punctuation():
    assert normalise(" The  U.S. Army, an army! ") == "us army army"
    assert exact_match("the Beatles.", ["Queen", "Beatles"]) == 1
    assert exact_match("Beatles band", ["Queen", "Beatles"]) == 0
    assert exact_match("Queen", []) == 0


@pytest.mark.parametrize("right", ["A", "the", "!", "an"])
def test_an_empty_answer_is_never_right(right):
    """Though SQuAD's normal form leaves nothing of these answers either."""
    assert normalise(right) == ""
    for empty in ("", " ", "\n"):
        assert exact_match(empty, [right]) == f1(empty, [right]) == 0
    assert exact_match(f" {right}\n", [right]) == f1(right, [right]) == 1
    assert exact_match("B", [right]) == f1("B", [right]) == 0


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("red car", ["red car"], 1.0),
        ("a red fast car", ["the red car"], 2 * 2 / (3 + 2)),
        ("blue", ["red car", "blue sky"], 2 * 1 / (1 + 2)),
        ("blue blue", ["blue"], 2 * 1 / (2 + 1)),
        ("", ["red"], 0.0),
        ("the", ["a"], 0.0),
        ("red", [], 0.0),
    ],
)
def test_f1_is_of_words_and_of_the_best_right_answer(answer, right, expected):
    assert f1(answer, right) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7\n#### 1,200", "1200"),
        ("#### 7 apples of 12", "7"),
        ("so 16 - 3 makes $13.50.", "13.5"),
        ("18.00", "18"),
        ("-5", "-5"),
        ("none", None),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert last_number(text) == number
