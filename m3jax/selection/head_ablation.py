"""The forward of a model in which single heads see less; the mask is an argument of the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m3jax.model.attention import MASKED
from m3jax.model.attention_mask import (
    ExplicitMemory,
    KeyValues,
    concatenate,
    seen_by_heads,
    visible_mask,
)
from m3jax.model.parameters import Params
from m3jax.model.streams import join
from m3jax.model.transformer import Model

_BLOCK = 256  # queries whose scores are held at a time


def masked_losses(
    model: Model, hide: str, window: int, decode: Callable | None = None
) -> Callable[[Params, dict[str, Any], Int[Array, "n 3"]], Float[Array, "n+1 B"]]:
    """Summed loss of every row: as the model is, then with each candidate masked.

    Args:
      model: on one device.
      hide, window: as in `heads.score_heads`.
      decode: makes memories of what the bank stores.

    Returns:
      `(params, batch, candidates)`: of a candidate layer, key-value head and query head of its
      group, −1 for all.
    """
    shape = model.config
    L, K, G = shape.layers, shape.kv_heads, shape.query_heads // shape.kv_heads

    def losses(params: Params, batch: dict[str, Any], candidates: Array) -> Array:
        memory = batch.get("memory") if hide == "memory" else None
        if memory is not None and decode is not None:
            memory = decode(memory)

        def one(candidate: Array) -> Array:
            layer, head, group = candidate
            masked_LKG = (
                (jnp.arange(L)[:, None, None] == layer)
                & (jnp.arange(K)[None, :, None] == head)
                & ((jnp.arange(G)[None, None] == group) | (group < 0))
            )
            hidden = _forward(model, params, batch["tokens"], memory, masked_LKG, hide, window)
            found = model.token_losses(params, hidden, batch["targets"])
            return jnp.sum(found * batch["weights"].astype(jnp.float32), axis=1)

        nobody = jnp.full((1, 3), L, jnp.int32)
        return jax.lax.map(one, jnp.concatenate([nobody, candidates]))

    return losses


def _forward(
    model: Model,
    params: Params,
    tokens_BT: Array,
    memory: ExplicitMemory | None,
    masked_LKG: Bool[Array, "L K G"],
    hide: str,
    window: int,
) -> Float[Array, "B T D"]:
    """`Model.hidden` with masked heads."""
    streams, hidden = model.embed(params, tokens_BT, None)
    layer = model.layer(streams)
    for segment, (low, high) in model.ranges.items():
        if high == low:
            continue
        slots: Any = None
        heads: Any = None
        if memory is not None and segment == "memory":
            slots = tuple(jnp.moveaxis(x, 3, 0) for x in memory[:2])
            heads = None if model.memory_heads is None else jnp.asarray(model.memory_heads)

        def body(hidden: Array, inputs: Any) -> tuple[Array, None]:
            stacked, masked_KG, slots, heads_K = inputs
            block = model.merge(stacked)
            _, context, constant = layer.heads(block, hidden)
            assert context is not None
            attended, prefix = layer.attend_prefix(constant)
            read = None if memory is None or slots is None else memory
            if read is not None:
                read = ExplicitMemory(slots[0], slots[1], read.length)
            qkv = context.q, context.k, context.v
            out = _attend(model, *qkv, prefix, read, heads_K, masked_KG, hide, window)
            return block.rest(hidden, join((None, out, attended))), None

        each = (params[segment], masked_LKG[low:high], slots, heads)
        hidden, _ = jax.lax.scan(body, hidden, each)
    found = streams.split(hidden)[1]
    assert found is not None
    return found


def _attend(
    model: Model,
    q_BTKGH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    prefix: KeyValues | None,
    memory: ExplicitMemory | None,
    heads_K: Array | None,
    masked_KG: Array,
    hide: str,
    window: int,
) -> Array:
    """`attend`, some of whose heads see less; all scores of a block of queries are held."""
    T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
    keys, values = concatenate(k_BTKH, v_BTKH, prefix, memory)
    settings = model.memory
    constant = 0 if prefix is None else prefix.keys.shape[0]
    slots = keys.shape[1] - T - constant
    outputs = []
    for start in range(0, T, _BLOCK):
        query_T = start + jnp.arange(min(_BLOCK, T - start))
        mask_BTS = visible_mask(query_T, T, prefix, memory, settings.chunk_length, settings.window)
        hides_TS = _hidden_keys(query_T, T, constant, slots, hide, window)
        hidden_KGTS = masked_KG[:, :, None, None] & hides_TS[None, None]
        seen = seen_by_heads(mask_BTS, heads_K, prefix, memory)[:, :, None] & ~hidden_KGTS[None]
        q = q_BTKGH[:, start : start + _BLOCK]
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(seen, scores * H**-0.5, MASKED), axis=-1)
        outputs.append(jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(values.dtype), values))
    return jnp.concatenate(outputs, axis=1)


def _hidden_keys(
    query_T: Array, context: int, constant: int, slots: int, hide: str, window: int
) -> Bool[Array, "T keys"]:
    """Which keys, in the order [prefix ; memories ; context], a masked head does not see."""
    key_S = jnp.arange(context)[None]
    far = (query_T[:, None] - key_S >= window) & (key_S > 0) & (hide == "context")
    return jnp.concatenate(
        [
            jnp.zeros((len(query_T), constant), bool),
            jnp.full((len(query_T), slots), hide == "memory"),
            far,
        ],
        axis=1,
    )
