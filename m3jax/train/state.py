"""Training state of a stage: its shapes and shardings, and its initialisation on the mesh."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from m3jax.config import prefix_tokens
from m3jax.make_model import make_model
from m3jax.mesh import parameter_shardings, replicated
from m3jax.model.parameters import Params
from m3jax.random_key import random_key
from m3jax.train.loss import Sums
from m3jax.train.optimizer import make_optimizer


class TrainState(NamedTuple):
    """Parameters, optimizer state, step, and the sums since the last logged line.

    The sums are part of the state, and so of checkpoints, so that a resumed run logs bitwise the
    same averages.
    """

    params: Params
    optimizer: Any
    step: Int[Array, ""]
    window: Sums


def new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Makes the state of step 0 from parameters (a pure function)."""
    zero = jnp.zeros((), jnp.float32)
    step = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(params), step, Sums(zero, zero, zero))


class Program:
    """Model, optimizer and state of a stage on a mesh.

    Attributes:
      config, mesh: config and mesh of the stage.
      model, optimizer: made from the config.
      abstract: the state as `jax.ShapeDtypeStruct`s with shardings; nothing is allocated.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.model = make_model(config, prefix_tokens(config), mesh)
        self.optimizer = make_optimizer(config)
        shapes, axes = self.model.abstract()
        params, whole = parameter_shardings(mesh, axes), replicated(mesh)
        abstract = jax.eval_shape(lambda p: new_state(p, self.optimizer), shapes)
        shardings = jax.tree.map(lambda _: whole, abstract)._replace(
            params=params, optimizer=_like_parameters(abstract.optimizer, shapes, params, whole)
        )
        self.abstract: TrainState = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            *(abstract, shardings),
        )

    @property
    def shardings(self) -> TrainState:
        """Returns the shardings of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def init(self, params: Params | None = None) -> TrainState:
        """Makes the state of step 0 on the mesh; every device makes only its own shards.

        Args:
          params: parameters of an earlier stage, with the shardings of `abstract`; default random
            parameters.
        """
        # CPUs would take ten times longer to optimise a program that runs once.
        cpu = jax.default_backend() == "cpu"
        options = {"xla_backend_optimization_level": 0} if cpu else None
        jit = functools.partial(jax.jit, out_shardings=self.shardings, compiler_options=options)
        if params is not None:
            return jit(lambda params: new_state(params, self.optimizer))(params)
        model, seed = self.model, self.config.seed
        return jit(lambda: new_state(model.init(random_key(seed)), self.optimizer))()


def _like_parameters(optimizer: Any, shapes: Any, shardings: Any, default: NamedSharding) -> Any:
    """Returns the shardings of an optimizer's state: a moment is sharded as its parameter.

    Moments are recognized by path and shape; other leaves get `default`. (`optax.tree_map_params`
    cannot do this: under `optax.partition` parts of the moments are masked.)
    """
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    known = {
        (path, leaf.shape): sharding
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    }

    def sharding_of(path: Any, leaf: Any) -> NamedSharding:
        ends = (known.get((path[start:], leaf.shape)) for start in range(len(path)))
        return next((sharding for sharding in ends if sharding is not None), default)

    return jax.tree_util.tree_map_with_path(sharding_of, optimizer)
