"""Rules of references: what is measured, in English and in Chinese."""

from types import SimpleNamespace

import pytest

from m3jax.config import default
from m3jax.text.cleaning.rules import broken_rule
from m3jax.text.reference_filter.rules import RULES, measure_reference

PROSE = (
    "Endocarditis is an inflammation of the inner layer of the heart. It usually involves the"
    " valves, which do not receive any dedicated blood supply.\nCause.\nDefensive mechanisms, such"
    " as white blood cells, cannot directly reach the valves via the bloodstream."
)
CHINESE = (
    "斯托克曼百货公司大楼建于1930年。1989年，阿尔戈斯大楼被并入斯托克曼大楼，只有立面得以保留。此后，"
    "斯托克曼占据了整个街区。\n历史.\n2007年，百货公司开始进一步扩张，成为欧洲最大的百货公司之一。"
)
DROPPED = {
    "words_min": ["Anatomy.\nBones.", "历史.\n生平."],
    "nonalphabetic_max": [
        "1 | 2003 | 17 | 3.2 %\n2 | 2004 | 19 | 3.4 %\n3 | 2005 | 23 | 4.1 %",
        "共 12,345 人；23,456 人；34,567 人；45,678 人；56,789 人。",
    ],
    "listed_max": [
        "* Spanish Empire from the year of its founding.\n* British Empire, a few months\n"
        "* Empire of Brazil. It fell.\n* Uruguay, since then",
        "Historical affiliations\nSpanish Empire<br>\nBritish Empire<br>\nEmpire of Brazil",
        "个人专辑音乐作品\n第一张全创作专辑凡人\n第二张全创作专辑狂人\n第三张全创作专辑完人",
    ],
    "repeated_max": [
        "buy cheap cars here and now, " * 6 + "and never look back again, my friend.",
        "欢迎光临本店，" * 8 + "谢谢您的惠顾和支持。",
    ],
}


@pytest.mark.parametrize("text", [PROSE, CHINESE, PROSE[:200], CHINESE[:70]])
def test_prose_passes_wherever_it_is_cut(text):
    assert broken_rule(measure_reference(text), default().knowledge, RULES) is None


@pytest.mark.parametrize("rule, text", [(r, text) for r in DROPPED for text in DROPPED[r]])
def test_each_rule_drops_what_it_is_for(rule, text):
    knowledge = default().knowledge
    broken = broken_rule(measure_reference(text), knowledge, RULES)
    assert broken is not None and broken[0] == rule
    limit = getattr(knowledge, rule)
    assert broken[1] < limit if rule == "words_min" else broken[1] > limit
    off = {**knowledge.to_dict(), rule: 0 if rule == "words_min" else 1.0}
    other = broken_rule(measure_reference(text), SimpleNamespace(**off), RULES)
    assert other is None or other[0] != rule


def test_measures_by_hand():
    found = measure_reference("one two three one two three four\n| a |")
    # runs: 123 231 312 123 234 34a: one of six was there before
    assert (found.words, found.repeated) == (10, pytest.approx(1 / 6))
    # 26 signs of the first line, which is short and does not end; 3 of a table: all are listed
    assert found.listed == 1 and found.nonalphabetic == pytest.approx(2 / 29)
    half = measure_reference("It ends here.\n- it does not")
    assert half.listed == pytest.approx(10 / 21)
    empty = measure_reference("")
    assert (empty.words, empty.listed, empty.repeated) == (0, 0.0, 0.0)
