"""Rule filters: measures against a naive count, each threshold on both sides, Chinese."""

import math
import re
from collections import Counter

import pytest

from m3jax import config as configs
from m3jax.text.cleaning.rules import broken_rule, measure, normal_words, pieces

WORDS = [f"{a}{b}ea" for a in "bcdfghklmnprst" for b in "aeiouy"]  # 84 different words


def _naive(text):
    words = re.findall(r"[一-鿿]|[^\s一-鿿]+", text.lower())
    shares = [n / len(words) for n in Counter(words).values()]
    signs = [c for c in text if not c.isspace()]
    return (
        len(words),
        sum(map(len, words)) / len(words),
        sum(not c.isalpha() for c in signs) / len(signs),
        len(shares) / len(words),
        -sum(p * math.log(p) for p in shares),
    )


@pytest.mark.parametrize(
    "text",
    [
        "One two, two; THREE three 3.",
        "知识 是 力量, and power is 力量!",
        ("Long lines of words\n" + "and more of them " * 7 + "\n") * 9000,
        "x" * 3_000_000 + " y " * 9,
    ],
    ids=["short", "mixed", "many pieces", "no white space"],
)
def test_measures_equal_a_naive_count(text):
    m = measure(text)
    found = (m.words, m.word_length, m.nonalphabetic, m.unique, m.entropy)
    if text.startswith("xxx"):  # a word longer than a piece is cut into pieces
        assert m.words == 9 + math.ceil(3_000_000 / (1 << 20))
    else:
        assert found == pytest.approx(_naive(text), rel=1e-12)
    assert "".join(pieces(text)) == text


def test_pieces_end_between_words():
    text = " ".join(["nineteen", "words\nof"] * 200_000)
    cut = list(pieces(text))
    assert len(cut) > 2 and "".join(cut) == text
    assert all(piece[-1] in " \n" and len(piece) <= 1 << 20 for piece in cut[:-1])


def test_measures_without_words():
    for text in ("", " \n"):
        assert measure(text).words == 0 and measure(text).entropy == 0


@pytest.mark.parametrize(
    "rule, keeps, drops",
    [
        ("words_min", WORDS[:50], WORDS[:49]),
        ("word_length_max", ["abcdefghij"] * 60, ["abcdefghij"] * 59 + ["abcdefghijk"]),
        ("nonalphabetic_max", WORDS + ["1" * 784], WORDS + ["1" * 785]),
        ("unique_max", WORDS + WORDS[:10], WORDS + WORDS[:5]),
        ("entropy_min", WORDS[:22] * 3, WORDS[:19] * 3),
    ],
)
def test_every_threshold_from_both_sides(rule, keeps, drops):
    clean = configs.default().clean
    wide = configs.default().clean
    wide.unlock()
    wide.words_min, wide.word_length_max, wide.nonalphabetic_max = 0, 1e9, 1.0
    wide.unique_max, wide.entropy_min = 1.0, 0.0
    wide[rule] = clean[rule]
    assert broken_rule(measure(" ".join(keeps)), wide) is None
    broken = broken_rule(measure(" ".join(drops)), wide)
    assert broken is not None and broken[0] == rule
    assert broken_rule(measure(" ".join(WORDS * 2)), clean) is None


def test_chinese_counts_signs_as_words():
    text = "记忆是注意力的键和值写入一次便可多次读取模型不必训练就能知道新的事实而旧的也能改" * 2
    m = measure(text)
    assert m.words == len(text) and m.word_length == 1
    assert broken_rule(m, configs.default().clean) is None


def test_normal_words_have_no_signs_and_no_case():
    assert list(normal_words("Ünder_the “Sea”, 知识!")) == [["ünder", "the", "sea", "知", "识"]]
