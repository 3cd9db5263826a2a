"""Types of keys and values (prefix, memories, packed texts), and the mask of what a query sees."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KeyValues(NamedTuple):
    """Keys (positions applied) and values of one layer, without batch: the constant prefix."""

    keys: Float[Array, "S K H"]
    values: Float[Array, "S K H"]


class ExplicitMemory(NamedTuple):
    """Sparse attention key-values of references.

    keys, values: `(L, …, K, P, H)`, in the order in which a scan over layers takes them, or
      `(…, K, P, H)` of one layer. In a batch the axes … are `(B, C, M)`: row, chunk, memory.
    length: `(…)` int32, how many of the P slots are real. Real slots come first, in reference
      order; the others take no attention.
    """

    keys: Float[Array, ...]
    values: Float[Array, ...]
    length: Int[Array, ...]


class Packing(NamedTuple):
    """Several texts in a row that do not see each other; each has chunks of its own.

    Memories of a packed row are those of the chunks of its first text, then of its second, …; a
    text of n tokens has ⌈n / chunk_length⌉ of them.

    starts: index in the row of the first token of a token's text, `(B, T)` int32.
    first_chunks: number in the row of the first chunk of its text, `(B, T)` int32.
    """

    starts: Int[Array, "B T"]
    first_chunks: Int[Array, "B T"]

    @property
    def positions(self) -> Int[Array, "B T"]:
        """Position of every token in its text, from 0."""
        return jnp.arange(self.starts.shape[1])[None] - self.starts


class ShortSight(NamedTuple):
    """Query heads that see little of the context: its first token and their own last tokens.

    heads_KG: which; with a leading axis of layers where a model is given them.
    tokens: of the context that they see, the query's own included.
    """

    heads_KG: Bool[Array, "*layers K G"]
    tokens: int | Int[Array, ""]


def visible_mask(
    query_T: Int[Array, T],
    context: int,
    prefix: KeyValues | None,
    memory: ExplicitMemory | None,
    chunk_length: int,
    window: int,
    low: int = 0,
    packing: Packing | None = None,
) -> Bool[Array, "rows T keys"]:
    """Returns the mask of keys, in the order [prefix ; memories ; context], that each query sees.

    Args:
      query_T: positions in the row of the queries.
      context: keys of the context, the tokens 0 ….
      prefix, memory, chunk_length, window, packing: as in `attend`.
      low: chunk of the row that is the first in `memory`.

    Returns:
      One mask for every row; one for all rows where they differ in nothing: without memory and
      packing.
    """
    masks = [(query_T[:, None] >= jnp.arange(context)[None])[None]]
    if packing is not None:
        own_BTS = jnp.arange(context)[None, None] >= packing.starts[:, query_T][..., None]
        masks = [masks[0] & own_BTS]
    if memory is not None:
        masks.insert(0, memory_mask(query_T, memory, chunk_length, window, low, packing))
    if prefix is not None:
        masks.insert(0, jnp.ones((1, query_T.shape[0], prefix.keys.shape[0]), bool))
    rows = max(mask.shape[0] for mask in masks)
    return jnp.concatenate(
        [jnp.broadcast_to(mask, (rows, *mask.shape[1:])) for mask in masks], axis=-1
    )


def memory_mask(
    query_T: Int[Array, T],
    memory: ExplicitMemory,
    chunk_length: int,
    window: int,
    low: int = 0,
    packing: Packing | None = None,
) -> Bool[Array, "B T slots"]:
    """Returns the mask of memory slots (C·M·P, chunk-major) that each query of the row reads."""
    B, C, M = memory.length.shape
    P = memory.keys.shape[-2]
    chunk_C = (low + jnp.arange(C))[None, None]
    query_chunk = query_T[None] // chunk_length  # one for all rows, (1, T)
    if packing is not None:
        first = packing.first_chunks[:, query_T]
        query_chunk = first + packing.positions[:, query_T] // chunk_length
    distance_BTC = query_chunk[..., None] - chunk_C
    in_window_BTC = (distance_BTC >= 0) & (distance_BTC < window)
    if packing is not None:
        in_window_BTC = in_window_BTC & (chunk_C >= first[..., None])
    visible = in_window_BTC[..., None, None] & real_slots(memory)[:, None]
    return visible.reshape(B, query_T.shape[0], C * M * P)


def seen_by_heads(
    mask_BTS: Bool[Array, "rows T keys"],
    heads_K: Bool[Array, " K"] | None,
    prefix: KeyValues | None,
    memory: ExplicitMemory | None,
) -> Bool[Array, "rows heads T keys"]:
    """Extends `visible_mask` to every key-value head: heads without memories see none.

    Args:
      mask_BTS: of `visible_mask`.
      heads_K: which heads read memories; None: all.
      prefix, memory: as in `attend`.

    Returns:
      One mask for all heads, `(rows, 1, T, keys)`, where all see the same.
    """
    if heads_K is None or memory is None:
        return mask_BTS[:, None]
    first = 0 if prefix is None else prefix.keys.shape[0]
    slots = math.prod(memory.length.shape[1:]) * memory.keys.shape[-2]
    return (
        mask_BTS[:, None] & keys_of_heads(heads_K, mask_BTS.shape[-1], first, slots)[None, :, None]
    )


def hidden_by_sight(
    sight: ShortSight, query_T: Int[Array, T], context: int, keys: int
) -> Bool[Array, "K G T keys"]:
    """Returns the keys that query heads do not see; the last `context` keys are the context's."""
    key_S = jnp.arange(keys)[None] - (keys - context)
    far_TS = (query_T[:, None] - key_S >= sight.tokens) & (key_S > 0)
    return sight.heads_KG[:, :, None, None] & far_TS[None, None]


def keys_of_heads(
    heads_K: Bool[Array, " K"], keys: int, first: int, slots: int
) -> Bool[Array, "K keys"]:
    """All keys for heads that read memories, for others all but the memory slots from `first`."""
    key = jnp.arange(keys)[None]
    return heads_K[:, None] | (key < first) | (key >= first + slots)


def real_slots(memory: ExplicitMemory) -> Bool[Array, "B C M P"]:
    """Returns the mask of memory slots that hold a token."""
    P = memory.keys.shape[-2]
    return jnp.arange(P)[None, None, None] < memory.length[..., None]


def concatenate(
    k_BSKH: Array, v_BSKH: Array, prefix: KeyValues | None, memory: ExplicitMemory | None
) -> tuple[Array, Array]:
    """Concatenates keys and values in the order [prefix ; memories ; context]."""
    B, _, K, H = k_BSKH.shape
    keys, values = [k_BSKH], [v_BSKH]
    if memory is not None:
        for parts, x_BCMKPH in ((keys, memory.keys), (values, memory.values)):
            slots = jnp.moveaxis(x_BCMKPH, 3, 4).reshape(B, -1, K, H)
            parts.insert(0, slots.astype(k_BSKH.dtype))
    if prefix is not None:
        for parts, x_SKH in ((keys, prefix.keys), (values, prefix.values)):
            parts.insert(0, jnp.broadcast_to(x_SKH[None], (B, *x_SKH.shape)).astype(k_BSKH.dtype))
    return jnp.concatenate(keys, axis=1), jnp.concatenate(values, axis=1)
