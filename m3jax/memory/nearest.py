"""The nearest entries of a table: one product for each block of vectors, and plain maxima."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

# Vectors compared at a time: on a CPU their 2¹⁴ distances, 8 MB, stay near the processor.
_BLOCK, _BLOCK_OF_ACCELERATOR = 128, 4096
_GROUP = 128  # entries whose best is blocks first; see `largest`


def parts_of(x_nH: Array, parts: int) -> Array:
    """`(n, H)` → `(parts, n, H/parts)`."""
    return x_nH.reshape(len(x_nH), parts, -1).swapaxes(0, 1)


def largest(scores: Array) -> Array:
    """argmax over the last axis, the first of equals; `(*n, entries)` → `(*n,)`.

    The largest of each group first, then inside the best group: plain maxima vectorize where a
    maximum that carries its index does not.
    """
    size = scores.shape[-1]
    if size % _GROUP:
        return jnp.argmax(scores, axis=-1)
    groups = scores.reshape(*scores.shape[:-1], -1, _GROUP)
    group = jnp.argmax(jnp.max(groups, axis=-1), axis=-1)
    inside = jnp.take_along_axis(groups, group[..., None, None], axis=-2)[..., 0, :]
    return group * _GROUP + jnp.argmax(inside, axis=-1)


def comparable(entries: Array) -> Array:
    """Entries `(*parts, n, d)` as columns with −‖e‖²/2 below, `(*parts, d + 1, n)`."""
    norms = -0.5 * jnp.sum(entries**2, axis=-1, keepdims=True)
    return jnp.concatenate([entries, norms], axis=-1).swapaxes(-1, -2)


def with_one(x: Array) -> Array:
    """Vectors with a last number 1, so that one product with `comparable` entries gives
    x · e − ‖e‖²/2, which is largest for the nearest entry."""
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def by_block(f: Callable[[Array], Any], x: Array) -> Any:
    """`f` of vectors `(n, d)`, a block at a time."""
    n = len(x)
    on_cpu = jax.default_backend() == "cpu"
    block = min(_BLOCK if on_cpu else _BLOCK_OF_ACCELERATOR, n)
    padded = jnp.pad(x, ((0, -n % block), (0, 0))).reshape(-1, block, x.shape[1])
    blocks = jax.lax.map(f, padded)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], blocks)


def nearest_few(scores: Array, count: int) -> Array:
    """Indices of the nearest entry and of the next ones, each of another group.

    Args:
      scores: of all entries, largest for the nearest; `(*n, entries)`.
      count: how many; fewer come where there are fewer groups.
    """
    if count == 1 or scores.shape[-1] % _GROUP:
        return jax.lax.top_k(scores, count)[1] if count > 1 else largest(scores)[..., None]
    groups = scores.reshape(*scores.shape[:-1], -1, _GROUP)
    group = jax.lax.top_k(jnp.max(groups, axis=-1), min(count, groups.shape[-2]))[1]
    inside = jnp.take_along_axis(groups, group[..., None], axis=-2)
    return group * _GROUP + jnp.argmax(inside, axis=-1)


@jax.jit
def nearest_of(x: Array, entries: Array) -> Array:
    """Index of the entry `(entries, d)` nearest to each vector `(n, d)`."""
    columns = comparable(entries)
    return by_block(lambda block: largest(with_one(block) @ columns), x)
