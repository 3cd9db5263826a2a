"""Token sparsification: selects the tokens of a reference that its memory keeps (Memory³ §3.3)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from m3jax.model.transformer import KEPT_TOKENS


class Written(NamedTuple):
    """Holds the memories of one layer for R references; slots from `length` on are zeros."""

    keys: Float[Array, "R K P H"]
    values: Float[Array, "R K P H"]
    length: Int[Array, R]
    indices: Int[Array, "R K P"]


def token_weights(
    q_RWKGH: Float[Array, "R W K G H"],
    k_RWKH: Float[Array, "R W K H"],
    usable_RW: Bool[Array, "R W"],
    selection: str,
) -> Float[Array, "R K W"]:
    """Computes the attention w[j] that each token receives inside its reference, summed over heads.

    exact: w[j] = Σ_i softmax_j(q_i · k_j / √H); approximate: w[j] = Σ_i exp(q_i · k_j / √H),
      divided by the largest term of the reference and key-value head, so that it cannot overflow.
      There is no causal mask and no position encoding. Padding is neither query i nor key j.

    Args:
      q_RWKGH, k_RWKH: queries and keys before RoPE; the sum is over the G query heads.
      usable_RW: False for padding (the prefix is never among the W tokens).
      selection: `exact` or `approximate`.

    Returns:
      Weights in float32, −inf for padding.
    """
    scores = jnp.einsum("RIKGH,RJKH->RKGIJ", q_RWKGH, k_RWKH, preferred_element_type=jnp.float32)
    scores = scores * (q_RWKGH.shape[-1] ** -0.5)
    pair = (usable_RW[:, :, None] & usable_RW[:, None, :])[:, None, None]
    scores = jnp.where(pair, scores, -jnp.inf)
    axes = -1 if selection == "exact" else (-3, -2, -1)
    largest = jnp.max(scores, axis=axes, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(largest), largest, 0.0))
    if selection == "exact":
        weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
    weights_RKW = jnp.sum(weights, axis=(2, 3))
    return jnp.where(usable_RW[:, None, :], weights_RKW, -jnp.inf)


def select(
    q_RWKGH: Float[Array, "R W K G H"],
    k_RWKH: Float[Array, "R W K H"],
    usable_RW: Bool[Array, "R W"],
    *,
    kept: int,
    selection: str,
) -> tuple[Int[Array, "R K P"], Int[Array, R]]:
    """Selects the `kept` tokens with the largest weights for each key-value head.

    The rank of a token is counted by W² comparisons instead of a sort, because sorts and gathers of
    many short rows compile and run slowly on TPUs.

    Args:
      q_RWKGH, k_RWKH, usable_RW, selection: as in `token_weights`.
      kept: number P of tokens to keep; of equal weights the earlier token wins.

    Returns:
      Indices into the reference, ascending, with 0 in the slots from the length on; and the length
      of each memory: min(P, usable tokens).
    """
    weights_RKW = token_weights(
        jax.lax.stop_gradient(q_RWKGH), jax.lax.stop_gradient(k_RWKH), usable_RW, selection
    )
    token_W = jnp.arange(weights_RKW.shape[-1])
    earlier_WW = (token_W[:, None] < token_W[None, :])[None, None]
    other, own = weights_RKW[..., :, None], weights_RKW[..., None, :]
    rank_RKW = jnp.sum((other > own) | ((other == own) & earlier_WW), axis=-2)
    chosen_RKW = (rank_RKW < kept) & usable_RW[:, None, :]
    slot_RKW = jnp.sum(chosen_RKW[..., :, None] & earlier_WW, axis=-2)
    slots = jnp.arange(kept)[None, None, :, None]
    at_RKPW = chosen_RKW[..., None, :] & (slot_RKW[..., None, :] == slots)
    indices_RKP = jnp.sum(jnp.where(at_RKPW, token_W[None, None, None], 0), axis=-1)
    length_R = jnp.minimum(kept, jnp.sum(usable_RW, axis=-1))
    return indices_RKP.astype(jnp.int32), length_R.astype(jnp.int32)


def sparsify(
    q_RWKGH: Float[Array, "R W K G H"],
    k_RWKH: Float[Array, "R W K H"],
    rotated_RWKH: Float[Array, "R W K H"],
    v_RWKH: Float[Array, "R W K H"],
    usable_RW: Bool[Array, "R W"],
    *,
    kept: int,
    selection: str,
) -> Written:
    """Writes one layer's explicit memories of a batch of references.

    Args:
      q_RWKGH, k_RWKH: queries and keys before RoPE, which select the tokens to keep.
      rotated_RWKH: keys after RoPE, which are stored.
      v_RWKH: values.
      usable_RW, kept, selection: as in `select`.
    """
    indices_RKP, length_R = select(q_RWKGH, k_RWKH, usable_RW, kept=kept, selection=selection)
    indices_RKP = checkpoint_name(indices_RKP, KEPT_TOKENS)
    real_RP = jnp.arange(kept)[None] < length_R[:, None]

    token_W = jnp.arange(k_RWKH.shape[1])[None, None, None]
    at_RKPW = (indices_RKP[..., None] == token_W) & real_RP[:, None, :, None]

    def gather(x_RWKH: Array) -> Array:
        # A product with one-hot rows is exact, and so is its transpose in the gradient.
        return jnp.einsum(
            "RKPW,RWKH->RKPH", at_RKPW.astype(x_RWKH.dtype), x_RWKH, precision="highest"
        )

    return Written(gather(rotated_RWKH), gather(v_RWKH), length_R, indices_RKP)


def sparsifier(memory: ConfigDict) -> Callable[..., Written]:
    """Returns `sparsify` with number of kept tokens and selection rule of the section `memory`."""
    return functools.partial(sparsify, kept=memory.kept_tokens, selection=memory.selection)
