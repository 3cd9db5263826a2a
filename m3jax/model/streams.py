"""The long row: references, context and prefix of a pass one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


class Streams(NamedTuple):
    """Rows and tokens of each stream; (0, 0) where there is none.

    In the long row they follow one another in this order: what ends earlier, references, comes
    first, and the odd few tokens of the prefix last, so that the others start at multiples of
    their row length.
    """

    references: tuple[int, int] = (0, 0)  # (R, W)
    context: tuple[int, int] = (0, 0)  # (B, T)
    prefix: tuple[int, int] = (0, 0)  # (1, S): `<s>Reference:`, the same for every row

    def split(self, long: Array) -> tuple[Array | None, Array | None, Array | None]:
        """Returns the streams `(rows, tokens, …)` of a long row `(1, N, …)`."""
        parts: list[Array | None] = []
        start = 0
        for rows, tokens in self:
            part = jax.lax.slice_in_dim(long, start, start + rows * tokens, axis=1)
            parts.append(part.reshape(rows, tokens, *long.shape[2:]) if rows else None)
            start += rows * tokens
        references, context, prefix = parts
        return references, context, prefix


def join(parts: Sequence[Array | None]) -> Array:
    """Returns the long row of streams, the inverse of `Streams.split`."""
    rows = [part.reshape(1, -1, *part.shape[2:]) for part in parts if part is not None]
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)
