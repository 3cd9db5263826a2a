"""Device meshes, sharding rules, and conversion of process-local to global arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int
from ml_collections import ConfigDict

from m3jax.errors import ConfigError

# Slowest network first: `slice` crosses the data-center network between slices.
AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """Sharding rules: the mesh axes over which each logical axis is split.

    Attributes:
      kind: `parameter` or `activation`, for error messages.
      mesh_axes: for every logical axis a mesh axis, a tuple of mesh axes, or None (not split).
    """

    kind: str
    mesh_axes: Mapping[str, MeshAxes]

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """Returns the partition spec of an array with these logical axes.

        Raises:
          ConfigError: an axis has no rule, or two axes of the array use the same mesh axis.
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
        # Embedding and LM head are split by rows: parts of their columns would need padding.
        "vocabulary": ("tensor", "fsdp"),
        "features": None,
        "embed": "fsdp",
        "kv_heads": "tensor",
        "group": None,
        "head_dim": None,
        "mlp": "tensor",
        "norm": None,
        "layer": None,
    },
)

ACTIVATIONS = Rules("activation", {"batch": BATCH_AXES, "kv_heads": "tensor"})


def make_mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh of a config, with the axes `AXES`; `mesh.fsdp = -1` takes all remaining
    devices.

    Axes are of type Auto: the compiler shards arrays for which the rules give no sharding. A single
    process may use fewer devices than there are; several processes must use all of them. Devices
    are ordered so that the later axes connect neighbouring chips, and only `slice` connects slices.

    Args:
      config: a validated config.
      devices: devices to use; default all devices of all processes.

    Raises:
      ConfigError: the sizes do not fit the number of devices or of slices, or do not divide the
        key-value heads, the MLP width, the hidden width, the vocabulary or the rows of a batch.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: int(config.mesh[axis]) for axis in AXES}
    if sizes["fsdp"] == -1:
        rest = math.prod(size for axis, size in sizes.items() if axis != "fsdp")
        sizes["fsdp"] = len(devices) // rest
        if sizes["fsdp"] * rest != len(devices):
            raise ConfigError(
                "config.mesh.fsdp = -1: mesh.slice × mesh.data × mesh.tensor ="
                f" {sizes['slice']} × {sizes['data']} × {sizes['tensor']} does not divide the"
                f" {len(devices)} available devices; sizes that would: {_divisors(len(devices))}"
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


def local_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh of this process's devices for computations that each process does on its own.

    Rows are split over all of the devices.

    Args:
      devices: devices of this process; default all of them.
    """
    devices = jax.local_devices() if devices is None else devices
    shape = tuple(len(devices) if axis == "data" else 1 for axis in AXES)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def writer_mesh(config: ConfigDict) -> Mesh | None:
    """Makes the mesh of this process's devices on which it encodes references; None if it has only
    one device.

    Of the config's mesh sizes only `mesh.tensor` is used, so that one config works on a host and on
    a pod. `memory.encode` checks that `writer.batch_references` can be split over the mesh.

    Raises:
      ConfigError: as `make_mesh`.
    """
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh.update(slice=1, data=1, fsdp=-1)
        config.data.batch_size, config.train.microbatches = len(devices), 1
    return make_mesh(config, devices)


def _arrange(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Arranges devices in the shape of the mesh, so that neighbours in it are linked chips."""
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
    sizes = (size for size in range(1, min(number, below) + 1) if number % size == 0)
    return ", ".join(map(str, sizes))


def _check_shape(config: ConfigDict, sizes: Mapping[str, int]) -> None:
    """Raises `ConfigError` if a mesh axis does not divide an axis of the parameters."""
    model = config.model
    split = (
        ("tensor", "model.kv_heads", model.kv_heads),
        ("tensor", "model.mlp_width", model.mlp_width),
        ("fsdp", "model.hidden", model.hidden),
    )
    for axis, field, value in split:
        if value % sizes[axis]:
            raise ConfigError(
                f"config.mesh.{axis} = {sizes[axis]} does not divide {field} = {value}; sizes of"
                f" mesh.{axis} that do: {_divisors(value, 1024)}"
            )
    ways = sizes["tensor"] * sizes["fsdp"]
    if model.vocabulary % ways:
        raise ConfigError(
            f"config.model.vocabulary = {model.vocabulary} cannot be split over mesh.tensor ×"
            f" mesh.fsdp = {sizes['tensor']} × {sizes['fsdp']} devices; use a multiple of {ways}"
            " (it may be larger than the tokenizer's) or other axes"
        )


def _check_rows(config: ConfigDict, sizes: Mapping[str, int]) -> None:
    """Raises `ConfigError` if the rows of a microbatch cannot be split over the mesh."""
    ways = math.prod(sizes[axis] for axis in BATCH_AXES)
    rows, parts = config.data.batch_size, config.train.microbatches
    if (rows // parts) % ways:
        shown = " × ".join(str(sizes[axis]) for axis in BATCH_AXES)
        raise ConfigError(
            f"config.data.batch_size = {rows}: {rows // parts} rows (train.microbatches = {parts})"
            f" cannot be split over mesh.slice × mesh.data × mesh.fsdp = {shown} = {ways} devices;"
            f" use a multiple of {parts * ways} rows, or a smaller mesh"
        )


def parameter_shardings(mesh: Mesh, axes_tree: Any) -> Any:
    """Returns the shardings of parameters from their logical axes, a tuple for each parameter;
    `make_mesh` has checked that the sizes can be split."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, PARAMETERS.spec(axes)),
        axes_tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Returns options of the compiler for programs on this mesh; None on other platforms than TPU.

    They switch off windowed einsums, which unroll a product next to a gather or scatter into a ring
    of small products: gradients would be summed in the product's dtype instead of
    `train.reduce_dtype`, and compiling would take twice as long.
    """
    if mesh.devices.flat[0].platform != "tpu":
        return None
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the rows of a batch."""
    return NamedSharding(mesh, ACTIVATIONS.spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that are replicated on all devices."""
    return NamedSharding(mesh, PartitionSpec())


def on_devices(mesh: Mesh | None, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Wraps `function`, which computes on one device's parts, as a function of global arrays.

    Args:
      mesh: mesh of `jax.shard_map`; `function` is returned unchanged if it is None or has one
        device.
      function: function of one device's parts, which calls collectives itself.
      in_specs, out_specs: partition specs of arguments and results.
    """
    if mesh is None or mesh.size == 1:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


class HostRows(NamedTuple):
    """Indices, ascending, of the rows of a global batch that this process loads."""

    ids: Int[np.ndarray, " rows"]
    total: int  # rows of the global batch


def host_rows(mesh: Mesh | None, total: int) -> HostRows:
    """Returns the rows of a global batch of `total` rows that lie on devices of this process.

    Without a mesh these are all rows. On a torus they need not be contiguous: a host has a square
    of chips, while a batch is split along lines of the mesh.

    Raises:
      ConfigError: the rows cannot be split evenly over the devices.
    """
    if mesh is None:
        return HostRows(np.arange(total), total)
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if total % ways:
        raise ConfigError(
            f"batches of {total} rows cannot be split over the {ways} devices of mesh.slice ×"
            f" mesh.data × mesh.fsdp; set data.batch_size and evaluation.batch_size to multiples of"
            f" {ways}"
        )
    indices = batch_sharding(mesh).addressable_devices_indices_map((total,)).values()
    spans = {part[0].indices(total)[:2] for part in indices if part is not None}
    return HostRows(np.unique(np.concatenate([np.arange(*span) for span in sorted(spans)])), total)


def row_spec(axis: int) -> PartitionSpec:
    """Returns the partition spec of an array whose axis number `axis` is the rows of a batch."""
    return ACTIVATIONS.spec((*(None,) * axis, "batch"))


def to_global(mesh: Mesh | None, batch: Any, rows: HostRows, row_axes: Any) -> Any:
    """Makes global arrays from the rows that this process loaded.

    Args:
      mesh: the mesh; None puts the arrays on the default device.
      batch: a tree of host arrays that hold the rows `rows.ids`. The result may alias them: do not
        write to them afterwards.
      rows: result of `host_rows` for the mesh.
      row_axes: tree of the structure of `batch`: number of the axis of rows of every array.
    """
    if mesh is None:
        return jax.device_put(batch)

    def make(x: np.ndarray, axis: int) -> jax.Array:
        shape = (*x.shape[:axis], rows.total, *x.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(NamedSharding(mesh, row_spec(axis)), x, shape)

    with jax.transfer_guard("allow"):  # an intended transfer, which JAX counts as implicit
        return jax.tree.map(make, batch, row_axes)
