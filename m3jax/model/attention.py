"""One attention for every path: keys are [prefix ; memories ; context], in one softmax.

A query of chunk c sees the whole prefix, the memories of chunks c − window + 1 … c and the context
up to itself (Memory³ §3.4). Training with shared references is window 5 and one memory a chunk; a
prompt whose chunks have five memories of their own is window 1 and M = 5.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # a finite score: rows are never empty, since a token always sees itself


class KeyValues(NamedTuple):
    """Keys (positions applied) and values of one layer, without batch: the constant prefix."""

    keys: Float[Array, "S K H"]
    values: Float[Array, "S K H"]


class ExplicitMemory(NamedTuple):
    """Sparse attention key-values of references.

    keys, values: `(…, L, K, P, H)`, or `(…, K, P, H)` once a layer is chosen. In a batch the
      leading axes are `(B, C, M)`: row, chunk, memory of the chunk.
    length: `(…)` int32, how many of the P slots are real. Real slots come first, in reference
      order; the others take no attention.
    """

    keys: Float[Array, ...]
    values: Float[Array, ...]
    length: Int[Array, ...]


def attend(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    prefix: KeyValues | None = None,
    memory: ExplicitMemory | None = None,
    *,
    chunk_length: int = 64,
    window: int = 1,
    implementation: str = "naive",
    block: int = 256,
) -> Float[Array, "B T K G H"]:
    """Causal attention that also reads a prefix and explicit memories, in one softmax.

    Args:
      q_BTKGH, k_BTKH, v_BTKH: queries, keys (RoPE applied) and values of the context.
      prefix: keys and values in front of every row.
      memory: memories of one layer, `(B, C, M, K, P, H)` and length `(B, C, M)`, C·chunk_length ≥
        T.
      chunk_length: tokens Q of a chunk.
      window: chunks whose memories a query reads, its own included.
      implementation: `naive` holds all scores; `blocked` works on `block` queries at a time, never
        computes scores that the mask hides behind them, and recomputes them for the gradient.
      block: queries a block, tokens.

    Returns:
      Attention output, before the output projection, dtype of the values.
    """
    T = q_BTKGH.shape[1]
    if implementation == "naive":
        return _attend_block(0, chunk_length, window, q_BTKGH, k_BTKH, v_BTKH, prefix, memory)
    if implementation != "blocked":
        raise ValueError(f"attention implementation {implementation!r}; known: naive, blocked")
    outputs = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        low = max(0, start // chunk_length - window + 1)
        high = (stop - 1) // chunk_length + 1
        part = None if memory is None else jax.tree.map(lambda x, a=low, b=high: x[:, a:b], memory)

        def body(
            q: Array,
            k: Array,
            v: Array,
            prefix: KeyValues | None,
            part: ExplicitMemory | None,
            start: int = start,
            low: int = low,
        ) -> Array:
            return _attend_block(start, chunk_length, window, q, k, v, prefix, part, low)

        outputs.append(
            jax.checkpoint(body)(
                q_BTKGH[:, start:stop], k_BTKH[:, :stop], v_BTKH[:, :stop], prefix, part
            )
        )
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _attend_block(
    start: int,
    chunk_length: int,
    window: int,
    q_BTKGH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    prefix: KeyValues | None,
    memory: ExplicitMemory | None,
    low: int = 0,
) -> Array:
    """Attention of the queries `start …` over all keys given; `low` is the first chunk in
    `memory`."""
    weights_BKGTS = attention_weights(
        q_BTKGH, k_BSKH, prefix, memory, start, chunk_length, window, low
    )
    _, values = _concatenate(k_BSKH, v_BSKH, prefix, memory)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), values)


def attention_weights(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    prefix: KeyValues | None,
    memory: ExplicitMemory | None,
    start: int = 0,
    chunk_length: int = 64,
    window: int = 1,
    low: int = 0,
) -> Float[Array, "B K G T keys"]:
    """Softmax weights in float32, keys in the order [prefix ; memories ; context].

    Args:
      q_BTKGH: queries of the tokens `start …`.
      k_BSKH: context keys of the tokens 0 ….
      prefix, memory, chunk_length, window: as in `attend`.
      start: position in the row of the first query.
      low: chunk of the row that is the first in `memory`.
    """
    T, H, S = q_BTKGH.shape[1], q_BTKGH.shape[-1], k_BSKH.shape[1]
    keys, _ = _concatenate(k_BSKH, k_BSKH, prefix, memory)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, keys, preferred_element_type=jnp.float32
    ) * (H**-0.5)
    query_T = start + jnp.arange(T)
    masks = [(query_T[:, None] >= jnp.arange(S)[None])[None]]
    if memory is not None:
        visible = memory_mask(query_T, memory, chunk_length, window, low)
        masks.insert(0, visible)
    if prefix is not None:
        masks.insert(0, jnp.ones((1, T, prefix.keys.shape[0]), bool))
    batch = max(mask.shape[0] for mask in masks)
    mask_BTS = jnp.concatenate(
        [jnp.broadcast_to(mask, (batch, *mask.shape[1:])) for mask in masks], axis=-1
    )
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)
    return jax.nn.softmax(scores_BKGTS, axis=-1)


def memory_mask(
    query_T: Int[Array, T],
    memory: ExplicitMemory,
    chunk_length: int,
    window: int,
    low: int = 0,
) -> Bool[Array, "B T slots"]:
    """Which memory slots (C·M·P, chunk-major) each query of the row reads."""
    B, C, M = memory.length.shape
    P = memory.keys.shape[-2]
    distance_TC = query_T[:, None] // chunk_length - (low + jnp.arange(C))[None]
    in_window_TC = (distance_TC >= 0) & (distance_TC < window)
    real_BCMP = jnp.arange(P)[None, None, None] < memory.length[..., None]
    visible = in_window_TC[None, :, :, None, None] & real_BCMP[:, None]
    return visible.reshape(B, query_T.shape[0], C * M * P)


def _concatenate(
    k_BSKH: Array, v_BSKH: Array, prefix: KeyValues | None, memory: ExplicitMemory | None
) -> tuple[Array, Array]:
    """Keys and values in the order [prefix ; memories ; context]."""
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
