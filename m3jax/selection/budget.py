"""Estimates the worth of every reference and chooses by budget.

The expected drop of validation loss that a reference brings, in nats a token, is how often a row
finds it times how much the row's loss falls then, over the tokens of a row:

    worth[r] = uses[r] · value[r] / tokens

Both are estimates. `value` shrinks the mean drop of the reference's measured rows to that of all,
the more the fewer they are (a one-way random effects model, its variances by moments):

    value[r] = (n[r] · mean[r] + k · mean) / (n[r] + k),    k = variance within / variance between

k is at most 10: few measurements may show no variance between references where there is some.

`uses` is the share of the counted rows that find the reference. By Good and Turing, the references
that one row alone finds tell how often a new row finds one that no counted row does; all of those
share it alike. So all that were never found have the same worth, and which of them are chosen says
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

_MOST = 10.0  # of k


@dataclass(frozen=True)
class WorthEstimates:
    """Estimates of R references; arrays over all ids, removed ones have worth 0."""

    worth: Float[np.ndarray, " R"]  # expected drop of the loss, nats a token
    error: Float[np.ndarray, " R"]  # its standard deviation, as far as it comes from `value`
    measured: Int[np.ndarray, " R"]  # rows in which the drop was measured
    counted: Int[np.ndarray, " R"]  # rows that found it
    mean: float  # drop a use over all measured uses, nats
    shrinkage: float  # k; 0 trusts every measurement
    unseen: int  # references in use that no counted row found
    new: float  # expected share of the uses in a new row that are of the unseen ones


def estimate(
    references: Int[np.ndarray, " m"],
    drops: Float[np.ndarray, " m"],
    counted: Int[np.ndarray, " R"],
    rows: int,
    tokens: float,
    live: Int[np.ndarray, " n"],
) -> WorthEstimates:
    """Estimates the worth of every reference.

    Args:
      references, drops: ids of the measured pairs of a row and a reference, at least one, and
        drops of the row's loss, nats.
      counted, rows: for every id how many of the counted rows find it, the measured ones among
        them; and how many were counted.
      tokens: mean weight of a row's targets.
      live: ids in use.
    """
    size = len(counted)
    measured = np.bincount(references, minlength=size)
    sums = np.bincount(references, drops, size)
    mean = float(drops.mean())
    means = np.divide(sums, measured, out=np.full(size, mean), where=measured > 0)
    within, between = variances(references, drops)
    between = max(between, within / _MOST)
    shrinkage = within / between if between > 0 else 0.0
    pulled = np.divide(measured, measured + shrinkage, out=np.zeros(size), where=measured > 0)
    value = mean + pulled * (means - mean)
    spread = np.sqrt(np.maximum(between * (1 - pulled), 0))

    in_use = np.zeros(size, bool)
    in_use[live] = True
    total = counted.sum()
    unseen = in_use & (counted == 0)
    new = float((counted == 1).sum() / total) if unseen.any() else 0.0
    uses = np.where(counted > 0, (1 - new) * counted / rows, 0.0)
    uses[unseen] = new * total / rows / max(int(unseen.sum()), 1)
    uses[~in_use] = 0.0
    worth, error = uses * value / tokens, uses * spread / tokens
    figures = mean, float(shrinkage), int(unseen.sum()), new
    return WorthEstimates(worth, error, measured, counted, *figures)


def variances(
    groups: Int[np.ndarray, " m"], values: Float[np.ndarray, " m"]
) -> tuple[float, float]:
    """Variance within groups, and between their means beyond what that explains (by moments).

    Where no group has two values, or there is one group alone, half of the variance is put to
    either: nothing says more.
    """
    _, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    total, several = len(values), len(sizes)
    variance = float(values.var(ddof=1)) if total > 1 else 0.0
    if several == total or several == 1:
        return variance / 2, variance / 2
    means = np.bincount(place, values) / sizes
    within = float(np.square(values - means[place]).sum() / (total - several))
    squares = float((sizes * np.square(means - values.mean())).sum() / (several - 1))
    size = (total - np.square(sizes).sum() / total) / (several - 1)
    return within, max(0.0, (squares - within) / float(size))


def choose(
    worth: Float[np.ndarray, " R"], bytes_each: Int[np.ndarray, " R"], budget: int, seed: int = 0
) -> Int[np.ndarray, " n"]:
    """Ids with the most worth a byte that fit the budget together, ascending.

    Greedy: in the order of worth a byte, each that still fits. Those of no worth or less are not
    chosen. Equal ones are in random order, by the seed: that of the documents would be a choice.
    """
    drawn = np.random.default_rng([seed, 0xE0]).permutation(len(worth))
    order = np.lexsort((drawn, -worth / bytes_each))
    chosen, left = [], int(budget)
    for i in order.tolist():
        if worth[i] <= 0:
            break
        if bytes_each[i] <= left:
            chosen.append(i)
            left -= int(bytes_each[i])
    return np.array(sorted(chosen), np.int64)
