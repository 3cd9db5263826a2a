"""Draws references that are none of a question's own: distractors, and wrong memories."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64

_SPARE = 64  # references drawn beyond those needed, for those that do not serve


def draw_others(
    live: Int64[np.ndarray, " R"],
    own: Sequence[Sequence[int]],
    count: int,
    seed: int,
    serves: Callable[[int, list[int]], Sequence[bool]] | None = None,
) -> Int64[np.ndarray, "n count"]:
    """Draws for each of n questions references that are not its own, −1 where there are too few.

    Args:
      live: ids to draw from.
      own: ids that a question must not get, such as those that it retrieves.
      count: number of references of a question.
      seed: of the draws; those of a question do not depend on the questions after it.
      serves: `serves(number, ids)` says for each id whether question `number` may get it; default
        all.
    """
    drawn = np.full((len(own), count), -1, np.int64)
    for number, ids in enumerate(own):
        random = np.random.default_rng([seed, number])
        size = min(len(live), count + len(ids) + _SPARE)
        left = np.setdiff1d(random.choice(live, size, replace=False), ids, assume_unique=True)
        left = random.permutation(left)
        if serves is not None and len(left):
            left = left[np.asarray(serves(number, left.tolist()), bool)]
        drawn[number, : len(left)] = left[:count]
    return drawn
