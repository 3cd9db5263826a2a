"""Dealing the tokens of a memory to layers and heads."""

import numpy as np
import pytest

from m3jax.errors import ConfigError
from m3jax.selection.counts import TokenWeights, counts_table, deal_counts

R, L, K, W = 3, 2, 2, 5


def weights(seed: int = 0) -> TokenWeights:
    random = np.random.default_rng(seed)
    return TokenWeights(*(random.random((R, L, K, W)) for _ in range(2)))


@pytest.mark.parametrize(("budget", "each"), [(2, 0), (2, 1), (3, 2), (1, 1), (5, 0)])
def test_counts_are_the_mean_of_those_of_each_reference(budget: int, each: int) -> None:
    both, total = weights(), budget * L * K
    mean = np.zeros((L, K))
    for r in range(R):
        kept = np.zeros((L, K, W), bool)
        for layer, head in np.ndindex(L, K):
            kept[layer, head, np.argsort(-both.received[r, layer, head])[:each]] = True
        rest = [
            (both.reconstruction[r, layer, head, w], layer, head, w)
            for layer, head, w in np.ndindex(L, K, W)
            if not kept[layer, head, w]
        ]
        for _, layer, head, w in sorted(rest, reverse=True)[: total - each * L * K]:
            kept[layer, head, w] = True
        mean += kept.sum(-1) / R
    counts = deal_counts(both, budget, each)
    assert counts.sum() == total and (np.abs(counts - mean) < 1).all()
    assert counts.min() >= each and counts.max() <= W


def test_a_head_that_copies_gets_the_budget() -> None:
    both = weights()
    both.reconstruction[:, 1, 0] += 1
    np.testing.assert_array_equal(deal_counts(both, W / (L * K), 0), [[0, 0], [W, 0]])


def test_padding_is_never_dealt() -> None:
    both = weights()
    for side in both:
        side[..., 3:] = -np.inf
    assert deal_counts(both, 2, 1).max() <= 3


@pytest.mark.parametrize(("budget", "each"), [(1, 2), (6, 0), (0, 0)])
def test_budgets_that_cannot_be_dealt_are_refused(budget: int, each: int) -> None:
    with pytest.raises(ConfigError, match="at most 5, the tokens of a reference"):
        deal_counts(weights(), budget, each)


def test_the_table_names_layers_and_heads() -> None:
    report = {
        **{"checkpoint": "runs/x/warmup", "step": 0, "references": 3, "budget": 2.0, "each": 1},
        **{"by_layer": [[1, 2], [3, 4]], "first_layer": 5, "heads_of_half": 0.5},
    }
    lines = counts_table(report).splitlines()
    assert lines[2:] == [
        "| layer | head 0 | head 1 |",
        "|---|---|---|",
        "| 5 | 1 | 2 |",
        "| 6 | 3 | 4 |",
    ]
