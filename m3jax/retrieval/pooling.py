"""Pools token states to one vector per text."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32


def usable(tokens_BT: Int32[Array, "B T"], lengths_B: Int32[Array, " B"]) -> Bool[Array, "B T"]:
    """Returns the mask of tokens that are not padding."""
    return jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]


def like(real_BT: Bool[Array, "B T"], states: Float[Array, "B T *rest"]) -> Bool[Array, "B T ..."]:
    """Appends axes of size 1 to the mask, up to the number of axes of the states."""
    return real_BT.reshape(*real_BT.shape, *(1 for _ in states.shape[2:]))


def mean_of(
    states: Float32[Array, "B T *rest"], real_BT: Bool[Array, "B T"]
) -> Float32[Array, B * rest]:
    """Averages states over the real tokens of each text; zeros for a text without tokens."""
    mask = like(real_BT, states)
    return jnp.where(mask, states, 0).sum(1) / jnp.maximum(mask.sum(1), 1)


def unit(x: Float32[Array, "*rows E"]) -> Float32[Array, "*rows E"]:
    """Scales rows to length 1; rows of zeros stay zeros."""
    return x / jnp.maximum(jnp.sqrt(jnp.square(x).sum(-1, keepdims=True)), 1e-12)
