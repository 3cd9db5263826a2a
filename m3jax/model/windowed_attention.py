"""Attention of references that are encoded with their document context."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m3jax.model.attention import masked_softmax
from m3jax.model.attention_mask import KeyValues, concatenate
from m3jax.model.rope import Rope, rotate


def attend_in_windows(
    q_RWKGH: Float[Array, "R W K G H"],
    k_RWKH: Float[Array, "R W K H"],
    v_RWKH: Float[Array, "R W K H"],
    usable_RW: Bool[Array, "R W"],
    first: Int[Array, "B slots"],
    prefix: KeyValues | None,
    *,
    position: int,
    rope: Rope,
) -> Float[Array, "R W K G H"]:
    """Computes causal attention of every reference to the prefix and to its window.

    A row is `slots` consecutive references of a document, R = B · slots. The window of a reference
    is the reference itself and some references before it in the row. RoPE positions count the
    usable tokens of the window. Slots are processed one by one, so that the largest array of scores
    is `(B, N, W, slots · W)`.

    Args:
      q_RWKGH, k_RWKH: queries and keys before RoPE.
      v_RWKH: values.
      usable_RW: false for padding, which no query attends to.
      first: for every reference, the slot of its row in which its window begins.
      prefix: keys and values in front of every window.
      position: RoPE position of a window's first token.
      rope: base and scaling of RoPE, which a layer may lack.

    Returns:
      Attention output before the output projection, in the dtype of the values.
    """
    (B, slots), (R, W) = first.shape, usable_RW.shape
    lengths = jnp.sum(usable_RW, axis=1).reshape(B, slots)
    before = jnp.cumsum(lengths, axis=1) - lengths
    start_R = (before - jnp.take_along_axis(before, first, axis=1)).reshape(R)
    positions_RW = position + start_R[:, None] + jnp.arange(W)[None]
    q, k = (rotate(x, positions_RW, rope) for x in (q_RWKGH, k_RWKH))
    q, k, v, usable = (x.reshape(B, slots * W, *x.shape[2:]) for x in (q, k, v_RWKH, usable_RW))
    constant = 0 if prefix is None else prefix.keys.shape[0]
    outputs = []
    for slot in range(slots):
        low, high = slot * W, (slot + 1) * W
        key = jnp.arange(high)
        same = key[None] // W >= first[:, slot, None]
        causal = key[None] <= low + jnp.arange(W)[:, None]
        visible = (same & usable[:, :high])[:, None] & causal[None]
        visible = jnp.pad(visible, ((0, 0), (0, 0), (constant, 0)), constant_values=True)
        keys, values = concatenate(k[:, :high], v[:, :high], prefix, None)
        scores = jnp.einsum(
            "BTKGH,BSKH->BKGTS", q[:, low:high], keys, preferred_element_type=jnp.float32
        )
        weights = masked_softmax(scores, visible[:, None, None], q.shape[-1])
        outputs.append(jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(values.dtype), values))
    return jnp.stack(outputs, axis=1).reshape(q_RWKGH.shape)
