"""Embedding look-up, and loss of the LM head, with the vocabulary split over devices.

Embedding and LM head (tables `(V, D)`) are the largest matrices of the model, logits its largest
activation. A table is gathered over `fsdp` once; its gradient is accumulated on the device and
reduce-scattered once. The gradients of the loss are computed together with the loss, block by
block, so that logits are neither stored nor recomputed. All functions see one device's part
(`collectives.py`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m3jax.model.collectives import Parallel


def lookup(
    parallel: Parallel, table_VD: Float[Array, "V D"], tokens: Int[Array, " n"]
) -> Float[Array, "n D"]:
    """Returns the embeddings of tokens in the compute dtype.

    Args:
      parallel: collectives of the mesh.
      table_VD: this device's rows of the embedding.
      tokens: tokens of all streams on this device, flattened.
    """
    part, dtype = table_VD.shape, table_VD.dtype

    @jax.custom_vjp
    def find(table: Array, tokens: Array) -> Array:
        table = parallel.whole(table, 0)
        rows, owned = _own_rows(parallel, tokens, table.shape[0])
        embedded = table[rows]
        if owned is None:
            return embedded
        return parallel.sum(jnp.where(owned[:, None], embedded, 0), "tensor")

    def backward(tokens: Array, gradient: Array) -> tuple[Array, None]:
        whole = jnp.zeros((part[0] * parallel.size("fsdp"), part[1]), jnp.float32)
        rows, owned = _own_rows(parallel, tokens, whole.shape[0])
        gradient = gradient.astype(jnp.float32)
        if owned is not None:
            gradient = jnp.where(owned[:, None], gradient, 0)
        return parallel.reduce(whole.at[rows].add(gradient), 0, dtype), None

    find.defvjp(lambda table, tokens: (find(table, tokens), tokens), backward)
    return find(table_VD, tokens)


def cross_entropy(
    parallel: Parallel,
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    block: int,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Computes three sums over this device's tokens: Σ weight · (cross-entropy + z_loss · log² Z)
    and Σ weight · cross-entropy, in nats, and Σ weight over correct predictions.

    Z is the softmax normalizer (PaLM, arXiv 2204.02311, §5). Only the first sum has a gradient.

    Args:
      parallel: collectives of the mesh.
      x_BTD: normed hidden states; products are computed in their dtype, with float32 results.
      table_VD: this device's rows of the LM head.
      targets_BT, weights_BT: next tokens and their weights (float32).
      block: maximal number of tokens per row whose logits are computed at a time; the largest
        divisor of T up to it is used.
      z_loss: factor of log² Z.
    """

    @jax.custom_vjp
    def total(*arguments: Array) -> tuple[Array, Array, Array]:
        return _sums(parallel, block, z_loss, False, *arguments)[0]

    def backward(kept: tuple[Array, Array], cotangent: tuple[Array, Array, Array]) -> tuple:
        scaled = (gradient * cotangent[0].astype(gradient.dtype) for gradient in kept)
        return (*scaled, None, None)

    total.defvjp(lambda *arguments: _sums(parallel, block, z_loss, True, *arguments), backward)
    return total(x_BTD, table_VD, targets_BT, weights_BT)


def token_losses(
    parallel: Parallel,
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    block: int,
) -> Float[Array, "B T"]:
    """Returns the cross-entropy of every token in nats, without a gradient."""
    x_BTD, table_VD = jax.lax.stop_gradient((x_BTD, table_VD))
    table = parallel.whole(table_VD, 0)

    def block_losses(inputs: tuple[Array, Array]) -> Array:
        x, targets = inputs
        logits = jnp.einsum("BQD,VD->BQV", x, table, preferred_element_type=jnp.float32)
        normalizer, scored, _, _ = _scores(parallel, logits, targets)
        return normalizer - scored

    losses = jax.lax.map(block_losses, _in_blocks(block, x_BTD, targets_BT))
    return jnp.moveaxis(losses, 0, 1).reshape(targets_BT.shape)


