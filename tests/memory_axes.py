"""Orders of the axes of memories."""

import numpy as np

from m3jax.model.attention_mask import ExplicitMemory


def by_reference(memory: ExplicitMemory) -> ExplicitMemory:
    """Keys and values `(…, L, K, P, H)` instead of `(L, …, K, P, H)`."""
    keys, values = (np.moveaxis(np.asarray(x), 0, -4) for x in memory[:2])
    return ExplicitMemory(keys, values, np.asarray(memory.length))


def layers_first(memory: ExplicitMemory) -> ExplicitMemory:
    """The inverse of `by_reference`."""
    keys, values = (np.ascontiguousarray(np.moveaxis(x, -4, 0)) for x in memory[:2])
    return ExplicitMemory(keys, values, memory.length)
