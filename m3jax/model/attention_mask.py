"""Types of keys and values (prefix, memories, packed texts), and the mask of visible keys."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KeyValues(NamedTuple):
    """Keys (RoPE applied) and values of one layer without a batch axis: the constant prefix."""

    keys: Float[Array, "S K H"]
    values: Float[Array, "S K H"]


class ExplicitMemory(NamedTuple):
    """Sparse attention key-values of references.

    keys, values: `(L, …, K, P, H)` for all memory layers (a scan runs over the first axis), or
      `(…, K, P, H)` for one layer. In a batch the axes … are `(B, C, M)`: row, chunk, memory.
    length: `(…)` int32, the number of the P slots that hold a token. These come first, in the
      order of the reference; the slots after them receive no attention.
    """

    keys: Float[Array, ...]
    values: Float[Array, ...]
    length: Int[Array, ...]


class Packing(NamedTuple):
    """Boundaries of the texts in packed rows; texts of a row do not see each other.

    Every text has its own chunks, ⌈n / chunk_length⌉ of them for n tokens. The chunk axis of a
    row's memories lists the chunks of the first text, then those of the second, ….

    starts: for every token, the index in the row of its text's first token, `(B, T)` int32.
    first_chunks: for every token, the index in the row of its text's first chunk, `(B, T)` int32.
    """

    starts: Int[Array, "B T"]
    first_chunks: Int[Array, "B T"]

    @property
    def positions(self) -> Int[Array, "B T"]:
        """Position of every token within its text, from 0."""
        return jnp.arange(self.starts.shape[1])[None] - self.starts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShortSight:
    """Query heads that see of the context only its first token and the most recent tokens.

    heads_KG: true for these heads; `(L, K, G)` when passed to a `Model`.
    tokens: number of recent tokens that they see, the query's own included.
    """

    heads_KG: Bool[Array, "*layers K G"]
    tokens: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scope:
    """Keys that a layer attends to besides the context, and the masks of queries and heads.

    Attributes:
      prefix: keys and values in front of every row.
      memory: memories of one layer, `(B, C, M, K, P, H)` and length `(B, C, M)`, C·chunk_length ≥
        T; with `packing`, C is the number of chunks of all texts of a row.
      packing: texts of packed rows, each of which sees only itself and its memories; None if a row
        is one text.
      counts: number of slots of a memory that each key-value head has, of the P in `memory`; None
        if all have P. A head with 0 reads no memories (Memory³ §7).
      sight: query heads that see only a part of the context; None if all see all of it.
      chunk_length: tokens Q of a chunk.
      window: number of chunks whose memories a query reads, its own included.
      low: index in the row of the first chunk in `memory`.
    """

    prefix: KeyValues | None = None
    memory: ExplicitMemory | None = None
    packing: Packing | None = None
    counts: Int[Array, " K"] | None = None
    sight: ShortSight | None = None
    chunk_length: int = dataclasses.field(default=64, metadata={"static": True})
    window: int = dataclasses.field(default=1, metadata={"static": True})
    low: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def prefix_slots(self) -> int:
        """Number of keys of the prefix."""
        return 0 if self.prefix is None else self.prefix.keys.shape[0]

    @property
    def memory_slots(self) -> int:
        """Number C·M·P of memory slots of a row."""
        memory = self.memory
        return 0 if memory is None else math.prod(memory.length.shape[1:]) * memory.keys.shape[-2]


def visible_mask(
    query_T: Int[Array, T], context: int, scope: Scope
) -> Bool[Array, "rows heads T keys"]:
    """Returns the mask of keys, in the order [prefix ; memories ; context], that each query sees.

    Args:
      query_T: positions of the queries in the row.
      context: number of context keys, which are those of the tokens 0, 1, ….
      scope: prefix, memories and masks; `sight` is not applied.

    Returns:
      A boolean mask that broadcasts to (B, K, T, keys). The axis of rows has size 1 if there are
      neither memories nor packing, the axis of key-value heads if all heads have P slots.
    """
    packing, prefix = scope.packing, scope.prefix_slots
    masks = [(query_T[:, None] >= jnp.arange(context)[None])[None]]
    if packing is not None:
        own_BTS = jnp.arange(context)[None, None] >= packing.starts[:, query_T][..., None]
        masks = [masks[0] & own_BTS]
    if scope.memory is not None:
        masks.insert(0, memory_mask(query_T, scope))
    if scope.prefix is not None:
        masks.insert(0, jnp.ones((1, query_T.shape[0], prefix), bool))
    rows = max(mask.shape[0] for mask in masks)
    mask_BTS = jnp.concatenate(
        [jnp.broadcast_to(mask, (rows, *mask.shape[1:])) for mask in masks], axis=-1
    )
    if scope.counts is None or scope.memory is None:
        return mask_BTS[:, None]
    P = scope.memory.keys.shape[-2]
    heads_KS = keys_of_heads(scope.counts, P, mask_BTS.shape[-1], prefix, scope.memory_slots)
    return mask_BTS[:, None] & heads_KS[None, :, None]


def memory_mask(query_T: Int[Array, T], scope: Scope) -> Bool[Array, "B T slots"]:
    """Returns the mask of memory slots (C·M·P, chunk-major) that each query reads."""
    memory, packing = scope.memory, scope.packing
    assert memory is not None
    B, C, _ = memory.length.shape
    chunk_C = (scope.low + jnp.arange(C))[None, None]
    query_chunk = query_T[None] // scope.chunk_length  # (1, T), the same for all rows
    if packing is not None:
        first = packing.first_chunks[:, query_T]
        query_chunk = first + packing.positions[:, query_T] // scope.chunk_length
    distance_BTC = query_chunk[..., None] - chunk_C
    in_window_BTC = (distance_BTC >= 0) & (distance_BTC < scope.window)
    if packing is not None:
        in_window_BTC = in_window_BTC & (chunk_C >= first[..., None])
    visible = in_window_BTC[..., None, None] & real_slots(memory)[:, None]
    return visible.reshape(B, query_T.shape[0], scope.memory_slots)


def hidden_by_sight(
    sight: ShortSight, query_T: Int[Array, T], context: int, keys: int
) -> Bool[Array, "K G T keys"]:
    """Returns the mask of keys that `sight` hides from each query head; the last `context` of the
    `keys` keys are those of the context."""
    key_S = jnp.arange(keys)[None] - (keys - context)
    far_TS = (query_T[:, None] - key_S >= sight.tokens) & (key_S > 0)
    return sight.heads_KG[:, :, None, None] & far_TS[None, None]


def keys_of_heads(
    counts_K: Int[Array, " K"], P: int, keys: int, first: int, slots: int
) -> Bool[Array, "K keys"]:
    """Returns the keys that each key-value head may see: all but the memory slots `first … first +
    slots − 1` that it does not have, as of P slots of a memory it has the first `counts_K`."""
    key = jnp.arange(keys)[None]
    outside = (key < first) | (key >= first + slots)
    return outside | ((key - first) % max(P, 1) < counts_K[:, None])


def real_slots(memory: ExplicitMemory) -> Bool[Array, "B C M P"]:
    """Returns the mask of memory slots that hold a token."""
    P = memory.keys.shape[-2]
    return jnp.arange(P)[None, None, None] < memory.length[..., None]


def concatenate(
    k_BSKH: Array, v_BSKH: Array, prefix: KeyValues | None, memory: ExplicitMemory | None
) -> KeyValues:
    """Concatenates keys and values in the order [prefix ; memories ; context], `(B, S, K, H)`."""
    B, _, K, H = k_BSKH.shape
    joined = []
    for part, context in enumerate((k_BSKH, v_BSKH)):
        parts = [context]
        if memory is not None:
            parts.insert(0, jnp.moveaxis(memory[part], 3, 4).reshape(B, -1, K, H))
        if prefix is not None:
            parts.insert(0, jnp.broadcast_to(prefix[part][None], (B, *prefix[part].shape)))
        joined.append(jnp.concatenate([x.astype(k_BSKH.dtype) for x in parts], axis=1))
    return KeyValues(*joined)
