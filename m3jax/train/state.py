"""State of a step: made abstractly, sharded, then initialised in place."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from m3jax.mesh import parameter_shardings, replicated
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.train.loss import Sums


class TrainState(NamedTuple):
    """Parameters, optimizer and step, and the sums since the last logged line.

    The sums live here, and so in checkpoints, so that a resumed run logs bitwise the same averages.
    """

    params: Params
    optimizer: Any
    step: Int[Array, ""]
    window: Sums


def new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Makes the state of step 0 with the given parameters (pure)."""
    zero = jnp.zeros((), jnp.float32)
    step = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(params), step, Sums(zero, zero, zero))


def abstract_state(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the state as `jax.ShapeDtypeStruct`s with shardings; nothing is allocated."""
    shapes, axes = model.abstract()
    params = parameter_shardings(mesh, axes, shapes)
    abstract = jax.eval_shape(lambda p: new_state(p, optimizer), shapes)
    whole = replicated(mesh)
    shardings = jax.tree.map(lambda _: whole, abstract)._replace(
        params=params, optimizer=_like_parameters(abstract.optimizer, shapes, params, whole)
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def _like_parameters(optimizer: Any, shapes: Any, shardings: Any, default: NamedSharding) -> Any:
    """Shardings of an optimizer's state: a moment has the path and the sharding of its parameter.

    (`optax.tree_map_params` cannot do it: under `optax.partition` parts of the moments are masked.)
    """
    known = {}
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        known[path, leaf.shape] = sharding

    def sharding_of(path: Any, leaf: Any) -> NamedSharding:
        ends = (known.get((path[start:], leaf.shape)) for start in range(len(path)))
        return next((sharding for sharding in ends if sharding is not None), default)

    return jax.tree_util.tree_map_with_path(sharding_of, optimizer)


def state_shardings(abstract: TrainState) -> TrainState:
    """Returns the shardings of an abstract state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_state(
    config: ConfigDict,
    model: Model,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    params: Params | None = None,
) -> TrainState:
    """Makes the state of step 0 on the mesh: every device its part, nothing is whole anywhere.

    Args:
      config: for the seed.
      model: the model.
      optimizer: the update rule.
      abstract: `abstract_state` of the same.
      params: parameters of an earlier stage, with the shardings of `abstract`; default random ones.
    """
    jit = functools.partial(
        jax.jit, out_shardings=state_shardings(abstract), compiler_options=_compiled_once()
    )
    if params is not None:
        return jit(lambda params: new_state(params, optimizer))(params)
    seed = config.seed
    return jit(lambda: new_state(model.init(jax.random.key(seed)), optimizer))()


def _compiled_once() -> dict[str, int] | None:
    """Options for a program that runs once: CPUs would take ten times longer to optimise it."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
