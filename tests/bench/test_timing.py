"""Paired timing: who is timed when, and that times go to whom they belong."""

import time

from m3jax.bench.timing import paired


def test_each_round_times_both_and_a_turned_one_the_other_first():
    called = []

    def first():
        called.append("A")
        time.sleep(0.02)

    def second():
        called.append("B")

    long, short, ratio = paired(first, second, 4)
    assert "".join(called) == "AB" + "AB" * 4
    assert long >= 0.02 > short and ratio > 1
    called.clear()
    long, short, ratio = paired(first, second, 4, turned=True)
    assert "".join(called) == "AB" + "ABBA" * 2
    assert long >= 0.02 > short and ratio > 1
