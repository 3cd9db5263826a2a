"""Rotary position embedding (RoPE), half-split layout as in Llama checkpoints."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int
from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies of RoPE, which may be scaled for longer contexts than a model was trained on.

    A pair of a head turns r = original_length · frequency / 2π times in the original context. With
    `llama3` and `yarn`, pairs with r above `high_rotations` keep their frequency, pairs with r
    below `low_rotations` have it divided by `factor`, and those between are interpolated: over r
    (llama3), or over the index of the pair (YaRN, arXiv 2309.00071).

    Attributes:
      base: the frequency of pair i is base^(−2i/H) before scaling.
      scaling: none, linear (all frequencies are divided by `factor`), llama3 or yarn.
      magnitude: factor on rotated vectors.
      turned: false in layers without RoPE, which leave vectors as they are; an array broadcasts
        against the vectors.
    """

    base: float
    scaling: str = "none"
    factor: float = 1.0
    original_length: int = 8192
    low_rotations: float = 1.0
    high_rotations: float = 4.0
    magnitude: float = 1.0
    turned: bool | Bool[Array, ...] = True

    @classmethod
    def of(cls, model: ConfigDict) -> Rope:
        """Returns the RoPE of a config's section `model`."""
        return cls(
            model.rope_base,
            model.rope_scaling,
            model.rope_factor,
            model.rope_original_length,
            model.rope_low_rotations,
            model.rope_high_rotations,
            model.rope_magnitude,
        )

    def at(self, turned: bool | Bool[Array, ...]) -> Rope:
        """Returns the RoPE of a layer, or of several, from `turned_layers`."""
        return dataclasses.replace(self, turned=turned)

    def frequencies(self, half: int) -> Float32[np.ndarray, " half"]:
        """Returns the frequencies of the H/2 pairs of a head, radians a position."""
        pairs = np.arange(half)
        exact = float(self.base) ** (-pairs / half)
        if self.scaling == "none":
            kept = np.ones(half)
        elif self.scaling == "linear":
            kept = np.zeros(half)
        elif self.scaling == "llama3":
            rotations = self.original_length * exact / (2 * math.pi)
            kept = (rotations - self.low_rotations) / (self.high_rotations - self.low_rotations)
        else:
            first = max(math.floor(self._pair_with(self.high_rotations, half)), 0)
            last = min(math.ceil(self._pair_with(self.low_rotations, half)), 2 * half - 1)
            kept = 1 - (pairs - first) / max(last - first, 0.001)
        kept = np.clip(kept, 0, 1)
        return (exact * (kept + (1 - kept) / self.factor)).astype(np.float32)

    def _pair_with(self, rotations: float, half: int) -> float:
        """Returns the index of the pair that turns that many times in the original context."""
        ratio = self.original_length / (rotations * 2 * math.pi)
        return half * math.log(ratio) / math.log(self.base)


def turned_layers(model: ConfigDict) -> Bool[np.ndarray, " L"]:
    """Returns for every layer of a model whether it has RoPE (`model.no_rope_every`)."""
    number = np.arange(1, model.layers + 1)
    every = model.no_rope_every
    return number % every != 0 if every else np.ones(model.layers, bool)


def space_out(
    keys: Float[Array, "*batch M K P H"], spacing: int, rope: Rope
) -> Float[Array, "*batch M K P H"]:
    """Moves the keys of the memories 0, 1, 2, … back by 0, 1, 2, … times `spacing` positions."""
    if not spacing or keys.shape[-4] == 1:
        return keys
    turn = dataclasses.replace(rope, magnitude=1.0)  # the keys have it
    rows = keys.reshape(-1, *keys.shape[-4:])
    return rotate(rows, -spacing * jnp.arange(keys.shape[-4]), turn).reshape(keys.shape)


def rotate(
    x: Float[Array, "B T *heads H"],
    positions: Int[Array, T] | Int[Array, "B T"],
    rope: Rope,
) -> Float[Array, "B T *heads H"]:
    """Rotates the pairs (i, i + H/2) of every head by position · frequency of the pair.

    Args:
      x: queries `(B, T, K, G, H)` or keys `(B, T, K, H)`.
      positions: integer position of every token, `(T,)` for all rows or `(B, T)`.
      rope: frequencies, the factor on the result, and whether to rotate.

    Returns:
      Rotated vectors, dtype of `x`; the angles are computed in float32.
    """
    if rope.turned is False:
        return x
    half = x.shape[-1] // 2
    frequency = jnp.asarray(rope.frequencies(half))
    rows_BT = positions.astype(jnp.float32).reshape(-1, positions.shape[-1])
    rows_BT = rows_BT.reshape(*rows_BT.shape, *(1,) * (x.ndim - 2))
    angle = rows_BT * frequency.reshape((1,) * (x.ndim - 1) + (half,))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if rope.magnitude != 1:
        cos, sin = cos * rope.magnitude, sin * rope.magnitude
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated = rotated.astype(x.dtype)
    return rotated if rope.turned is True else jnp.where(rope.turned, rotated, x)
