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

from m3jax.model.layer import EncodedReferences
from m3jax.model.transformer import KEPT_TOKENS

RECONSTRUCTION = "reconstruction"


class Written(NamedTuple):
    """Holds the memories of one layer for R references; slots from `length` on are zeros.

    So are the slots of a head from its own count on.
    """

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
      There is no causal mask. Padding is neither query i nor key j.

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


def received_weights(encoded: EncodedReferences) -> Float[Array, "R K W"]:
    """Computes w[j] = ‖v_j‖ · Σ_i softmax_j(q_i · k_j / √H) with RoPE (Adnan et al., 2403.09054).

    The queries i are those of the reference's own tokens, turned to the positions of a context,
    behind the longest reference: what a text that goes on from the reference would look at. Returns
    float32, −inf for padding.
    """
    usable_RW = encoded.usable_RW
    W = usable_RW.shape[1]
    k, v = encoded.heads.k[:, :W], encoded.heads.v[:, :W]
    weights_RKW = token_weights(encoded.behind_q, k, usable_RW, "exact")
    weights_RKW = weights_RKW * jnp.linalg.norm(v.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    return jnp.where(usable_RW[:, None, :], weights_RKW, -jnp.inf)


def reconstruction_weights(encoded: EncodedReferences) -> Float[Array, "R K W"]:
    """Computes the largest attention that any query of a copy pays to each token of its reference.

    The copy stands behind the reference and attends to the prefix, the reference and itself, with
    RoPE: w[j] = max_i softmax_j(q_i · k_j / √H), the maximum also over the G query heads (KVzip,
    arXiv 2505.23416). Returns float32, −inf for padding.
    """
    heads, usable_RW = encoded.heads, encoded.usable_RW
    W = usable_RW.shape[1]
    length_R = jnp.sum(usable_RW, axis=1)
    place_RW = length_R[:, None] + jnp.arange(W)[None]  # of the copy's tokens
    q_RWKGH = jnp.take_along_axis(heads.q, place_RW[..., None, None, None], axis=1)
    seen_RWJ = jnp.arange(2 * W)[None, None] <= place_RW[..., None]
    keys = heads.k
    if encoded.prefix is not None:
        prefix = jnp.broadcast_to(
            encoded.prefix.keys[None].astype(keys.dtype),
            (len(keys), *encoded.prefix.keys.shape),
        )
        keys = jnp.concatenate([keys, prefix], axis=1)
        always = jnp.ones((*seen_RWJ.shape[:2], prefix.shape[1]), bool)
        seen_RWJ = jnp.concatenate([seen_RWJ, always], axis=-1)
    scores = jnp.einsum("RIKGH,RJKH->RKGIJ", q_RWKGH, keys, preferred_element_type=jnp.float32)
    scores = scores * (q_RWKGH.shape[-1] ** -0.5)
    scores = jnp.where(seen_RWJ[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)[..., :W]
    weights = jnp.where(usable_RW[:, None, None, :, None], weights, 0.0)  # queries of the copy
    return jnp.where(usable_RW[:, None, :], jnp.max(weights, axis=(2, 3)), -jnp.inf)


def _ranks(weights_RKW: Float[Array, "R K W"]) -> Int[Array, "R K W"]:
    """Counts for every token those with a larger weight; of equal weights the earlier comes first.

    By W² comparisons instead of a sort, because sorts of many short rows compile and run slowly on
    TPUs.
    """
    token_W = jnp.arange(weights_RKW.shape[-1])
    earlier_WW = (token_W[:, None] < token_W[None, :])[None, None]
    other, own = weights_RKW[..., :, None], weights_RKW[..., None, :]
    return jnp.sum((other > own) | ((other == own) & earlier_WW), axis=-2)


def select(
    encoded: EncodedReferences, selection: str, each: int = 0
) -> tuple[Int[Array, "R K P"], Int[Array, R]]:
    """Selects the tokens with the largest weights for each key-value head, n_k of them.

    Args:
      encoded: queries, keys and values of the references; n_k is `counts_K`, or the number of
        slots.
      selection: `exact` or `approximate` (`token_weights`, before RoPE), `received`
        (`received_weights`) or `reconstruction` (`reconstruction_weights`).
      each: with `reconstruction`, tokens of each head that `received` selects; the remaining n_k −
        `each` are those of the others that the copy looks at most.

    Returns:
      Indices into the reference, ascending, with 0 in the slots that are not filled; and the length
      of each memory: min(P, usable tokens).
    """
    usable_RW, P = encoded.usable_RW, encoded.slots
    W = usable_RW.shape[1]
    encoded = encoded._replace(
        heads=jax.lax.stop_gradient(encoded.heads),
        behind_q=jax.lax.stop_gradient(encoded.behind_q),
        prefix=jax.lax.stop_gradient(encoded.prefix),
    )
    counts = jnp.full((1,), P) if encoded.counts_K is None else encoded.counts_K
    counts_1K1 = counts[None, :, None]
    usable_R1W = usable_RW[:, None]
    if selection == RECONSTRUCTION:
        weights_RKW = reconstruction_weights(encoded)
        chosen_RKW = jnp.zeros(weights_RKW.shape, bool)
        if each:
            rank_RKW = _ranks(received_weights(encoded))
            chosen_RKW = (rank_RKW < jnp.minimum(counts_1K1, each)) & usable_R1W
            weights_RKW = jnp.where(chosen_RKW, -jnp.inf, weights_RKW)
        more = (_ranks(weights_RKW) < counts_1K1 - each) & ~chosen_RKW & usable_R1W
        chosen_RKW = chosen_RKW | more
    else:
        plain = encoded.heads.plain_q[:, :W], encoded.heads.plain_k[:, :W]
        weights_RKW = (
            received_weights(encoded)
            if selection == "received"
            else token_weights(*plain, usable_RW, selection)
        )
        chosen_RKW = (_ranks(weights_RKW) < counts_1K1) & usable_R1W
    token_W = jnp.arange(W)
    earlier_WW = (token_W[:, None] < token_W[None, :])[None, None]
    slot_RKW = jnp.sum(chosen_RKW[..., :, None] & earlier_WW, axis=-2)
    slots = jnp.arange(P)[None, None, :, None]
    at_RKPW = chosen_RKW[..., None, :] & (slot_RKW[..., None, :] == slots)
    indices_RKP = jnp.sum(jnp.where(at_RKPW, token_W[None, None, None], 0), axis=-1)
    length_R = jnp.minimum(P, jnp.sum(usable_RW, axis=-1))
    return indices_RKP.astype(jnp.int32), length_R.astype(jnp.int32)


def sparsify(
    encoded: EncodedReferences, *, selection: str, each: int = 0, key_scale: float = 1.0
) -> Written:
    """Writes one layer's explicit memories of a batch of references.

    `key_scale` multiplies the stored keys of memory heads, those that keep more than 2 · `each`
    tokens, and so the scores of what reads them; other arguments as in `select`.
    """
    indices_RKP, length_R = select(encoded, selection, each)
    indices_RKP = checkpoint_name(indices_RKP, KEPT_TOKENS)
    slot_P = jnp.arange(encoded.slots)
    real_RKP = (slot_P[None] < length_R[:, None])[:, None]
    if encoded.counts_K is not None:
        real_RKP = real_RKP & (slot_P[None] < encoded.counts_K[:, None])[None]
    W = encoded.usable_RW.shape[1]
    token_W = jnp.arange(W)[None, None, None]
    at_RKPW = (indices_RKP[..., None] == token_W) & real_RKP[..., None]

    def gather(x_RWKH: Array) -> Array:
        # A product with one-hot rows is exact, and so is its transpose in the gradient.
        x_RWKH = x_RWKH[:, :W]
        return jnp.einsum(
            "RKPW,RWKH->RKPH", at_RKPW.astype(x_RWKH.dtype), x_RWKH, precision="highest"
        )

    heads = encoded.heads  # keys are stored after RoPE
    keys = gather(heads.k)
    if key_scale != 1:
        counts = jnp.full((1,), encoded.slots) if encoded.counts_K is None else encoded.counts_K
        factor_K = jnp.where(counts > 2 * each, key_scale, 1.0).astype(keys.dtype)
        keys = keys * factor_K[None, :, None, None]
    return Written(keys, gather(heads.v), length_R, indices_RKP)


def sparsifier(memory: ConfigDict) -> Callable[[EncodedReferences], Written]:
    """Returns `sparsify` with the options of the config section `memory`."""
    options = {"each": memory.each, "key_scale": memory.key_scale}
    return functools.partial(sparsify, selection=memory.selection, **options)
