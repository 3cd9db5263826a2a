"""Rotary position embedding (RoPE), half-split layout as in Llama checkpoints."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B T *heads H"],
    positions: Int[Array, "T"] | Int[Array, "B T"],
    base: float,
) -> Float[Array, "B T *heads H"]:
    """Rotates the pairs (i, i + H/2) of every head by position · base^(−2i/H).

    Args:
      x: queries `(B, T, K, G, H)` or keys `(B, T, K, H)`.
      positions: integer position of every token, `(T,)` for all rows or `(B, T)`.
      base: RoPE base.

    Returns:
      Rotated vectors, dtype of `x`; the angles are computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    rows_BT = positions.astype(jnp.float32).reshape(-1, positions.shape[-1])
    rows_BT = rows_BT.reshape(*rows_BT.shape, *(1,) * (x.ndim - 2))
    angle = rows_BT * frequency.reshape((1,) * (x.ndim - 1) + (half,))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
