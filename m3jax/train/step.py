"""One optimizer step as one pure jitted function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array
from ml_collections import ConfigDict

from m3jax.data.batch import Batch
from m3jax.memory.reader import Dequantize
from m3jax.memory.sparsify import sparsifier
from m3jax.mesh import compiler_options, replicated
from m3jax.model.transformer import Model
from m3jax.train.dpo_loss import objective_of
from m3jax.train.loss import Forward, Sums, mean, on_rows, over_rows
from m3jax.train.optimizer import lr_schedule
from m3jax.train.state import Program, TrainState

Step = Callable[..., tuple[TrainState, dict[str, Array]]]


def make_step(program: Program, dequantize: Dequantize | None = None) -> Step:
    """Makes the step of a stage: `step(state, batch) -> (state, metrics)`, the state donated.

    With `guard.on` it is `step(state, batch, scale)`, where `scale` is a factor on the learning
    rate, a float32 scalar on every device (`scale_on`); a new value does not recompile the step.

    Metrics are float32 scalars: `loss` (nats per token; of preference pairs: nats per pair, see
    `preference_objective`) and `accuracy` of the batch, `mean_loss` and
    `mean_accuracy` over all tokens since the last multiple of `train.log_every`, `gradient_norm`
    before clipping, `learning_rate`, `parameter_norm` before the update.

    Args:
      program: model, optimizer and state.
      dequantize: dequantizes stored memories (`Codec.dequantize`); None if they are plain.
    """
    config, mesh, optimizer = program.config, program.mesh, program.optimizer
    learning_rate, log_every = lr_schedule(config), config.train.log_every
    gradient, guarded = _make_gradient(config, program.model, dequantize), config.guard.on

    def step(state: TrainState, batch: Batch, *scale: Array) -> tuple[TrainState, dict[str, Array]]:
        gradients, total = gradient(state.params, batch)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        rate = jnp.asarray(learning_rate(state.step), jnp.float32)
        if guarded:  # the learning rate is a factor of all updates, weight decay included
            updates, rate = jax.tree.map(lambda x: x * scale[0], updates), rate * scale[0]
        # The first step after a logged line resets the sums.
        kept = (state.step % log_every != 0).astype(jnp.float32)
        window = jax.tree.map(lambda old, new: kept * old + new, state.window, total)
        metrics = {
            "loss": mean(total.loss, total.weight),
            "accuracy": mean(total.correct, total.weight),
            "mean_loss": mean(window.loss, window.weight),
            "mean_accuracy": mean(window.correct, window.weight),
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": rate,
            "parameter_norm": optax.tree.norm(
                jax.tree.map(lambda x: x.astype(jnp.float32), state.params)
            ),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, optimizer_state, state.step + 1, window), metrics

    scales = [replicated(mesh)] if guarded else []
    return jax.jit(
        step,
        in_shardings=(program.shardings, None, *scales),  # a batch comes sharded by `place_batch`
        out_shardings=(program.shardings, replicated(mesh)),
        donate_argnums=(0,),
        compiler_options=compiler_options(mesh),
    )


def scale_on(mesh: Mesh, scale: float) -> Array:
    """Puts a factor on the learning rate on every device of the mesh, as the step takes it."""
    with jax.transfer_guard("allow"):
        return jax.make_array_from_callback(
            (), replicated(mesh), lambda _: np.asarray(scale, np.float32)
        )


def _make_gradient(config: ConfigDict, model: Model, dequantize: Dequantize | None) -> Callable:
    """Makes `gradient(params, batch)`: float32 gradients of the mean loss, and reported sums."""
    parts = config.train.microbatches
    forward = Forward(model, sparsifier(config.memory), dequantize)
    gradient = jax.grad(functools.partial(objective_of(config), forward), has_aux=True)

    def part(params: Any, batch: Any) -> tuple[Any, Sums]:
        gradients, total = gradient(params, batch)
        return jax.tree.map(lambda x: x.astype(jnp.float32), gradients), total

    def microbatch(batch: Batch, number: Array) -> Batch:
        def select(x: Array, axis: int) -> Array:
            shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
            return jax.lax.dynamic_index_in_dim(x.reshape(shape), number, axis + 1, keepdims=False)

        return jax.tree.map(select, batch, batch.row_axes())

    def local(params: Any, batch: Any) -> tuple[Any, Sums]:
        """Computes one device's shards of the gradients, over the rows of all devices."""
        if parts == 1:
            gradients, total = part(params, batch)
        else:

            def body(carry: Any, number: Array) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, part(params, microbatch(batch, number))), None

            zero = jnp.zeros((), jnp.float32)
            start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
            (gradients, total), _ = jax.lax.scan(
                body, (start, Sums(zero, zero, zero)), jnp.arange(parts)
            )
        total = over_rows(model, total)
        # The loss is a mean over the global batch: divide once, by its total weight.
        scale = mean(jnp.ones((), jnp.float32), total.weight)
        return jax.tree.map(lambda x: x * scale, gradients), total

    return on_rows(model, local, (model.specs(), PartitionSpec()))
