"""One attention for every path: keys are [prefix ; memories ; context], in one softmax.

A query of chunk c sees the whole prefix, the memories of chunks c − window + 1 … c and the context
up to itself (Memory³ §3.4). Training with shared references is window 5 and one memory a chunk; a
prompt whose chunks have five memories of their own is window 1 and M = 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from m3jax.model.attention_mask import ExplicitMemory as ExplicitMemory
from m3jax.model.attention_mask import KeyValues as KeyValues
from m3jax.model.attention_mask import Packing as Packing
from m3jax.model.attention_mask import (
    ShortSight,
    concatenate,
    hidden_by_sight,
    seen_by_heads,
    visible_mask,
)
from m3jax.model.attention_mask import memory_mask as memory_mask
from m3jax.model.cudnn_attention import fused_attend
from m3jax.model.splash import splash_attend
from m3jax.model.splash_mask import PACKED_TOKENS

MASKED = -1e30  # a finite score: rows are never empty, since a token always sees itself

IMPLEMENTATIONS = ("naive", "blocked", "splash", "splash_interpret", "cudnn", "xla")


def resolve(name: str, platform: str, dtype: DTypeLike, head_dim: int, packed: int = 0) -> str:
    """The implementation that `auto` stands for; any other name is returned as it is.

    Asked once, while a step is built: `splash` on TPU, `cudnn` on an NVIDIA GPU where its kernel
    takes the dtype and the head dim, else `blocked`.

    Args:
      name: `config.model.attention`.
      platform: `platform` of the devices that will run the step: tpu, gpu, cuda, rocm, cpu.
      dtype: dtype of queries, keys and values, `config.model.compute_dtype`.
      head_dim: `config.model.head_dim`.
      packed: tokens of a row that holds several texts; 0: rows of one text.
    """
    if name != "auto":
        return name
    if platform == "tpu":
        return "splash" if packed <= PACKED_TOKENS else "blocked"
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if platform in ("gpu", "cuda") and half and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "blocked"


def attend(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    prefix: KeyValues | None = None,
    memory: ExplicitMemory | None = None,
    packing: Packing | None = None,
    *,
    chunk_length: int = 64,
    window: int = 1,
    implementation: str = "naive",
    block: int = 256,
    kv_block: int = 256,
    heads: Bool[Array, " K"] | None = None,
    sight: ShortSight | None = None,
) -> Float[Array, "B T K G H"]:
    """Causal attention that also reads a prefix and explicit memories, in one softmax.

    Args:
      q_BTKGH, k_BTKH, v_BTKH: queries, keys (RoPE applied) and values of the context.
      prefix: keys and values in front of every row.
      memory: memories of one layer, `(B, C, M, K, P, H)` and length `(B, C, M)`, C·chunk_length ≥
        T; with `packing` as many chunks as the texts of a row have.
      packing: several texts in a row, each of which sees itself and its memories only; None: one.
      chunk_length: tokens Q of a chunk.
      window: chunks whose memories a query reads, its own included.
      implementation: `naive` holds all scores; `blocked` works on `block` queries at a time, never
        computes scores that the mask hides behind them, and recomputes them for the gradient;
        `splash` is the TPU kernel (`splash_attend`), `splash_interpret` the same anywhere, slowly;
        `cudnn` is the kernel for NVIDIA GPUs, `xla` the same call without it (`fused_attend`).
      block: queries a block, tokens; of `blocked` and `splash`.
      kv_block: keys a block of `splash`.
      heads: which key-value heads read memories (Memory³ §7); None: all.
      sight: query heads that see little of the context; `naive` and `blocked` only.

    Returns:
      Attention output, before the output projection, dtype of the values.

    Raises:
      ValueError: the implementation is unknown, or cannot take these arrays.
    """
    if implementation == "naive":
        return _attend_block(
            *(0, chunk_length, window, q_BTKGH, k_BTKH, v_BTKH, prefix, memory),
            packing=packing,
            heads=heads,
            sight=sight,
        )
    function: Callable[..., Array]
    options: dict[str, Any] = {"chunk_length": chunk_length, "window": window, "heads": heads}
    if implementation == "blocked":
        options |= {"block": block, "packing": packing, "sight": sight}
        function = _blocked_attend
    elif sight is not None:
        raise ValueError(f"implementation {implementation!r} takes no `sight`; take 'blocked'")
    elif implementation in ("splash", "splash_interpret"):
        interpret = implementation == "splash_interpret"
        blocks = {"block": block, "kv_block": kv_block, "interpret": interpret}
        options["packing"] = packing
        function, options = splash_attend, {**options, **blocks}
    elif implementation in ("cudnn", "xla"):
        options |= {"implementation": implementation, "packing": packing}
        function = fused_attend
    else:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"attention implementation {implementation!r}; known: {known}")
    return function(q_BTKGH, k_BTKH, v_BTKH, prefix, memory, **options)


def _blocked_attend(
    q_BTKGH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    prefix: KeyValues | None,
    memory: ExplicitMemory | None,
    *,
    chunk_length: int,
    window: int,
    block: int,
    packing: Packing | None,
    heads: Array | None,
    sight: ShortSight | None,
) -> Array:
    T = q_BTKGH.shape[1]
    outputs = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        low, high = 0, None  # a packed row's chunks are where its texts are
        if packing is None:
            low = max(0, start // chunk_length - window + 1)
            high = (stop - 1) // chunk_length + 1
        part = None if memory is None else jax.tree.map(lambda x, a=low, b=high: x[:, a:b], memory)

        def body(
            q: Array,
            k: Array,
            v: Array,
            prefix: KeyValues | None,
            part: ExplicitMemory | None,
            packing: Packing | None,
            heads: Array | None,
            sight: ShortSight | None,
            start: int = start,
            low: int = low,
        ) -> Array:
            chunks = (start, chunk_length, window)
            return _attend_block(*chunks, q, k, v, prefix, part, low, packing, heads, sight)

        outputs.append(
            jax.checkpoint(body)(
                *(q_BTKGH[:, start:stop], k_BTKH[:, :stop], v_BTKH[:, :stop]),
                *(prefix, part, packing, heads, sight),
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
    packing: Packing | None = None,
    heads: Array | None = None,
    sight: ShortSight | None = None,
) -> Array:
    """Attention of the queries `start …` over all keys given; `low` is the first chunk in
    `memory`."""
    weights_BKGTS = attention_weights(
        q_BTKGH, k_BSKH, prefix, memory, start, chunk_length, window, low, packing, heads, sight
    )
    _, values = concatenate(k_BSKH, v_BSKH, prefix, memory)
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
    packing: Packing | None = None,
    heads: Bool[Array, " K"] | None = None,
    sight: ShortSight | None = None,
) -> Float[Array, "B K G T keys"]:
    """Softmax weights in float32, keys in the order [prefix ; memories ; context].

    Args:
      q_BTKGH: queries of the tokens `start …`.
      k_BSKH: context keys of the tokens 0 ….
      prefix, memory, chunk_length, window, packing, heads, sight: as in `attend`.
      start: position in the row of the first query.
      low: chunk of the row that is the first in `memory`.
    """
    T, H, S = q_BTKGH.shape[1], q_BTKGH.shape[-1], k_BSKH.shape[1]
    keys, _ = concatenate(k_BSKH, k_BSKH, prefix, memory)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, keys, preferred_element_type=jnp.float32
    ) * (H**-0.5)
    query_T = start + jnp.arange(T)
    mask_BTS = visible_mask(query_T, S, prefix, memory, chunk_length, window, low, packing)
    mask_BKGTS = seen_by_heads(mask_BTS, heads, prefix, memory)[:, :, None]
    if sight is not None:
        mask_BKGTS = mask_BKGTS & ~hidden_by_sight(sight, query_T, S, mask_BTS.shape[-1])[None]
    scores_BKGTS = jnp.where(mask_BKGTS, scores_BKGTS, MASKED)
    return jax.nn.softmax(scores_BKGTS, axis=-1)
