"""The collectives of one device's program.

On a mesh the model runs under `shard_map`: every function sees the rows, heads and parameters of
one device, and what crosses between devices is written here and in `vocab_parallel.py`, nowhere
else. So the program has exactly these collectives: weights are gathered over `fsdp` layer by layer,
their gradients leave the device in one reduce-scatter, and a layer adds up its two outputs over
`tensor`. (Left to the compiler's partitioner, gradients became all-reduces of whole weights.)
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
    """Exchanges of a device with the others of its mesh; none where there is one device.

    Attributes:
      mesh: the mesh, or None.
      dtype: name of the dtype that matrices have where they are used.
      reduce_dtype: name of the dtype in which gradients of devices are added up.
    """

    mesh: Mesh | None = None
    dtype: str = "float32"
    reduce_dtype: str = "float32"

    def axes(self, *names: str) -> tuple[str, ...]:
        """Returns the mesh axes of these that have more than one device."""
        if self.mesh is None:
            return ()
        return tuple(name for name in names if self.mesh.shape[name] > 1)

    def sum(self, x: Array, *names: str) -> Array:
        """Sums over devices along mesh axes."""
        axes = self.axes(*names)
        return jax.lax.psum(x, axes) if axes else x

    def reduce(self, gradient: Array, axis: int | None, dtype: Any) -> Array:
        """Sums a parameter's gradient over all rows, and splits it along `axis` over `fsdp`.

        Args:
          gradient: of this device's rows, whole.
          axis: None for what every device holds whole.
          dtype: of the result; the sums are made in `reduce_dtype`.
        """
        if not self.axes(*BATCH_AXES):
            return gradient.astype(dtype)
        gradient = gradient.astype(self.reduce_dtype)
        scatter = axis is not None and bool(self.axes("fsdp"))
        if scatter and axis is not None:
            # Parts along an axis of their own, which no tile of the chip's memory covers: along
            # another the TPU compiler pads, exchanges halos, or falls back to an all-reduce.
            shape, ways = gradient.shape, self.size("fsdp")
            parts = (*shape[:axis], ways, shape[axis] // ways, *shape[axis + 1 :])
            gradient = jnp.moveaxis(gradient.reshape(parts), axis, 0)
            gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=0)
        rest = [name for name in BATCH_AXES if name != "fsdp" or not scatter]
        gradient = self.sum(gradient, *rest)
        kept = jnp.finfo(dtype)
        if kept.bits < jnp.finfo(gradient.dtype).bits:
            # Rounds by itself: a plain cast would be moved in front of the sums.
            gradient = jax.lax.reduce_precision(gradient, kept.nexp, kept.nmant)
        return gradient.astype(dtype)

    def size(self, name: str) -> int:
        """Returns the number of devices along a mesh axis."""
        return 1 if self.mesh is None else self.mesh.shape[name]

    def whole(self, x: Array, axis: int) -> Array:
        """Gathers a matrix that is split along `axis` over `fsdp`, in the compute dtype."""
        x = x.astype(self.dtype)
        return jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True) if self.axes("fsdp") else x

    def gather(self, params: Any, axes_tree: Any) -> Any:
        """Gathers the parameters of a layer; their gradients come back reduced.

        Args:
          params: this device's parts.
          axes_tree: logical axes of every parameter. What has no `embed` axis (norms, biases) is
            whole on every device and keeps its dtype.
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
        """Passes the input of matrices split over `tensor`, and sums its gradients."""
        if not self.axes("tensor"):
            return x
        return with_gradient(lambda x: x, lambda _, g: (jax.lax.psum(g, "tensor"),))(x)

    def leave(self, x: Array) -> Array:
        """Sums the output of matrices that are split over `tensor`."""
        if not self.axes("tensor"):
            return x
        return with_gradient(lambda x: jax.lax.psum(x, "tensor"), lambda _, g: (g,))(x)


def with_gradient(forward: Callable, backward: Callable) -> Callable:
    """Gives `forward` of an array the derivative `backward(None, cotangent) -> (gradient,)`."""

    @jax.custom_vjp
    def function(x: Array) -> Array:
        return forward(x)

    function.defvjp(lambda x: (forward(x), None), backward)
    return function
