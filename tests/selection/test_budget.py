"""WorthEstimates: its formula by hand, planted references, and the choice."""

import itertools

import numpy as np
import pytest
from tolerance import close

from m3jax.selection.budget import choose, estimate, variances

LIVE = np.arange(6)


def test_by_hand():
    references = np.array([0, 0, 1, 1, 2])
    drops = np.array([3.0, 5.0, 0.0, 2.0, -1.0])
    counted = np.array([4, 2, 1, 1, 0, 0])
    found = estimate(references, drops, counted, 10, 50.0, LIVE[:5])
    # Within: (1 + 1 + 1 + 1 + 0) / (5 − 3). Between means 4, 1, −1 of 2, 2, 1 values, mean 1.8:
    # squares (2 · 2.2² + 2 · 0.8² + 2.8²) / 2 = 9.4, size (5 − 9 / 5) / 2 = 1.6.
    within, between = 2.0, (9.4 - 2) / 1.6
    assert variances(references, drops) == (pytest.approx(within), pytest.approx(between))
    k = within / between
    means, measured = np.array([4.0, 1.0, -1.0]), np.array([2, 2, 1])
    value = [*(measured * means + k * 1.8) / (measured + k), 1.8, 1.8]
    new = 2 / 8  # two of eight uses are the only one of their reference
    uses = [*(1 - new) * counted[:4] / 10, new * 8 / 10]
    close(found.worth[:5], np.multiply(uses, value) / 50, 1e-6)
    assert found.worth[5] == 0 and (found.unseen, found.new) == (1, new)
    spread = np.sqrt(between * k / (measured + k))
    close(found.error[:3], uses[:3] * spread / 50, 1e-6)
    assert found.measured.tolist() == [2, 2, 1, 0, 0, 0] and found.mean == pytest.approx(1.8)


def test_uses_add_up_to_those_counted():
    rng = np.random.default_rng(0)
    counted = rng.poisson(0.7, 300)
    references = rng.integers(300, size=100)
    found = estimate(references, np.full(100, 2.0), counted, 40, 1.0, np.arange(300))
    assert found.worth.sum() == pytest.approx(2.0 * counted.sum() / 40)
    assert 0 < found.new < 1 and found.unseen == (counted == 0).sum()
    everything = estimate(references, np.full(100, 2.0), counted + 1, 40, 1.0, np.arange(300))
    assert everything.new == 0.0 and everything.unseen == 0


def test_nothing_is_shrunk_away_by_an_unlucky_estimate():
    references, drops = np.repeat(np.arange(50), 4), np.tile([1.0, -1.0], 100)
    drops[:4] += 2.0
    found = estimate(references, drops, np.full(50, 4), 40, 1.0, np.arange(50))
    assert found.shrinkage == 10 and np.argmax(found.worth) == 0
    expected = 4 / 40 * (4 * 2 + 10 * drops.mean()) / 14
    assert found.worth[0] == pytest.approx(expected)
    same = estimate(np.array([0, 1]), np.ones(2), np.ones(2, int), 2, 1.0, np.arange(2))
    assert same.shrinkage == 0 and same.worth.tolist() == [0.5, 0.5]


def test_variances_are_those_that_were_put_in():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(4000), rng.integers(1, 5, 4000))
    values = 3 * rng.normal(size=4000)[groups] + 2 * rng.normal(size=len(groups))
    within, between = variances(groups, values)
    assert within == pytest.approx(4, rel=0.1) and between == pytest.approx(9, rel=0.1)
    alike = variances(np.repeat(np.arange(50), 4), np.tile([1.0, -1.0], 100))
    assert alike[1] == 0  # groups differ less than their members
    alone = np.array([1.0, 3.0])
    assert variances(np.array([7, 9]), alone) == (1.0, 1.0) == variances(np.array([7, 7]), alone)
    assert variances(np.array([7]), np.array([2.0])) == (0.0, 0.0)


def test_useful_references_are_chosen_though_each_measurement_is_noise():
    """As many useful ones as fit are planted; a choice by chance would have half of them."""
    rng = np.random.default_rng(2)
    size, rows = 400, 2000
    useful = np.sort(rng.choice(size, size // 2, replace=False))
    effect = np.zeros(size)
    effect[useful] = 1.0
    effect[rng.choice(np.setdiff1d(np.arange(size), useful), 50, replace=False)] = -1.0
    uses = rng.integers(size, size=rows)
    measured = uses[:1600]
    drops = effect[measured] + 0.5 * rng.normal(size=1600)
    counted = np.bincount(uses, minlength=size)
    found = estimate(measured, drops, counted, rows, 60.0, np.arange(size))
    chosen = choose(found.worth, np.full(size, 100), 100 * len(useful))
    assert np.isin(chosen, useful).mean() > 0.9 and len(chosen) > 0.95 * len(useful)
    assert found.worth[effect < 0].mean() < 0 < found.worth[useful].mean()
    z = (found.worth - effect * (1 - found.new) * counted / rows / 60)[counted > 0]
    assert 0.7 < np.sqrt(np.mean(np.square(z / found.error[counted > 0]))) < 1.4


def test_a_harmful_reference_is_never_chosen_and_the_budget_is_kept():
    worth = np.array([0.0, 2.0, -1.0, 3.0, 2.0, 0.5])
    assert choose(worth, np.full(6, 10), 10**6).tolist() == [1, 3, 4, 5]
    assert choose(worth, np.full(6, 10), 25).tolist() in ([1, 3], [3, 4])
    assert choose(worth, np.full(6, 10), 9).tolist() == []
    rng = np.random.default_rng(3)
    for _ in range(20):  # of equal size, greedy is the best there is
        worth, room = rng.normal(size=7), int(rng.integers(1, 6))
        best = max(worth[list(c)].sum() for c in itertools.combinations(range(7), room))
        got = worth[choose(worth, np.full(7, 3), 3 * room + 2)].sum()
        assert got >= best - 1e-12
    mixed = choose(np.array([5.0, 4.0, 3.0]), np.array([50, 10, 10]), 60)
    assert mixed.tolist() == [1, 2]


def test_equal_ones_are_chosen_at_random():
    first, other = (choose(np.ones(1000), np.full(1000, 8), 4000, seed) for seed in (0, 1))
    assert first.tolist() == choose(np.ones(1000), np.full(1000, 8), 4000, 0).tolist()
    assert 400 < np.mean(first) < 600 and 200 < len(np.intersect1d(first, other)) < 300
