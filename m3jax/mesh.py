"""The mesh, the one sharding-rules object, and process-local ↔ global arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from m3jax.config import ConfigError

AXES = ("data", "fsdp", "tensor")

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

ACTIVATIONS = Rules(
    "activation",
    {
        "batch": ("data", "fsdp"),
        "length": None,
        "embed": None,
        "kv_heads": "tensor",
        "group": None,
        "head_dim": None,
        "mlp": "tensor",
        "vocabulary": "tensor",
    },
)


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh ('data', 'fsdp', 'tensor') of a config; `mesh.fsdp = -1` takes all devices left.

    Axes are of type Auto: the compiler places what the rules leave open. A single process may use
    fewer devices than there are; several processes must use all of them.

    Args:
      config: a validated config.
      devices: devices to use; default all devices of all processes.

    Raises:
      ConfigError: the sizes do not fit the devices, or the rows of a step cannot be split evenly.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: int(config.mesh[axis]) for axis in AXES}
    rest = sizes["data"] * sizes["tensor"]
    if sizes["fsdp"] == -1:
        sizes["fsdp"] = len(devices) // rest
        if sizes["fsdp"] * rest != len(devices):
            raise ConfigError(
                f"config.mesh.fsdp = -1: mesh.data × mesh.tensor = {sizes['data']} ×"
                f" {sizes['tensor']} does not divide the {len(devices)} available devices"
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
    _check_rows(config, sizes)
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:used]
    )


def _check_rows(config: ConfigDict, sizes: Mapping[str, int]) -> None:
    ways = sizes["data"] * sizes["fsdp"]
    rows, parts = config.data.batch_rows, config.train.microbatches
    if (rows // parts) % ways:
        raise ConfigError(
            f"config.data.batch_rows = {rows}: {rows // parts} rows (train.microbatches = {parts})"
            f" cannot be split over mesh.data × mesh.fsdp = {sizes['data']} × {sizes['fsdp']} ="
            f" {ways} devices; use a multiple of {parts * ways} rows, or a smaller mesh"
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


def to_global(mesh: Mesh, batch: Any) -> Any:
    """Global arrays from the rows that this process loaded (`host_rows`).

    Args:
      mesh: the mesh.
      batch: a tree of host arrays, first axis rows. They may be used without a copy: do not
        write to them afterwards.
    """
    sharding = batch_sharding(mesh)
    with jax.transfer_guard("allow"):  # this is the explicit transfer; JAX does not count it so
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def host_rows(config: ConfigDict, mesh: Mesh | None = None) -> slice:
    """The rows of the global batch that this process loads.

    Args:
      config: a validated config.
      mesh: its mesh, made anew when not given.

    Raises:
      ConfigError: the rows of this process are not contiguous on the mesh.
    """
    mesh = make_mesh(config) if mesh is None else mesh
    rows = config.data.batch_rows
    indices = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    spans = sorted({part[0].indices(rows)[:2] for part in indices if part is not None})
    gaps = [low for (_, high), (low, _) in zip(spans, spans[1:], strict=False) if low != high]
    if gaps:
        raise ConfigError(
            f"the rows of process {jax.process_index()} have a gap before row {gaps[0]}:"
            " order the mesh so that a process holds neighbouring rows (mesh.tensor within a host)"
        )
    return slice(spans[0][0], spans[-1][1])
