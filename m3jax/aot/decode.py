"""Inputs of the generation of a chunk, as shapes, for a TPU slice that is not there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from m3jax.config import PREFIX_TOKENS
from m3jax.errors import ConfigError
from m3jax.inference.sampling import Sampling
from m3jax.make_model import make_model
from m3jax.mesh import make_mesh
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.decode import Decoder, unstack


def serving(config: ConfigDict, rows: int) -> ConfigDict:
    """Returns a copy of the config on a mesh of `data` and `tensor` alone, where weights are whole.

    Args:
      config: of any stage.
      rows: that are decoded together.
    """
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        mesh = changed.mesh
        mesh.data, mesh.fsdp = -1, 1
        changed.data.batch_size = changed.evaluation.batch_size = rows
        changed.train.microbatches = 1
    return changed


def serving_mesh(config: ConfigDict, devices: list[Any]) -> Mesh:
    """Returns the mesh of `serving` on these devices.

    Raises:
      ConfigError: the rows cannot be split over them.
    """
    ways = len(devices) // (config.mesh.tensor * config.mesh.slice)
    with config.unlocked():
        config.mesh.data = max(1, ways)
    if config.data.batch_size % max(1, ways * config.mesh.slice):
        raise ConfigError(
            f"{config.data.batch_size} rows cannot be split over {ways} devices; use a multiple"
        )
    return make_mesh(config, devices)


def arguments(config: ConfigDict, mesh: Mesh, context: int) -> tuple[Decoder, tuple[Any, ...]]:
    """Returns the decoder and the arguments of its `generate`, as shapes with shardings.

    Args:
      config: of `serving`.
      mesh: of `serving_mesh`.
      context: tokens of a prompt, in whole chunks.
    """
    model = make_model(config, PREFIX_TOKENS, mesh)
    decoder = Decoder(model, Sampling(), stop=(3,))
    memory, shape = config.memory, config.model
    B, M, Q = config.data.batch_size, memory.per_prompt_chunk, memory.chunk_length
    params = jax.eval_shape(lambda p: unstack(model, p), model.abstract()[0])

    def stored(*lead: int) -> ExplicitMemory:
        size = (memory.layers, *lead, shape.kv_heads, memory.kept_tokens, shape.head_dim)
        values: Any = jax.ShapeDtypeStruct(size, jnp.dtype(memory.dtype))
        length: Any = jax.ShapeDtypeStruct(lead, jnp.int32)
        return ExplicitMemory(values, values, length)

    def numbers(*size: int) -> Any:
        return jax.ShapeDtypeStruct(size, jnp.int32)

    prompt = (numbers(B, context), numbers(B), numbers(B), stored(B, context // Q, M))
    state, _ = jax.eval_shape(
        lambda *given: decoder.prefill(*given, slots=Q), params, *prompt, numbers(B, 1)
    )
    values = (params, state, stored(B, M), numbers(), numbers(B, Q))
    specs = (
        decoder.param_specs,
        decoder.state_specs,
        decoder.memory_specs,
        decoder.whole,
        decoder.rows,
    )

    def placed(spec: Any, tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
            tree,
        )

    is_spec = lambda node: isinstance(node, jax.sharding.PartitionSpec)  # noqa: E731
    return decoder, tuple(
        jax.tree.map(placed, spec, value, is_leaf=is_spec)
        for spec, value in zip(specs, values, strict=True)
    )
