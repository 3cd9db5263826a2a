"""The mesh, the one sharding-rules object, and process-local ↔ global arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from m3jax.config import ConfigError

# Slowest network first: `slice` is the data-center network between slices of a multi-slice run.
AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axes a logical axis is split over.

    Attributes:
      kind: what the rules are for, in messages.
      mesh_axes: mesh axis, tuple of mesh axes or None for every logical axis.
    """

    kind: str
    mesh_axes: Mapping[str, MeshAxes]

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The partition of an array with these logical axes.

        Raises:
          ConfigError: an axis without a rule, or two axes of the array on one mesh axis.
        """
        taken: dict[str, str] = {}
        parts: list[MeshAxes] = []
        for axis in axes:
            if axis is not None and axis not in self.mesh_axes:
                known = ", ".join(self.mesh_axes)
                raise ConfigError(
                    f"no {self.kind} rule for the logical axis {axis!r}; known: {known}"
                )
            part = None if axis is None else self.mesh_axes[axis]
            for name in (part,) if isinstance(part, str) else part or ():
                if name in taken:
                    raise ConfigError(
                        f"{self.kind} axes {taken[name]!r} and {axis!r} of one array {tuple(axes)}"
                        f" collide on the mesh axis {name!r}"
                    )
                taken[name] = str(axis)
            parts.append(part)
        return PartitionSpec(*parts)


PARAMETERS = Rules(
    "parameter",
    {
        "vocabulary": "tensor",
        "embed": "fsdp",
        "kv_heads": "tensor",
        "group": None,
        "head_dim": None,
        "mlp": "tensor",
        "norm": None,
        "layer": None,
    },
)

# Where a layer computes, its weights are whole but for the tensor axis.
GATHERED = Rules("gathered parameter", {**PARAMETERS.mesh_axes, "embed": None})

ACTIVATIONS = Rules(
    "activation",
    {
        "batch": BATCH_AXES,
        "length": None,
        "embed": None,
        "kv_heads": "tensor",
        "group": None,
        "head_dim": None,
        "mlp": "tensor",
        "vocabulary": "tensor",
    },
)


def make_mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config, with the axes `AXES`; `mesh.fsdp = -1` takes all devices left.

    Axes are of type Auto: the compiler places what the rules leave open. A single process may use
    fewer devices than there are; several processes must use all of them. Devices are ordered so
    that the later axes lie on neighbouring chips, and only `slice` crosses between slices.

    Args:
      config: a validated config.
      devices: devices to use; default all devices of all processes.

    Raises:
      ConfigError: the sizes do not fit the devices, or do not divide heads, widths or rows.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: int(config.mesh[axis]) for axis in AXES}
    if sizes["fsdp"] == -1:
        rest = math.prod(size for axis, size in sizes.items() if axis != "fsdp")
        sizes["fsdp"] = len(devices) // rest
        if sizes["fsdp"] * rest != len(devices):
            others = " × ".join(f"mesh.{axis}" for axis in AXES if axis != "fsdp")
            values = " × ".join(str(sizes[axis]) for axis in AXES if axis != "fsdp")
            raise ConfigError(
                f"config.mesh.fsdp = -1: {others} = {values} does not divide the {len(devices)}"
                f" available devices; sizes that would: {_divisors(len(devices))}"
            )
    used = math.prod(sizes.values())
    shown = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
    if used > len(devices) or (used < len(devices) and jax.process_count() > 1):
        raise ConfigError(
            f"config.mesh ({shown}) has {used} devices; {len(devices)} are available."
            " Change an axis, or set mesh.fsdp = -1 to take all devices left"
        )
    if used < len(devices):
        logging.warning("the mesh (%s) uses %d of %d devices", shown, used, len(devices))
    _check_shape(config, sizes)
    _check_rows(config, sizes)
    return Mesh(_arrange(sizes, devices[:used]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Devices in the shape of the mesh, along the links of the machine."""
    shape = tuple(sizes[axis] for axis in AXES)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if sizes["slice"] != len(slices):
        raise ConfigError(
            f"config.mesh.slice = {sizes['slice']}: the devices form {len(slices)} slices; set"
            f" mesh.slice = {len(slices)}, so that only gradients cross the network between them"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (1, *shape[1:]), (shape[0], 1, 1, 1), devices, allow_split_physical_axes=True
    )


def _divisors(number: int, below: int = 1 << 30) -> str:
    found = [size for size in range(1, min(number, below) + 1) if number % size == 0]
    return ", ".join(map(str, found))


def _check_shape(config: ConfigDict, sizes: Mapping[str, int]) -> None:
    """Refuses axes that do not divide what they split."""
    model = config.model
    split = (
        ("tensor", "model.kv_heads", model.kv_heads),
        ("tensor", "model.mlp_width", model.mlp_width),
        ("tensor", "model.vocabulary", model.vocabulary),
        ("fsdp", "model.hidden", model.hidden),
    )
    for axis, field, value in split:
        if value % sizes[axis]:
            raise ConfigError(
                f"config.mesh.{axis} = {sizes[axis]} does not divide {field} = {value}; sizes of"
                f" mesh.{axis} that do: {_divisors(value, 1024)}"
            )


