"""Draws distractors: references that a training chunk reads beside the right ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int

_SPARE = 16  # references drawn beyond those needed, for those that do not serve


def draw_distractors(
    right: Int[np.ndarray, "C m"],
    neighbours: Int[np.ndarray, "C k"],
    live: Int[np.ndarray, " R"],
    hard: Bool[np.ndarray, "C d"],
    overlapping: Callable[[Int[np.ndarray, " n"]], Bool[np.ndarray, " n"]],
    random: np.random.Generator,
) -> Int[np.ndarray, "C d"]:
    """Draws the distractors of the chunks of a row, −1 where there are too few.

    No reference that is right for any chunk of the row is a distractor. A chunk reads each
    reference once, and none if it has no right one.

    Args:
      right: ids of the references that each chunk is to use, −1 = none.
      neighbours: ids that search finds for each chunk, best first, −1 = none.
      live: all ids; those of places that are not hard are drawn from these.
      hard: places for the next best found; if there are fewer, others are drawn.
      overlapping: says which references overlap too much with the row; drawn ones must not.
      random: generator of the draws.
    """
    needed = right[right >= 0]
    size = min(len(live), hard.size + len(np.unique(needed)) + _SPARE)
    drawn = live[random.choice(len(live), size, replace=False)]
    drawn = drawn[~np.isin(drawn, needed)]
    drawn = drawn[~overlapping(drawn)]
    near = np.where(np.isin(neighbours, needed), -1, neighbours)
    distractors = np.full(hard.shape, -1, np.int64)
    for chunk in np.flatnonzero((right >= 0).any(axis=1)).tolist():
        ids = near[chunk][near[chunk] >= 0][: int(hard[chunk].sum())].tolist()
        rest = np.roll(drawn, -chunk * hard.shape[1]).tolist()  # chunks read different ones
        ids += itertools.islice((i for i in rest if i not in ids), hard.shape[1] - len(ids))
        distractors[chunk, : len(ids)] = ids
    return distractors
