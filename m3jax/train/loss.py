"""The objective: weighted mean cross-entropy of the next token, and z-loss where configured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from m3jax.data.batch import Batch
from m3jax.memory.reader import Dequantize
from m3jax.mesh import ACTIVATIONS, BATCH_AXES, HostRows, on_devices, to_global
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model


class Sums(NamedTuple):
    """Sums over the tokens of a batch, float32 scalars; sums over its parts can be added."""

    loss: Float[Array, ""]  # weight · cross-entropy, nats
    weight: Float[Array, ""]
    correct: Float[Array, ""]  # weight of tokens whose target is the most probable


class Forward(NamedTuple):
    """Forward pass of a model on batches.

    Attributes:
      model: the model.
      sparsify: `memory.sparsify.sparsifier(config.memory)`; needed with `reference_tokens`.
      dequantize: dequantizes stored memories (`Codec.dequantize`); None if they are plain keys and
        values.
    """

    model: Model
    sparsify: Callable | None = None
    dequantize: Dequantize | None = None

    def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T D"]:
        """Computes the hidden states of a batch that reads its memories, before the final norm."""
        memory = batch.memory
        if memory is not None and self.dequantize is not None:
            memory = self.dequantize(memory)
        return self.model.hidden(
            params,
            batch.tokens,
            memory=memory,
            reference_tokens=batch.reference_tokens,
            sparsify=self.sparsify,
            packing=batch.packing,
        )


def objective(forward: Forward, params: Params, batch: Batch) -> tuple[Float[Array, ""], Sums]:
    """Returns the sum to minimise over a batch, and the sums to report, which have no gradient.

    On a mesh, the batch holds the rows of one device. The minimised sum is the loss plus, if
    `train.z_loss` is set, the z-loss term.
    """
    hidden = forward.hidden(params, batch)
    weights = batch.weights.astype(jnp.float32)
    total, loss, correct = forward.model.summed_loss(params, hidden, batch.targets, weights)
    return total, Sums(loss, jnp.sum(weights), correct)


def place_batch(mesh: Mesh | None, batch: Batch, rows: HostRows) -> Batch:
    """Makes the global batch of a step from the rows that this process loaded."""
    batch = batch.for_step()
    return to_global(mesh, batch, rows, batch.row_axes())


def batch_specs(batch: Batch) -> Batch:
    """Returns the partition specs of a batch: split by rows, memories also by key-value heads."""
    rows: Any = ACTIVATIONS.spec(("batch",))
    slots: Any = ACTIVATIONS.spec((None, "batch", None, None, "kv_heads"))
    specs = jax.tree.map(lambda _: rows, batch)
    if batch.memory is None:
        return specs
    return specs._replace(memory=ExplicitMemory(slots, slots, rows))


def on_rows(model: Model, function: Callable, results: Any) -> Callable[[Params, Batch], Any]:
    """Lifts `function(params, batch)`, written for the rows of one device, to the global batch.

    `results` are the partition specs of its results; see `m3jax.mesh.on_devices`.
    """

    def on_mesh(params: Params, batch: Batch) -> Any:
        specs = (model.specs(), batch_specs(batch))
        return on_devices(model.mesh, function, specs, results)(params, batch)

    return on_mesh


def over_rows(model: Model, total: Sums) -> Sums:
    """Adds up the sums over the rows of all devices; for use inside `on_rows`."""
    return jax.tree.map(lambda x: model.parallel.sum(x, *BATCH_AXES), total)


def mean(total: Float[Array, ""], weight: Float[Array, ""]) -> Float[Array, ""]:
    """Returns total / weight, or 0 if the weight is 0."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)
