"""Types of keys and values (prefix, memories, packed texts), and the mask of what a query sees."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShortSight:
    """Query heads that see little of the context: its first token and their own last tokens.

    heads_KG: which; with a leading axis of layers where a model is given them.
    tokens: of the context that they see, the query's own included.
    """

    heads_KG: Bool[Array, "*layers K G"]
    tokens: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scope:
    """Keys that queries may attend to besides the context, and which of them each sees.

    Attributes:
      prefix: keys and values in front of every row.
      memory: memories of one layer, `(B, C, M, K, P, H)` and length `(B, C, M)`, C·chunk_length ≥
        T; with `packing` as many chunks as the texts of a row have.
      packing: several texts in a row, each of which sees itself and its memories only; None: one.
      heads: which key-value heads read memories (Memory³ §7); None: all.
      sight: query heads that see little of the context.
      chunk_length: tokens Q of a chunk.
      window: chunks whose memories a query reads, its own included.
      low: chunk of the row that is the first in `memory`.
    """

    prefix: KeyValues | None = None
    memory: ExplicitMemory | None = None
    packing: Packing | None = None
    heads: Bool[Array, " K"] | None = None
    sight: ShortSight | None = None
    chunk_length: int = dataclasses.field(default=64, metadata={"static": True})
    window: int = dataclasses.field(default=1, metadata={"static": True})
    low: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def prefix_slots(self) -> int:
        """Keys of the prefix."""
        return 0 if self.prefix is None else self.prefix.keys.shape[0]

    @property
    def memory_slots(self) -> int:
        """Memory slots C·M·P of a row."""
        memory = self.memory
        return 0 if memory is None else math.prod(memory.length.shape[1:]) * memory.keys.shape[-2]


def visible_mask(
    query_T: Int[Array, T], context: int, scope: Scope
) -> Bool[Array, "rows heads T keys"]:
    """Returns the mask of keys, in the order [prefix ; memories ; context], that each query sees.

    Args:
      query_T: positions in the row of the queries.
      context: keys of the context, the tokens 0 ….
      scope: all of it but `sight`.

    Returns:
      One mask for every row and key-value head; one for all rows where they differ in nothing
      (without memory and packing), and one for all heads where `scope.heads` does not tell them
      apart.
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
    if scope.heads is None or scope.memory is None:
        return mask_BTS[:, None]
    heads_KS = keys_of_heads(scope.heads, mask_BTS.shape[-1], prefix, scope.memory_slots)
    return mask_BTS[:, None] & heads_KS[None, :, None]


def memory_mask(query_T: Int[Array, T], scope: Scope) -> Bool[Array, "B T slots"]:
    """Returns the mask of memory slots (C·M·P, chunk-major) that each query of the row reads."""
    memory, packing = scope.memory, scope.packing
    assert memory is not None
    B, C, _ = memory.length.shape
    chunk_C = (scope.low + jnp.arange(C))[None, None]
    query_chunk = query_T[None] // scope.chunk_length  # one for all rows, (1, T)
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
