"""Validates a choice of references: losses on rows that it was not made on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from m3jax.data.pipeline import Pipeline, open_pipeline
from m3jax.data.rows import Rows
from m3jax.errors import UsefulnessError
from m3jax.knowledge.versions import Version
from m3jax.model.parameters import Params
from m3jax.selection.memory_value import EVERYTHING, RowLosses, row_losses


def split_rows(
    pipeline: Pipeline, sample: int, check: int, seed: int
) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " c"]]:
    """Draws rows to measure on, and rows of other documents to check on, ascending.

    Raises:
      UsefulnessError: fewer than two documents, or numbers below 1.
    """
    if min(sample, check) < 1:
        raise UsefulnessError(f"--sample={sample}, --check={check}: at least one row each")
    assert isinstance(pipeline.rows, Rows)
    document = pipeline.rows.document_of(np.arange(len(pipeline.rows)))
    rng = np.random.default_rng([seed, 0x05EF])
    names = rng.permutation(np.unique(document))
    if len(names) < 2:
        raise UsefulnessError(
            f"the validation text has rows of {len(names)} document; the choice is checked on other"
            " documents than it is made on. Raise config.text.validation_share and prepare again"
        )
    sizes = np.cumsum(np.bincount(document)[names])
    share = sample / (sample + check)
    first = int(np.searchsorted(sizes, share * sizes[-1]))
    first = min(max(first, 1), len(names) - 1)
    sides = []
    for chosen, most in ((names[:first], sample), (names[first:], check)):
        rows = np.flatnonzero(np.isin(document, chosen))
        sides.append(np.sort(rng.permutation(rows)[:most]))
    return sides[0], sides[1]


def check_choice(
    config: ConfigDict,
    opened: Version,
    losses: RowLosses,
    params: Params,
    rows: Int[np.ndarray, " n"],
    live: Int[np.ndarray, " m"],
    chosen: Int[np.ndarray, " k"],
    draws: int,
) -> dict[str, Any]:
    """Compares losses of rows with several choices of references.

    Args:
      config: a validated config with precomputed memories.
      opened: the version that is chosen from.
      losses: with the config.
      params: of a checkpoint that reads memories.
      rows: validation rows that the choice was not made on.
      live: ids in use.
      chosen: ids of the chosen references.
      draws: random choices of as many.

    Returns:
      `losses`: of `all`, `chosen`, `random` (mean of the draws) and `none`, and `differences`: each
      nats a token and its standard error over documents; `random_draws`: nats a token of each.
    """

    def with_only(ids: Int[np.ndarray, " k"], absent: int = -1) -> np.ndarray:
        removed = np.union1d(opened.tombstones, np.setdiff1d(live, ids))
        version = dataclasses.replace(opened, number=opened.number + 1, tombstones=removed)
        pipeline = open_pipeline(config, opened.workdir, split="validation", version=version)
        return row_losses(losses, pipeline, params, rows, absent)

    rng = np.random.default_rng([config.seed, 0xD2])
    everything = with_only(live)
    by_choice = {"all": everything["loss"], "chosen": with_only(chosen)["loss"]}
    drawn = [
        with_only(np.sort(rng.choice(live, len(chosen), replace=False)))["loss"]
        for _ in range(draws)
    ]
    if drawn:
        by_choice["random"] = np.mean(drawn, axis=0)
    by_choice["none"] = with_only(live, EVERYTHING)["loss"]
    pipeline = open_pipeline(config, opened.workdir, split="validation", version=opened)
    assert isinstance(pipeline.rows, Rows)
    document, weight = pipeline.rows.document_of(rows), everything["weight"]
    figures: dict[str, Any] = {"losses": {}, "differences": {}}
    for name, values in by_choice.items():
        figures["losses"][name] = ratio(values, weight, document)
    figures["random_draws"] = [ratio(values, weight, document)[0] for values in drawn]
    for more, less in (("random", "chosen"), ("chosen", "all"), ("none", "chosen")):
        if more in by_choice:
            change = ratio(by_choice[more] - by_choice[less], weight, document)
            figures["differences"][f"{more} - {less}"] = change
    return figures


def ratio(
    values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], groups: Int[np.ndarray, " n"]
) -> tuple[float, float]:
    """Returns sum of values over sum of weights, and its standard error over groups."""
    mean = float(values.sum() / weights.sum())
    _, place = np.unique(groups, return_inverse=True)
    residuals = np.bincount(place, values - mean * weights)
    many = len(residuals)
    if many < 2:
        return mean, float("nan")
    squared = many / (many - 1) * np.square(residuals).sum()
    return mean, float(np.sqrt(squared) / weights.sum())
