"""Pooling of token states to one vector a text, and the statistics that this takes."""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int32

_ENOUGH = 16  # texts that must reach a position for a mean of its own


def usable(tokens_BT: Int32[Array, "B T"], lengths_B: Int32[Array, " B"]) -> Bool[Array, "B T"]:
    """Returns True where tokens are not padding."""
    return jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]


def like(real_BT: Bool[Array, "B T"], states: Float[Array, "B T *rest"]) -> Bool[Array, "B T ..."]:
    """Reshapes the mask to as many axes as the states."""
    return real_BT.reshape(*real_BT.shape, *(1 for _ in states.shape[2:]))


def centred(
    states: Float[Array, "B T *rest"], means: Float32[Array, "W ..."]
) -> Float32[Array, "B T *rest"]:
    """Subtracts the means of their positions from states; beyond the last one, that of the last."""
    position_T = jnp.minimum(jnp.arange(states.shape[1]), len(means) - 1)
    return states.astype(jnp.float32) - means[position_T][None]


def mean_of(
    states: Float32[Array, "B T *rest"], real_BT: Bool[Array, "B T"]
) -> Float32[Array, B * rest]:
    """Averages over the real tokens; zeros for a text without one."""
    mask = like(real_BT, states)
    return jnp.where(mask, states, 0).sum(1) / jnp.maximum(mask.sum(1), 1)


def unit(x_BE: Float32[Array, "B E"]) -> Float32[Array, "B E"]:
    """Scales rows to length 1; zeros stay zeros."""
    return x_BE / jnp.maximum(jnp.sqrt(jnp.square(x_BE).sum(-1, keepdims=True)), 1e-12)


def draw(texts: Iterable[str], most: int) -> list[str]:
    """Draws up to `most` of the texts, each with equal chance, the same every time."""
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
    """Averages every position, up to the last that 16 texts reach (or all, where they are fewer).

    `sums` are of the states of the `counts` texts that reach a position.
    """
    last = int((counts >= min(_ENOUGH, counts[0])).sum())
    shape = (last, *(1 for _ in sums.shape[1:]))
    return (sums[:last] / counts[:last].reshape(shape)).astype(np.float32)


def directions(
    centred_nF: Float64[np.ndarray, "n F"], most: int
) -> tuple[Float64[np.ndarray, " most"], Float64[np.ndarray, "F most"]]:
    """Returns the main directions of centred rows and the variances along them, largest first.

    Where the rows have fewer directions than `most`, the others are zeros.
    """
    _, size, axes_EF = np.linalg.svd(centred_nF, full_matrices=False)
    kept = min(most, len(size))
    variance, axes = np.zeros(most), np.zeros((centred_nF.shape[1], most))
    variance[:kept], axes[:, :kept] = size[:kept] ** 2 / len(centred_nF), axes_EF[:kept].T
    return variance, axes
