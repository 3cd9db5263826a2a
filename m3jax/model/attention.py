"""Attention over keys in the order [prefix ; memories ; context], in one softmax.

A query of chunk c sees the whole prefix, the memories of chunks c − window + 1 … c and the context
up to itself (Memory³ §3.4). In training, chunks share references: window 5, one memory per chunk.
In prompts, every chunk has five memories of its own: window 1, M = 5.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from m3jax.model.attention_mask import Scope, concatenate, hidden_by_sight, visible_mask
from m3jax.model.cudnn_attention import cudnn_refusal, fused_attend
from m3jax.model.splash import splash_attend
from m3jax.model.splash_mask import PACKED_TOKENS

CONTEXT = Scope()  # neither prefix nor memories

IMPLEMENTATIONS = ("naive", "blocked", "splash", "splash_interpret", "cudnn", "xla")


def resolve(name: str, platform: str, dtype: DTypeLike, head_dim: int, packed: int = 0) -> str:
    """Returns the implementation that `auto` stands for; returns any other name unchanged.

    It is `splash` on TPU, unless packed rows are longer than its kernel allows (`PACKED_TOKENS`),
    `cudnn` on an NVIDIA GPU if its kernel takes the dtype and the head dim, otherwise `blocked`.

    Args:
      name: `config.model.attention`.
      platform: `platform` of the devices that will run the step: tpu, gpu, cuda, rocm, cpu.
      dtype: dtype of queries, keys and values, `config.model.compute_dtype`.
      head_dim: `config.model.head_dim`.
      packed: length in tokens of rows that hold several texts; 0 if a row is one text.
    """
    if name != "auto":
        return name
    if platform == "tpu":
        return "splash" if packed <= PACKED_TOKENS else "blocked"
    cudnn = platform in ("gpu", "cuda") and cudnn_refusal(dtype, head_dim) is None
    return "cudnn" if cudnn else "blocked"


def attend(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scope: Scope = CONTEXT,
    *,
    implementation: str = "naive",
    block: int = 256,
    kv_block: int = 256,
) -> Float[Array, "B T K G H"]:
    """Computes causal attention that also reads a prefix and explicit memories, in one softmax.

    Args:
      q_BTKGH, k_BTKH, v_BTKH: queries and keys (both with RoPE applied) and values of the context.
      scope: prefix, memories and masks. Only `naive` and `blocked` support `scope.sight`.
      implementation: `naive` materializes all scores; `blocked` works on `block` queries at a time,
        skips the keys after the block, and recomputes scores for the gradient; `splash` is the TPU
        kernel (`splash_attend`), `splash_interpret` the same kernel on any platform, slowly;
        `cudnn` is the kernel for NVIDIA GPUs, `xla` the same call without it (`fused_attend`).
      block: query tokens per block, for `blocked` and `splash`.
      kv_block: keys per block, for `splash`.

    Returns:
      Attention output before the output projection, in the dtype of the values.

    Raises:
      ValueError: the implementation is unknown, or it does not support `sight`, or cuDNN does not
        take the dtype or the head dim.
      ConfigError: the row is too long for the splash kernel.
    """
    inputs = (q_BTKGH, k_BTKH, v_BTKH, scope)
    if implementation == "naive":
        return _attend_block(0, *inputs)
    if implementation == "blocked":
        return _blocked_attend(*inputs, block)
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"attention implementation {implementation!r}; known: {known}")
    if scope.sight is not None:
        raise ValueError(f"implementation {implementation!r} takes no `sight`; take 'blocked'")
    if implementation in ("cudnn", "xla"):
        return fused_attend(*inputs, implementation)
    return splash_attend(*inputs, block, kv_block, interpret=implementation == "splash_interpret")


def _blocked_attend(
    q_BTKGH: Array, k_BTKH: Array, v_BTKH: Array, scope: Scope, block: int
) -> Array:
    T = q_BTKGH.shape[1]
    outputs = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        part = scope
        if scope.memory is not None and scope.packing is None:  # packed: chunks depend on the row
            low = max(0, start // scope.chunk_length - scope.window + 1)
            chunks = slice(low, (stop - 1) // scope.chunk_length + 1)
            memory = jax.tree.map(lambda x, chunks=chunks: x[:, chunks], scope.memory)
            part = dataclasses.replace(scope, memory=memory, low=low)
        attend_block = jax.checkpoint(functools.partial(_attend_block, start))
        seen = (q_BTKGH[:, start:stop], k_BTKH[:, :stop], v_BTKH[:, :stop])
        outputs.append(attend_block(*seen, part))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _attend_block(start: int, q_BTKGH: Array, k_BSKH: Array, v_BSKH: Array, scope: Scope) -> Array:
    """Computes attention of the queries at positions `start`, `start + 1`, … over all keys."""
    weights_BKGTS = attention_weights(q_BTKGH, k_BSKH, scope, start)
    values = concatenate(k_BSKH, v_BSKH, scope.prefix, scope.memory).values
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), values)


def attention_weights(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    scope: Scope,
    start: int = 0,
) -> Float[Array, "B K G T keys"]:
    """Returns softmax weights in float32, with keys in the order [prefix ; memories ; context].

    Args:
      q_BTKGH: queries of the tokens `start`, `start + 1`, ….
      k_BSKH: context keys of the tokens 0, 1, ….
      scope: prefix, memories and masks.
      start: position of the first query in its row.
    """
    T, H, S = q_BTKGH.shape[1], q_BTKGH.shape[-1], k_BSKH.shape[1]
    keys = concatenate(k_BSKH, k_BSKH, scope.prefix, scope.memory).keys
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, keys, preferred_element_type=jnp.float32
    )
    query_T = start + jnp.arange(T)
    mask_BKGTS = visible_mask(query_T, S, scope)[:, :, None]
    if scope.sight is not None:
        hidden = hidden_by_sight(scope.sight, query_T, S, mask_BKGTS.shape[-1])
        mask_BKGTS = mask_BKGTS & ~hidden[None]
    return masked_softmax(scores_BKGTS, mask_BKGTS, H)


def masked_softmax(
    scores: Float[Array, "*batch S"], mask: Bool[Array, "*broadcast S"], head_dim: int
) -> Float[Array, "*batch S"]:
    """Returns softmax(scores · head_dim^−0.5) in float32; masked keys have weight 0."""
    # A finite score for masked keys is enough: a token always sees itself, so no row is empty.
    return jax.nn.softmax(jnp.where(mask, scores * head_dim**-0.5, -1e30), axis=-1)