def _check_rows(config: ConfigDict, sizes: Mapping[str, int]) -> None:
    ways = math.prod(sizes[axis] for axis in BATCH_AXES)
    rows, parts = config.data.batch_rows, config.train.microbatches
    if (rows // parts) % ways:
        shown = " × ".join(str(sizes[axis]) for axis in BATCH_AXES)
        raise ConfigError(
            f"config.data.batch_rows = {rows}: {rows // parts} rows (train.microbatches = {parts})"
            f" cannot be split over mesh.slice × mesh.data × mesh.fsdp = {shown} = {ways} devices;"
            f" use a multiple of {parts * ways} rows, or a smaller mesh"
        )


def parameter_shardings(mesh: Mesh, axes_tree: Any, shapes: Any, rules: Rules = PARAMETERS) -> Any:
    """Shardings of a tree of parameters.

    Args:
      mesh: the mesh.
      axes_tree: for every parameter the tuple of its logical axes.
      shapes: the same tree of anything with a `shape`.
      rules: parameter rules.

    Raises:
      ConfigError: a dimension is not divisible by its mesh axis; names parameter, size and axis.
    """

    def one(path: Any, leaf: Any, axes: Sequence[str | None]) -> NamedSharding:
        spec = rules.spec(axes)
        for axis, size, part in zip(axes, leaf.shape, spec, strict=True):
            names = (part,) if isinstance(part, str) else part or ()
            ways = math.prod(mesh.shape[name] for name in names)
            if size % ways:
                raise ConfigError(
                    f"parameter {parameter_name(path)}: axis {axis!r} of size {size} cannot be"
                    f" split over mesh.{'·'.join(names)} = {ways}; use a size of the axis that"
                    f" divides {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, shapes, axes_tree)


def parameter_name(path: Any) -> str:
    """A readable name of a leaf, `memory/query`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of anything whose first axis is the rows of a batch."""
    return NamedSharding(mesh, ACTIVATIONS.spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(mesh: Mesh | None, x: Array, axes: Sequence[str | None]) -> Array:
    """`x` split by the activation rules; as it is where there is no mesh."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, ACTIVATIONS.spec(axes)))


def gather(mesh: Mesh | None, params: Any, axes_tree: Any, dtype: Any, reduce_dtype: Any) -> Any:
    """Parameters as a layer computes with them: whole over `fsdp`, matrices in the compute dtype.

    The gradient comes back in `reduce_dtype`, summed over the batch and split like the parameter in
    one reduce-scatter. A plain sharding constraint would all-reduce the whole gradient instead,
    since its transpose asks for the gathered layout again.

    Args:
      mesh: the mesh; None only casts.
      params: parameters.
      axes_tree: for every parameter the tuple of its logical axes.
      dtype: of matrices where they are used. What has no `embed` axis (norms, biases) is left.
      reduce_dtype: in which gradients of devices are added up.
    """

    def one(x: Array, axes: Sequence[str | None]) -> Array:
        if "embed" not in axes:
            return x
        if mesh is None or mesh.size == 1:
            return x.astype(dtype)
        whole = NamedSharding(mesh, GATHERED.spec(axes))
        parts = NamedSharding(mesh, PARAMETERS.spec(axes))
        kind = x.dtype

        @jax.custom_vjp
        def unshard(x: Array) -> Array:
            return jax.lax.with_sharding_constraint(x.astype(dtype), whole)

        def backward(_: None, gradient: Array) -> tuple[Array]:
            gradient = jax.lax.with_sharding_constraint(gradient.astype(reduce_dtype), parts)
            return (gradient.astype(kind),)

        unshard.defvjp(lambda x: (unshard(x), None), backward)
        return unshard(x)

    return jax.tree.map(one, params, axes_tree)


class HostRows(NamedTuple):
    """The rows of a global batch that this process loads, in the order it loads them."""

    ids: Int[np.ndarray, " rows"]
    total: int  # rows of the global batch

    def find(self, low: int, high: int) -> slice:
        """Where the global rows `low … high − 1` of a device lie among the loaded ones."""
        first = int(np.searchsorted(self.ids, low))
        return slice(first, first + high - low)


def host_rows(mesh: Mesh, total: int) -> HostRows:
    """The rows of a global batch of `total` rows that lie on devices of this process.

    On a torus they need not be neighbours: hosts hold squares of chips, batches are split in lines.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((total,)).values()
    spans = {part[0].indices(total)[:2] for part in indices if part is not None}
    return HostRows(np.unique(np.concatenate([np.arange(*span) for span in sorted(spans)])), total)


def to_global(mesh: Mesh, batch: Any, rows: HostRows) -> Any:
    """Global arrays from the rows that this process loaded.

    Args:
      mesh: the mesh.
      batch: a tree of host arrays, first axis the rows `rows.ids`. They may be used without a copy:
        do not write to them afterwards.
      rows: `host_rows` of the mesh.
    """
    sharding = batch_sharding(mesh)

    def one(x: np.ndarray) -> Array:
        def part(index: Any) -> np.ndarray:
            return x[rows.find(*index[0].indices(rows.total)[:2])]

        return jax.make_array_from_callback((rows.total, *x.shape[1:]), sharding, part)

    with jax.transfer_guard("allow"):  # this is the explicit transfer; JAX does not count it so
        return jax.tree.map(one, batch)
