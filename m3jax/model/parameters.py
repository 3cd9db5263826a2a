"""The parameters of the language model: their segments, shapes, logical axes and initial values.

A nested dict of arrays. Layers are stacked per segment: `lower` (plain, before the memory layers),
`memory`, `upper` (plain, after them); a segment without layers is absent.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict

from m3jax.model.layer import Block
from m3jax.model.rope import Rope

nnx.use_eager_sharding(False)  # parameters carry axis names; no mesh is needed to create them

Params = dict[str, Any]


class Transformer(nnx.Module):
    """Holds the initial parameters and their logical axis names; `Model` computes with them.

    Args:
      model, memory: sections of a validated config.
      rngs: its stream `params` draws the initial values.
    """

    def __init__(self, model: ConfigDict, memory: ConfigDict, rngs: nnx.Rngs):
        dtype = jnp.dtype(model.param_dtype)
        D, V = model.hidden, model.vocabulary

        def table(axes: tuple[str, ...]) -> nnx.Param:
            values = jax.random.normal(rngs.params(), (V, D), jnp.float32) * D**model.init_exponent
            return nnx.Param(values.astype(dtype), out_sharding=axes)

        self.embedding = table(("vocabulary", "features"))
        for segment, (low, high) in segment_ranges(model, memory).items():
            if high > low:
                stack = nnx.vmap(
                    lambda r: Block(model, r), transform_metadata={nnx.PARTITION_NAME: "layer"}
                )
                setattr(self, segment, stack(rngs.split(high - low)))
        self.final_norm = nnx.Param(jnp.ones((D,), dtype), out_sharding=("norm",))
        if not model.tied_embeddings:
            self.head = table(("vocabulary", "features"))


def segment_ranges(model: ConfigDict, memory: ConfigDict) -> dict[str, tuple[int, int]]:
    """Returns the range [first, end) of layers of each segment, which may be empty."""
    first = memory.first_layer
    last = first + memory.layers
    return {"lower": (0, first), "memory": (first, last), "upper": (last, model.layers)}


def abstract_params(model: ConfigDict, memory: ConfigDict) -> tuple[Params, Params]:
    """Returns shapes and dtypes of the parameters, and their logical axis names."""
    module = nnx.eval_shape(lambda: Transformer(model, memory, nnx.Rngs(0)))
    state = nnx.state(module, nnx.Param)
    shapes = nnx.to_pure_dict(state)
    axes = nnx.to_pure_dict(nnx.get_partition_spec(state))
    return shapes, jax.tree.map(
        lambda spec, leaf: (*spec, *(None,) * (leaf.ndim - len(spec))), axes, shapes
    )


def init_params(model: ConfigDict, memory: ConfigDict, key: Array) -> Params:
    """Draws random parameters (pure: may be jitted with output shardings)."""
    module = Transformer(model, memory, nnx.Rngs(params=key))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    if model.previous_token_head:
        params = _with_previous_token_head(model, memory, params)
    return params


def _with_previous_token_head(model: ConfigDict, memory: ConfigDict, params: Params) -> Params:
    """Sets query and key biases that make key-value head 0 of layer 0 a previous-token head.

    The key bias is a constant vector; the query bias is the same vector rotated back by one RoPE
    position, so that the score is largest at distance one. Only the fastest third of the RoPE
    frequencies is nonzero.
    """
    half = model.head_dim // 2
    frequency = jnp.asarray(Rope.of(model).frequencies(half))
    size = model.previous_token_head * (jnp.arange(half) < max(2, half // 3))
    key = jnp.concatenate([size, jnp.zeros(half)])
    query = jnp.concatenate([size * jnp.cos(frequency), -size * jnp.sin(frequency)])
    segment = "lower" if memory.first_layer else "memory"
    layer = dict(params[segment])
    for name, values in (("key_bias", key), ("query_bias", query)):
        layer[name] = layer[name].at[0, 0].set(values.astype(layer[name].dtype))
    return {**params, segment: layer}
