"""Pools token states to one vector per text, and computes the statistics for this."""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int32

_ENOUGH = 16  # texts that must be long enough for a position to have its own mean


def usable(tokens_BT: Int32[Array, "B T"], lengths_B: Int32[Array, " B"]) -> Bool[Array, "B T"]:
    """Returns the mask of tokens that are not padding."""
    return jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]


def like(real_BT: Bool[Array, "B T"], states: Float[Array, "B T *rest"]) -> Bool[Array, "B T ..."]:
    """Appends axes of size 1 to the mask, up to the number of axes of the states."""
    return real_BT.reshape(*real_BT.shape, *(1 for _ in states.shape[2:]))


def centred(
    states: Float[Array, "B T *rest"], means: Float32[Array, "W ..."]
) -> Float32[Array, "B T *rest"]:
    """Subtracts from each state the mean of its position, or the last mean beyond W positions."""
    position_T = jnp.minimum(jnp.arange(states.shape[1]), len(means) - 1)
    return states.astype(jnp.float32) - means[position_T][None]


def mean_of(
    states: Float32[Array, "B T *rest"], real_BT: Bool[Array, "B T"]
) -> Float32[Array, B * rest]:
    """Averages states over the real tokens of each text; zeros for a text without tokens."""
    mask = like(real_BT, states)
    return jnp.where(mask, states, 0).sum(1) / jnp.maximum(mask.sum(1), 1)


def unit(x_BE: Float32[Array, "B E"]) -> Float32[Array, "B E"]:
    """Scales rows to length 1; rows of zeros stay zeros."""
    return x_BE / jnp.maximum(jnp.sqrt(jnp.square(x_BE).sum(-1, keepdims=True)), 1e-12)


def draw(texts: Iterable[str], most: int) -> list[str]:
    """Samples up to `most` texts uniformly (reservoir sampling), with a fixed seed."""
    drawn: list[str] = []
    random = np.random.default_rng(0)
    for count, text in enumerate(texts):
        if count < most:
            drawn.append(text)
        elif (place := int(random.integers(count + 1))) < most:
            drawn[place] = text
    return drawn


def position_means(
    sums: Float64[np.ndarray, "W ..."], counts: Float64[np.ndarray, " W"]
) -> Float32[np.ndarray, "V ..."]:
    """Computes mean states by position, up to the last position V that enough texts reach.

    Enough are 16 texts, or all if there are fewer. `sums` and `counts` are the sum of states and
    the number of texts at each position.
    """
    last = int((counts >= min(_ENOUGH, counts[0])).sum())
    shape = (last, *(1 for _ in sums.shape[1:]))
    return (sums[:last] / counts[:last].reshape(shape)).astype(np.float32)


def directions(
    centred_nF: Float64[np.ndarray, "n F"], most: int
) -> tuple[Float64[np.ndarray, " most"], Float64[np.ndarray, "F most"]]:
    """Returns variances and principal directions of centred rows, largest variance first.

    If there are fewer than `most` directions, the rest is zeros.
    """
    _, size, axes_EF = np.linalg.svd(centred_nF, full_matrices=False)
    kept = min(most, len(size))
    variance, axes = np.zeros(most), np.zeros((centred_nF.shape[1], most))
    variance[:kept], axes[:, :kept] = size[:kept] ** 2 / len(centred_nF), axes_EF[:kept].T
    return variance, axes
