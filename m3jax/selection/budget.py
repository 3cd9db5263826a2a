"""Estimates the worth of the memory of every reference, and chooses references within a budget.

The worth is the drop of the validation loss that a memory is expected to bring, in nats per token:
the share of rows that retrieve the reference, times the drop of such a row's loss, over the tokens
of a row:

    worth[r] = uses[r] · value[r] / tokens

Both factors are estimates. `value` shrinks the mean drop of the reference's measured rows towards
the mean over all pairs, the more the fewer rows were measured (a one-way random effects model, with
variances estimated by moments):

    value[r] = (n[r] · mean[r] + k · mean) / (n[r] + k),    k = variance within / variance between

k is at most 10, since few measurements may show no variance between references where there is some.

`uses` is the share of the counted rows that retrieve the reference. References that exactly one row
retrieves tell how often a new row retrieves a reference that no counted row does (Good–Turing);
these unseen references share that probability equally. So all references that were never retrieved
have the same worth, and the choice among them is arbitrary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

_MOST = 10.0  # upper bound of k


@dataclass(frozen=True)
class WorthEstimates:
    """Estimates for R references, in arrays indexed by reference id; removed ones have worth 0."""

    worth: Float[np.ndarray, " R"]  # expected drop of the loss, nats per token
    error: Float[np.ndarray, " R"]  # standard deviation of `worth` due to `value` alone
    measured: Int[np.ndarray, " R"]  # rows in which its drop was measured
    counted: Int[np.ndarray, " R"]  # counted rows that retrieve it
    mean: float  # mean drop of a row's loss over all measured pairs, nats
    shrinkage: float  # k; 0 trusts every measurement
    unseen: int  # live references that no counted row retrieves
    new: float  # expected share of unseen references among those that a new row retrieves


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
      references, drops: reference id of each measured pair of a row and a reference (at least one
        pair), and the drop of the row's loss in nats.
      counted, rows: for every id the number of counted rows that retrieve it, the measured rows
        included; and the number of counted rows.
      tokens: mean weight of a row's targets.
      live: ids that are not removed.
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
    """Returns the variance within groups and the variance between groups, estimated by moments.

    If no group has two values, or there is only one group, the two cannot be told apart: each gets
    half of the variance.
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
    """Returns the ids with the most worth per byte that fit the budget together, ascending.

    Greedy: goes through the references by descending worth per byte and takes each that still fits.
    References of worth 0 or less are not chosen. Ties are broken at random by the seed: the order
    of ids would favour the first documents.
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
