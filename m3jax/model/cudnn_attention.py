"""Attention on GPU by the cuDNN kernel behind `jax.nn.dot_product_attention`.

Written to the documented limits of the kernel. Tests compare the same call without the kernel
(`xla`) with the `naive` implementation; the speed of the kernel has not been measured.

A causal mask costs cuDNN nothing. Any other mask is a bias as large as all scores of one head,
which it reads for every head, without skipping hidden blocks, and whose unused gradient it writes.
Without memories and packing the causal mask is therefore used, also with a prefix: p dummy queries
in front of the row, whose outputs are dropped, let every token see the p keys of the prefix.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from m3jax.model.attention_mask import Scope, concatenate, visible_mask


def fused_attend(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scope: Scope,
    implementation: str = "cudnn",
) -> Float[Array, "B T K G H"]:
    """Computes `attend` by one call of `jax.nn.dot_product_attention`.

    Args:
      q_BTKGH, k_BTKH, v_BTKH: as in `attend`.
      scope: as in `attend`, without `sight`. With memories and `counts` the mask is as large as the
        scores of all heads.
      implementation: `cudnn`, or `xla` for the same call on any platform, which materializes all
        scores.

    Raises:
      ValueError: `implementation` is `cudnn`, which does not take the dtype or the head dim.
    """
    B, T, K, G, H = q_BTKGH.shape
    refusal = cudnn_refusal(q_BTKGH.dtype, H)
    if implementation == "cudnn" and refusal:
        raise ValueError(refusal)
    keys, values = concatenate(k_BTKH, v_BTKH, scope.prefix, scope.memory)
    q_BTNH = q_BTKGH.reshape(B, T, K * G, H)
    options: dict[str, Any]
    if scope.memory is None and scope.packing is None:
        front = keys.shape[1] - T
        q_BTNH = jnp.pad(q_BTNH, ((0, 0), (front, 0), (0, 0), (0, 0)))
        options, kept = {"is_causal": True}, slice(front, None)
    else:
        mask = visible_mask(jnp.arange(T), T, scope)
        if mask.shape[1] > 1:
            mask = jnp.repeat(mask, G, axis=1)
        # With a mask, cuDNN's gradient needs even lengths: pad by a query and a key, hidden below.
        q_BTNH, keys, values = _even(q_BTNH), _even(keys), _even(values)
        rows, columns = (x.shape[1] - n for x, n in ((q_BTNH, T), (keys, mask.shape[-1])))
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, rows), (0, columns)))
        options, kept = {"mask": mask}, slice(T)
    options["implementation"] = implementation
    out = jax.nn.dot_product_attention(q_BTNH, keys, values, **options)
    return out[:, kept].reshape(B, T, K, G, H)


def _even(x_BSKH: Array) -> Array:
    return jnp.pad(x_BSKH, ((0, 0), (0, x_BSKH.shape[1] % 2), (0, 0), (0, 0)))


def cudnn_refusal(dtype: DTypeLike, H: int) -> str | None:
    """Returns the reason why cuDNN does not take this dtype or head dim H; None if it does."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return (
            f"attention 'cudnn' takes bfloat16 or float16, not {dtype}; set"
            " model.compute_dtype = 'bfloat16', or model.attention = 'blocked'"
        )
    if H % 8 or H > 128:
        return (
            f"attention 'cudnn' takes a head dim that is a multiple of 8 up to 128, not {H};"
            " set model.attention = 'blocked'"
        )
    return None
