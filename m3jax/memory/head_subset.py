"""Banks of some heads only (Memory³ §7): which keys and values are stored, and where they belong.

Such a bank has an axis of the S chosen heads of all layers in the place of layers and heads: stored
memories are `(1, …, S, P, width)`. What reads them gets `(L, …, K, P, H)`, with zeros for the heads
that have no memories; attention does not see those (`model.attention_mask.seen_by_heads`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool
from ml_collections import ConfigDict

from m3jax.config import format_heads, memory_heads, parse_heads


@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads that a bank has memories of, fewer than all.

    Attributes:
      layers: memory layers L.
      kv_heads: key-value heads K of a layer.
      chosen: layer · K + head of each, ascending; layers counted from the first memory layer.
    """

    layers: int
    kv_heads: int
    chosen: tuple[int, ...]

    @property
    def mask(self) -> Bool[np.ndarray, "L K"]:
        """Mask of the chosen heads."""
        places = np.arange(self.layers * self.kv_heads)
        return np.isin(places, self.chosen).reshape(self.layers, self.kv_heads)

    def take(self, memories: Array) -> Array:
        """Selects the chosen heads of keys or values: `(…, L, K, P, H)` → `(…, 1, S, P, H)`."""
        *lead, P, H = memories.shape
        flat = memories.reshape(*lead[:-2], 1, self.layers * self.kv_heads, P, H)
        return jnp.take(flat, np.array(self.chosen), axis=-3)

    def place(self, chosen: Array) -> Array:
        """Puts them in their layers, `(1, …, S, P, H)` → `(L, …, K, P, H)`; others are zeros."""
        *lead, S, P, H = chosen.shape
        source = np.full(self.layers * self.kv_heads, S)  # behind the chosen ones: zeros
        source[np.array(self.chosen)] = np.arange(S)
        padded = jnp.concatenate([chosen, jnp.zeros((*lead, 1, P, H), chosen.dtype)], axis=-3)[0]
        source_LK = source.reshape(self.layers, self.kv_heads)
        return jax.vmap(lambda source_K: jnp.take(padded, source_K, axis=-3))(source_LK)


def heads_of(config: ConfigDict) -> Heads | None:
    """Returns the heads that a bank of this config has memories of; None: all."""
    memory = config.memory
    shape = {"first_layer": memory.first_layer, "layers": memory.layers}
    return heads_of_layout({**shape, "kv_heads": config.model.kv_heads, **layout_entries(config)})


def layout_entries(config: ConfigDict) -> dict[str, Any]:
    """Entries of a bank's layout on its heads; empty where it has all."""
    chosen = memory_heads(config.model, config.memory)
    return {} if chosen is None else {"heads": format_heads(chosen)}


def heads_of_layout(layout: dict[str, Any]) -> Heads | None:
    """The heads of a bank with this layout; None: all."""
    first, layers, kv_heads = (layout[name] for name in ("first_layer", "layers", "kv_heads"))
    chosen = parse_heads(layout.get("heads", ""), range(first, first + layers), kv_heads)
    if chosen is None:
        return None
    places = tuple((layer - first) * kv_heads + head for layer, head in chosen)
    return Heads(layers, kv_heads, places)
