"""The objective: weighted mean cross-entropy of the next token, and z-loss where configured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from m3jax.data.batch import Batch
from m3jax.memory.reader import Dequantize
from m3jax.mesh import ACTIVATIONS, BATCH_AXES, HostRows, on_devices, to_global
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model


class Sums(NamedTuple):
    """Sums over tokens, float32 scalars; sums of parts add up to those of the whole batch."""

    loss: Float[Array, ""]  # weight · cross-entropy, nats
    weight: Float[Array, ""]
    correct: Float[Array, ""]  # weight of tokens whose target is the most probable


def objective(
    model: Model,
    params: Params,
    batch: Batch,
    sparsify: Callable | None,
    dequantize: Dequantize | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """Returns the sum that is minimised, and the reported sums, which have no gradient.

    They are of a batch, on a mesh of a device's rows. What is minimised is the loss, and with
    `train.z_loss` that term.

    Args:
      model: the model.
      params: its parameters.
      batch: with memory, or reference tokens, or neither.
      sparsify: `memory.sparsify.sparsifier(config.memory)`; needed with `reference_tokens`.
      dequantize: of stored memories (`Codec.dequantize`); None if they are plain.
    """
    hidden = hidden_of(model, params, batch, sparsify, dequantize)
    weights = batch.weights.astype(jnp.float32)
    total, loss, correct = model.summed_loss(params, hidden, batch.targets, weights)
    return total, Sums(loss, jnp.sum(weights), correct)


def hidden_of(
    model: Model,
    params: Params,
    batch: Batch,
    sparsify: Callable | None,
    dequantize: Dequantize | None = None,
) -> Float[Array, "B T D"]:
    """Computes hidden states of a batch before the final norm; arguments as in `objective`."""
    memory = batch.memory
    if memory is not None and dequantize is not None:
        memory = dequantize(memory)
    return model.hidden(
        params,
        batch.tokens,
        memory=memory,
        reference_tokens=batch.reference_tokens,
        sparsify=sparsify,
        packing=batch.packing,
    )


def place_batch(mesh: Mesh, batch: Batch, rows: HostRows) -> Batch:
    """Makes a global batch for the step from the rows that this process loaded."""
    batch = batch.for_step()
    return to_global(mesh, batch, rows, batch.row_axes())


def batch_specs(batch: Batch) -> Batch:
    """Returns the partition of a batch: rows, and the heads of memories."""
    rows: Any = ACTIVATIONS.spec(("batch",))
    slots: Any = ACTIVATIONS.spec((None, "batch", None, None, "kv_heads"))
    specs = jax.tree.map(lambda _: rows, batch)
    if batch.memory is None:
        return specs
    return specs._replace(memory=ExplicitMemory(slots, slots, rows))


def global_sums(
    model: Model, sparsify: Callable | None, dequantize: Dequantize | None = None
) -> Callable[[Params, Batch], Sums]:
    """Returns `sums(params, batch)`: the reported sums of a global batch, on the model's mesh."""

    def total(params: Params, batch: Batch) -> Sums:
        def local(params: Params, batch: Batch) -> Sums:
            return over_rows(model, objective(model, params, batch, sparsify, dequantize)[1])

        specs = (model.specs(), batch_specs(batch))
        return on_devices(model.mesh, local, specs, PartitionSpec())(params, batch)

    return total


def over_rows(model: Model, total: Sums) -> Sums:
    """Adds up the sums of the rows of all devices."""
    return jax.tree.map(lambda x: model.parallel.sum(x, *BATCH_AXES), total)


def loss(
    model: Model, params: Params, batch: Batch, sparsify: Callable | None = None
) -> tuple[Float[Array, ""], Sums]:
    """Returns the minimised mean over the weights, in nats a token, and the sums to report.

    Arguments as in `objective`. A batch without weight has loss 0.
    """
    minimised, total = objective(model, params, batch, sparsify)
    return mean(minimised, total.weight), total


def mean(total: Float[Array, ""], weight: Float[Array, ""]) -> Float[Array, ""]:
    """Returns total / weight, 0 where there is no weight."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)
