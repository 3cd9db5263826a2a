"""The objective: weighted mean cross-entropy of the next token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from m3jax.model.transformer import Model, Params

Batch = Mapping[str, Any]

# What the model reads of a batch; `reference_ids` are for people and logs.
INPUTS = ("tokens", "targets", "weights", "memory", "reference_tokens")


class Sums(NamedTuple):
    """Sums over tokens, float32 scalars; sums of parts add up to those of the whole batch."""

    loss: Float[Array, ""]  # weight · cross-entropy, nats
    weight: Float[Array, ""]
    correct: Float[Array, ""]  # weight of tokens whose target is the most probable


def inputs(batch: Batch) -> dict[str, Any]:
    """The part of a batch that the step reads."""
    return {key: batch[key] for key in INPUTS if batch.get(key) is not None}


def sums(model: Model, params: Params, batch: Batch, sparsify: Callable | None) -> Sums:
    """Summed loss, weight and correct predictions of a batch.

    Args:
      model: the model.
      params: its parameters.
      batch: `tokens (B, T)`, `targets (B, T)`, `weights (B, T)`, and `memory` (ExplicitMemory of
        `(B, C, M, L, K, P, H)`) or `reference_tokens (B, C, M, W)` or neither.
      sparsify: `memory.sparsify.sparsifier(config)`; needed with `reference_tokens`.
    """
    hidden = model.hidden(
        params,
        batch["tokens"],
        memory=batch.get("memory"),
        reference_tokens=batch.get("reference_tokens"),
        sparsify=sparsify,
    )
    weights = batch["weights"].astype(jnp.float32)
    loss, correct = model.summed_loss(params, hidden, batch["targets"], weights)
    return Sums(loss, jnp.sum(weights), correct)


def loss(
    model: Model, params: Params, batch: Batch, sparsify: Callable | None = None
) -> tuple[Float[Array, ""], Sums]:
    """Mean cross-entropy over the weights, in nats a token, and the sums behind it.

    Arguments as in `sums`. A batch without weight has loss 0.
    """
    total = sums(model, params, batch, sparsify)
    return mean(total.loss, total.weight), total


def mean(total: Float[Array, ""], weight: Float[Array, ""]) -> Float[Array, ""]:
    """total / weight, 0 where there is no weight."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)
