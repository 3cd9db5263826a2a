"""Losses of a model in which single heads see less; the mask is an argument of the program."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m3jax.data.batch import Batch
from m3jax.model.attention_mask import ShortSight
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model


def masked_losses(
    model: Model, hide: str, window: int, dequantize: Callable | None = None
) -> Callable[[Params, Batch, Int[Array, "n 3"]], Float[Array, "n+1 B"]]:
    """Returns a program of the summed loss of every row: of the model, and with each head masked.

    Args:
      model: on one device, its attention `naive` or `blocked`.
      hide, window: as in `heads.score_heads`.
      dequantize: of the memories that the bank stores; None: they are stored as they are.

    Returns:
      `(params, batch, candidates)`: of a candidate layer, key-value head and query head of its
      group, −1 for all.
    """
    shape, (low, high) = model.config, model.ranges["memory"]
    L, K, G = shape.layers, shape.kv_heads, shape.query_heads // shape.kv_heads
    reading_LK = (
        jnp.ones((high - low, K), bool) if model.memory_heads is None else model.memory_heads
    )

    def losses(params: Params, batch: Batch, candidates: Array) -> Array:
        memory = batch.memory if hide == "memory" else None
        if memory is not None and dequantize is not None:
            memory = dequantize(memory)

        def loss(candidate: Array) -> Array:
            layer, head, group = candidate
            masked_LKG = (
                (jnp.arange(L)[:, None, None] == layer)
                & (jnp.arange(K)[None, :, None] == head)
                & ((jnp.arange(G)[None, None] == group) | (group < 0))
            )
            if hide == "memory":
                reading = reading_LK & ~masked_LKG[low:high].any(axis=-1)
                hidden = model.hidden(params, batch.tokens, memory, memory_heads=reading)
            else:
                sight = ShortSight(masked_LKG, window)
                hidden = model.hidden(params, batch.tokens, sight=sight)
            of_tokens = model.token_losses(params, hidden, batch.targets)
            return jnp.sum(of_tokens * batch.weights.astype(jnp.float32), axis=1)

        nobody = jnp.full((1, 3), L, jnp.int32)
        return jax.lax.map(loss, jnp.concatenate([nobody, candidates]))

    return losses
