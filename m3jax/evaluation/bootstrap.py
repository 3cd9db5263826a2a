"""Bootstrap confidence intervals of means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

SAMPLES = 2000


def resampled_means(
    values: Float64[np.ndarray, " n"], groups: Sequence[Any], seed: int = 0
) -> Float64[np.ndarray, " samples"]:
    """Returns the mean of `values` in `SAMPLES` bootstrap samples.

    Groups are drawn whole, with replacement: questions about one passage are not independent. Equal
    groups and seeds draw the same samples, so that differences of two means can be paired.
    """
    _, number = np.unique(np.asarray(groups), return_inverse=True)
    count = int(number.max()) + 1
    random = np.random.default_rng(seed)
    times = random.multinomial(count, np.full(count, 1 / count), size=SAMPLES)
    sums, sizes = np.bincount(number, values, count), np.bincount(number, minlength=count)
    return (times @ sums) / (times @ sizes)


def interval(samples: Float64[np.ndarray, " samples"]) -> tuple[float, float]:
    """Returns the limits of the 95 % confidence interval, by percentiles of bootstrap samples."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)
