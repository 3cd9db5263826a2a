"""Both ends of the model at the vocabulary: the embedding look-up, and the loss of the LM head.

The tables are the largest matrices of the model, and logits its largest activation. On a mesh both
ends run under `shard_map`: the table of a device is gathered once, its gradient is added up on the
device and leaves it in one reduce-scatter. Gradients of the loss are computed together with it,
block by block, so that no logits are kept and none are computed twice.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from m3jax.mesh import ACTIVATIONS, BATCH_AXES, PARAMETERS

_REPLICAS = tuple(axis for axis in BATCH_AXES if axis != "fsdp")


def lookup(
    table_VD: Float[Array, "V D"],
    tokens: Int[Array, "rows length"],
    *,
    mesh: Mesh | None,
    dtype: Any,
    reduce_dtype: Any,
) -> Float[Array, "rows length D"]:
    """Rows of the embedding, `dtype`.

    Args:
      table_VD: the embedding, split like a parameter.
      tokens: rows split like a batch.
      mesh: the mesh, or None.
      dtype: of the result.
      reduce_dtype: in which devices add up the table's gradient.
    """
    if mesh is None or mesh.size == 1:
        return table_VD.astype(dtype)[tokens]
    table, batch = PARAMETERS.spec(("vocabulary", "embed")), ACTIVATIONS.spec(("batch", None))
    over = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

    @functools.partial(over, in_specs=(table, batch), out_specs=batch)
    def forward(part: Array, tokens: Array) -> Array:
        rows, here = _own_rows(tokens, part.shape[0])
        found = _whole(part, dtype)[rows]
        return jax.lax.psum(jnp.where(here[..., None], found, 0), "tensor")

    @functools.partial(over, in_specs=(table, batch, batch), out_specs=table)
    def backward(part: Array, tokens: Array, gradient: Array) -> Array:
        rows, here = _own_rows(tokens, part.shape[0])
        gradient = jnp.where(here[..., None], gradient.astype(jnp.float32), 0)
        whole = jnp.zeros((part.shape[0], gradient.shape[-1]), jnp.float32)
        return _reduced(whole.at[rows].add(gradient), reduce_dtype, part.dtype)

    @jax.custom_vjp
    def find(table: Array, tokens: Array) -> Array:
        return forward(table, tokens)

    find.defvjp(
        lambda table, tokens: (forward(table, tokens), (table, tokens)),
        lambda kept, gradient: (backward(*kept, gradient), None),
    )
    return find(table_VD, tokens)


def cross_entropy(
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    mesh: Mesh | None,
    block: int,
    reduce_dtype: Any,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over tokens of weight · cross-entropy (nats), and of the weights of right predictions.

    Args:
      x_BTD: normed hidden states; products are made in their dtype, with float32 results.
      table_VD: the LM head.
      targets_BT, weights_BT: next tokens and their weights (float32).
      mesh: the mesh, or None.
      block: tokens of a row whose logits exist at a time; the largest divisor of T up to it is
        used.
      reduce_dtype: in which devices add up the table's gradient.
    """
    T = x_BTD.shape[1]
    block = next(size for size in range(min(block, T), 0, -1) if T % size == 0)
    run = functools.partial(_on_device, block=block, reduce_dtype=reduce_dtype)
    batch = ACTIVATIONS.spec(("batch",))
    table, scalar = PARAMETERS.spec(("vocabulary", "embed")), PartitionSpec()

    def sums(*arguments: Array, gradient: bool) -> Any:
        if mesh is None or mesh.size == 1:
            return run(*arguments, sharded=False, gradient=gradient)
        return jax.shard_map(
            functools.partial(run, sharded=True, gradient=gradient),
            mesh=mesh,
            in_specs=(batch, table, batch, batch),
            out_specs=((scalar, scalar), (batch, table) if gradient else None),
            check_vma=False,
        )(*arguments)

    @jax.custom_vjp
    def total(x: Array, table: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
        return sums(x, table, targets, weights, gradient=False)[0]

    def backward(kept: tuple[Array, Array], cotangent: tuple[Array, Array]) -> tuple:
        scaled = (gradient * cotangent[0].astype(gradient.dtype) for gradient in kept)
        return (*scaled, None, None)

    total.defvjp(lambda *arguments: sums(*arguments, gradient=True), backward)
    return total(x_BTD, table_VD, targets_BT, weights_BT)


def _on_device(
    x: Array,
    part: Array,
    targets: Array,
    weights: Array,
    *,
    block: int,
    reduce_dtype: Any,
    sharded: bool,
    gradient: bool,
) -> Any:
    """Sums over all devices, and (with `gradient`) gradients of the loss for `x` and `part`."""
    table = _whole(part, x.dtype) if sharded else part.astype(x.dtype)
    over = functools.partial(_over, sharded=sharded)
    V, length = table.shape[0], x.shape[1]
    blocks = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(a.shape[0], length // block, block, *a.shape[2:]), 1, 0),
        (x, targets, weights.astype(jnp.float32)),
    )

    def one(carry: Any, inputs: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        x, targets, weights = inputs
        logits = jnp.einsum("BQD,VD->BQV", x, table, preferred_element_type=jnp.float32)
        rows, here = _own_rows(targets, V) if sharded else (targets, jnp.ones_like(targets, bool))
        largest = over(jax.lax.pmax, jnp.max(logits, axis=-1))
        total = over(jax.lax.psum, jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
        normalizer = largest + jnp.log(total)
        scored = jnp.take_along_axis(logits, rows[..., None], axis=-1)[..., 0]
        scored = over(jax.lax.psum, jnp.where(here, scored, 0.0))
        # The first of equal logits is the prediction; on no device before it may be an equal one.
        first = jnp.argmax(logits, axis=-1) + (jax.lax.axis_index("tensor") * V if sharded else 0)
        best = jnp.max(logits, axis=-1) == largest
        first = over(jax.lax.pmin, jnp.where(best, first, jnp.iinfo(jnp.int32).max))
        loss = carry[0] + jnp.sum(weights * (normalizer - scored))
        correct = carry[1] + jnp.sum(weights * (first == targets))
        if not gradient:
            return (loss, correct), None
        share = jnp.exp(logits - normalizer[..., None])
        hit = (jnp.arange(V)[None, None] == rows[..., None]) & here[..., None]
        error = ((share - hit) * weights[..., None]).astype(x.dtype)
        table_gradient = carry[2] + jnp.einsum(
            "BQV,BQD->VD", error, x, preferred_element_type=jnp.float32
        )
        back = jnp.einsum("BQV,VD->BQD", error, table, preferred_element_type=jnp.float32)
        return (loss, correct, table_gradient), over(jax.lax.psum, back).astype(x.dtype)

    zero = jnp.zeros((), jnp.float32)
    start: Any = (zero, zero, jnp.zeros(table.shape, jnp.float32)) if gradient else (zero, zero)
    carry, x_gradient = jax.lax.scan(one, start, blocks)
    loss, correct = (jax.lax.psum(x, BATCH_AXES) if sharded else x for x in carry[:2])
    sums = (loss, correct)
    if not gradient:
        return sums, None
    x_gradient = jnp.moveaxis(x_gradient, 0, 1).reshape(x.shape)
    if sharded:
        return sums, (x_gradient, _reduced(carry[2], reduce_dtype, part.dtype))
    return sums, (x_gradient, carry[2].astype(part.dtype))


def _over(collective: Any, value: Array, sharded: bool) -> Array:
    """A collective over the devices that share the vocabulary."""
    return collective(value, "tensor") if sharded else value


def _whole(part: Array, dtype: Any) -> Array:
    """A device's rows of the table at full width."""
    return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=1, tiled=True)


def _own_rows(tokens: Array, rows: int) -> tuple[Array, Array]:
    """Row of this device's part of the table for every token, and whether it is there at all."""
    local = tokens - jax.lax.axis_index("tensor") * rows
    here = (local >= 0) & (local < rows)
    return jnp.where(here, local, 0), here


def _reduced(gradient: Array, reduce_dtype: Any, dtype: Any) -> Array:
    """A table's gradient, summed over all batch shards and split over `fsdp`."""
    gradient = gradient.astype(reduce_dtype)
    gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=1, tiled=True)
    return jax.lax.psum(gradient, _REPLICAS).astype(dtype)
