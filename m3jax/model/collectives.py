"""Collectives of the model, called inside `shard_map`.

On a mesh the model runs under `shard_map`: every function sees the rows, heads and parameters of
one device, and all communication is in this module and in `vocab_parallel.py`. The program then
has exactly these collectives: weights are all-gathered over `fsdp` layer by layer, their gradients
are reduce-scattered once, and every layer sums its two outputs over `tensor`. (XLA's automatic
partitioner turns the gradients into all-reduces of whole weights.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from m3jax.mesh import BATCH_AXES


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Collectives between the devices of a mesh; without a mesh they do nothing.

    Attributes:
      mesh: the mesh, or None for one device.
      dtype: name of the compute dtype, to which matrices are cast before they are gathered.
      reduce_dtype: name of the dtype in which gradients are summed over devices.
    """

    mesh: Mesh | None = None
    dtype: str = "float32"
    reduce_dtype: str = "float32"

    def axes(self, *names: str) -> tuple[str, ...]:
        """Returns those of the named mesh axes that have more than one device."""
        if self.mesh is None:
            return ()
        return tuple(name for name in names if self.mesh.shape[name] > 1)

    def sum(self, x: Array, *names: str) -> Array:
        """Sums `x` over the devices along the named mesh axes."""
        axes = self.axes(*names)
        return jax.lax.psum(x, axes) if axes else x

    def reduce(self, gradient: Array, axis: int | None, dtype: Any) -> Array:
        """Sums a parameter's gradient over all rows, and splits it along `axis` over `fsdp`.

        Args:
          gradient: gradient from this device's rows, of the unsplit parameter.
          axis: axis along which the parameter is split; None if every device holds all of it.
          dtype: dtype of the result; the sums are computed in `reduce_dtype`.
        """
        if not self.axes(*BATCH_AXES):
            return gradient.astype(dtype)
        gradient = gradient.astype(self.reduce_dtype)
        scatter = axis is not None and bool(self.axes("fsdp"))
        if scatter and axis is not None:
            # The parts get a leading axis of their own, which the TPU's layout does not tile: along
            # a tiled axis the compiler pads, exchanges halos, or uses an all-reduce.
            shape, ways = gradient.shape, self.size("fsdp")
            parts = (*shape[:axis], ways, shape[axis] // ways, *shape[axis + 1 :])
            gradient = jnp.moveaxis(gradient.reshape(parts), axis, 0)
            gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=0)
        rest = [name for name in BATCH_AXES if name != "fsdp" or not scatter]
        gradient = self.sum(gradient, *rest)
        kept = jnp.finfo(dtype)
        if kept.bits < jnp.finfo(gradient.dtype).bits:
            # An explicit rounding: the compiler would move a plain cast in front of the sums.
            gradient = jax.lax.reduce_precision(gradient, kept.nexp, kept.nmant)
        return gradient.astype(dtype)

    def size(self, name: str) -> int:
        """Returns the number of devices along a mesh axis."""
        return 1 if self.mesh is None else self.mesh.shape[name]

    def whole(self, x: Array, axis: int) -> Array:
        """Returns the whole of a matrix that is split along `axis` over `fsdp`, in `dtype`."""
        x = x.astype(self.dtype)
        return jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True) if self.axes("fsdp") else x

    def gather(self, params: Any, axes_tree: Any) -> Any:
        """Gathers the parameters of a layer over `fsdp`; the backward pass reduces their gradients.

        Args:
          params: this device's parts of the parameters.
          axes_tree: logical axes of every parameter. Parameters without an `embed` axis (norms,
            biases) are not split over `fsdp` and keep their dtype.
        """

        def gather_one(x: Array, axes: Sequence[str | None]) -> Array:
            axis = axes.index("embed") if "embed" in axes else None
            if axis is None and not self.axes(*BATCH_AXES):
                return x

            def forward(x: Array) -> Array:
                return x if axis is None else self.whole(x, axis)

            def backward(_: None, gradient: Array) -> tuple[Array]:
                return (self.reduce(gradient, axis, x.dtype),)

            return with_gradient(forward, backward)(x)

        return jax.tree.map(gather_one, params, axes_tree)

    def enter(self, x: Array) -> Array:
        """Returns the input of matrices split over `tensor` unchanged; sums its gradient."""
        if not self.axes("tensor"):
            return x
        return with_gradient(lambda x: x, lambda _, g: (jax.lax.psum(g, "tensor"),))(x)

    def leave(self, x: Array) -> Array:
        """Sums the output of matrices split over `tensor`; passes its gradient on unchanged."""
        if not self.axes("tensor"):
            return x
        return with_gradient(lambda x: jax.lax.psum(x, "tensor"), lambda _, g: (g,))(x)


def with_gradient(forward: Callable, backward: Callable) -> Callable:
    """Returns `forward` with the vector-Jacobian product `backward(None, cotangent)`, which returns
    `(gradient,)`; both functions take one array."""

    @jax.custom_vjp
    def function(x: Array) -> Array:
        return forward(x)

    function.defvjp(lambda x: (forward(x), None), backward)
    return function