def _in_blocks(block: int, *arrays: Array) -> Any:
    """Splits rows `(B, T, …)` into blocks of tokens, `(T / size, B, size, …)`; the size is the
    largest divisor of T up to `block`."""
    T = arrays[0].shape[1]
    size = next(size for size in range(min(block, T), 0, -1) if T % size == 0)
    parts = (x.reshape(x.shape[0], T // size, size, *x.shape[2:]) for x in arrays)
    return tuple(jnp.moveaxis(x, 1, 0) for x in parts)


def _scores(parallel: Parallel, logits: Array, targets: Array) -> tuple[Array, Array, Array, Array]:
    """Returns log-sum-exp, the target's logit, the most probable token, and a mask over this
    device's vocabulary that is true at the target."""
    V = logits.shape[-1]
    rows, owned = _own_rows(parallel, targets, V)
    predicted, largest = _most_probable(parallel, logits)
    total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    normalizer = largest + jnp.log(parallel.sum(total, "tensor"))
    scored = jnp.take_along_axis(logits, rows[..., None], axis=-1)[..., 0]
    hit = jnp.arange(V)[None, None] == rows[..., None]
    if owned is not None:
        scored = parallel.sum(jnp.where(owned, scored, 0.0), "tensor")
        hit = hit & owned[..., None]
    return normalizer, scored, predicted, hit


def _sums(
    parallel: Parallel,
    block: int,
    z_loss: float,
    gradient: bool,
    x: Array,
    part: Array,
    targets: Array,
    weights: Array,
) -> Any:
    """Returns the sums of `cross_entropy` and, if `gradient`, the gradients of the first with
    respect to `x` and the LM head, else None."""
    table = parallel.whole(part, 0)

    def add_block(carry: Any, inputs: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        x, targets, weights = inputs
        logits = jnp.einsum("BQD,VD->BQV", x, table, preferred_element_type=jnp.float32)
        normalizer, scored, predicted, hit = _scores(parallel, logits, targets)
        loss = carry[0] + jnp.sum(weights * (normalizer - scored))
        correct = carry[1] + jnp.sum(weights * (predicted == targets))
        sums: tuple[Array, ...] = (loss, correct)
        if z_loss:
            sums += (carry[2] + jnp.sum(weights * jnp.square(normalizer)),)
        if not gradient:
            return sums, None
        share = jnp.exp(logits - normalizer[..., None])
        if z_loss:  # d log² Z / d logits = 2 · log Z · softmax
            share = share * (1 + 2 * z_loss * normalizer)[..., None]
        error = ((share - hit) * weights[..., None]).astype(x.dtype)
        table_gradient = carry[-1] + jnp.einsum(
            "BQV,BQD->VD", error, x, preferred_element_type=jnp.float32
        )
        back = jnp.einsum("BQV,VD->BQD", error, table, preferred_element_type=jnp.float32)
        return (*sums, table_gradient), parallel.sum(back, "tensor").astype(x.dtype)

    zero = jnp.zeros((), jnp.float32)
    start: tuple[Array, ...] = (zero,) * (3 if z_loss else 2)
    if gradient:
        start += (jnp.zeros(table.shape, jnp.float32),)
    blocks = _in_blocks(block, x, targets, weights.astype(jnp.float32))
    carry, x_gradient = jax.lax.scan(add_block, start, blocks)
    loss, correct = carry[:2]
    sums = (loss + z_loss * carry[2] if z_loss else loss, loss, correct)
    if not gradient:
        return sums, None
    x_gradient = jnp.moveaxis(x_gradient, 0, 1).reshape(x.shape)
    # The barrier reduces the table's gradient now, so that its full size is not held on the device
    # during the backward pass of the layers.
    return sums, jax.lax.optimization_barrier(
        (x_gradient, parallel.reduce(carry[-1], 0, part.dtype))
    )


def _most_probable(parallel: Parallel, logits: Array) -> tuple[Array, Array]:
    """Returns the token with the largest logit (the lowest such id), and that logit."""
    token, largest = jnp.argmax(logits, axis=-1), jnp.max(logits, axis=-1)
    if not parallel.axes("tensor"):
        return token, largest
    overall = jax.lax.pmax(largest, "tensor")
    token = token + jax.lax.axis_index("tensor") * logits.shape[-1]
    token = jnp.where(largest == overall, token, jnp.iinfo(jnp.int32).max)
    return jax.lax.pmin(token, "tensor"), overall


def _own_rows(parallel: Parallel, tokens: Array, rows: int) -> tuple[Array, Array | None]:
    """Returns the index of every token among the `rows` tokens that this device holds, and a mask
    of the tokens that it holds (None if it holds all); other tokens have index 0."""
    if not parallel.axes("tensor"):
        return tokens, None
    local = tokens - jax.lax.axis_index("tensor") * rows
    owned = (local >= 0) & (local < rows)
    return jnp.where(owned, local, 0), owned
