"""Random keys of JAX from seeds of 64 bits."""

from __future__ import annotations

import jax
from jaxtyping import Array

LARGEST_SEED = 2**64 - 1


def random_key(seed: int) -> Array:
    """Returns the key of a seed from 0 to `LARGEST_SEED`; different seeds have different keys.

    `jax.random.key` reads the low 32 bits alone unless JAX has 64-bit integers.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed {seed} is not from 0 to {LARGEST_SEED}")
    key = jax.random.key(seed % 2**32)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key
