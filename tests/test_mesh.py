"""The mesh, the sharding rules, and rows of a process."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from m3jax import mesh as mesh_lib
from m3jax.config import default
from m3jax.errors import ConfigError
from m3jax.mesh import (
    Rules,
    batch_sharding,
    host_rows,
    make_mesh,
    parameter_shardings,
    to_global,
    writer_mesh,
)


def config_with(**sizes):
    config = default()
    config.data.batch_size = 8
    for axis, size in sizes.items():
        config.mesh[axis] = size
    return config


def test_mesh_takes_all_devices_left():
    mesh = make_mesh(config_with(data=2, tensor=2))
    assert dict(mesh.shape) == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_a_process_writes_on_its_own_devices_whatever_the_size_of_the_pod(monkeypatch):
    mesh = writer_mesh(config_with(slice=2, data=32, tensor=2))
    assert dict(mesh.shape) == {"slice": 1, "data": 1, "fsdp": 4, "tensor": 2}
    few = config_with(fsdp=4)
    few.data.batch_size = 4  # rows of a training step, fewer than devices
    assert writer_mesh(few).size == 8
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[4:6])
    assert writer_mesh(config_with(fsdp=16)).devices.ravel().tolist() == jax.devices()[4:6]
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    assert writer_mesh(config_with(fsdp=16)) is None


def test_mesh_may_use_fewer_devices():
    assert make_mesh(config_with(fsdp=1)).size == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"data": 3},
            "mesh.slice × mesh.data × mesh.tensor = 1 × 3 × 1 does not divide .*: 1, 2, 4, 8",
        ),
        (
            {"data": 4, "fsdp": 4},
            r"\(slice = 1, data = 4, fsdp = 4, tensor = 1\) has 16 devices; 8 are",
        ),
        ({"tensor": 8}, r"mesh.tensor = 8 does not divide model.kv_heads = 4; .* do: 1, 2, 4$"),
        ({"tensor": 16}, "mesh.fsdp = -1: .* = 1 × 1 × 16 does not divide the 8"),
    ],
)
def test_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(config_with(**sizes))


def test_rows_that_cannot_be_split_are_refused():
    config = config_with()
    config.data.batch_size = 12
    with pytest.raises(ConfigError, match="batch_size = 12: 12 rows .* multiple of 8 rows"):
        make_mesh(config)
    config.data.batch_size, config.train.microbatches = 16, 4
    with pytest.raises(ConfigError, match="4 rows .* multiple of 32 rows"):
        make_mesh(config)


def test_rules_refuse_two_axes_on_one_mesh_axis():
    rules = Rules("parameter", {"embed": "fsdp", "mlp": ("tensor", "fsdp"), "layer": None})
    assert rules.spec(("layer", "mlp", None)) == PartitionSpec(None, ("tensor", "fsdp"), None)
    with pytest.raises(
        ConfigError, match="axes 'embed' and 'mlp' .* collide on the mesh axis 'fsdp'"
    ):
        rules.spec(("embed", "mlp"))
    with pytest.raises(ConfigError, match="no parameter rule for the logical axis 'heads'"):
        rules.spec(("heads",))


def test_parameters_are_split_by_their_axes():
    mesh = make_mesh(config_with(fsdp=4, tensor=2))
    axes = {"memory": {"gate": ("layer", "embed", "mlp")}}
    sharding = parameter_shardings(mesh, axes)["memory"]["gate"]
    assert sharding.spec == PartitionSpec(None, "fsdp", "tensor")


def test_to_global_splits_rows_over_data_and_fsdp():
    mesh = make_mesh(config_with(data=2, fsdp=2, tensor=2))
    batch = {"tokens": np.arange(24).reshape(8, 3)}
    array = to_global(mesh, batch, host_rows(mesh, 8), {"tokens": 0})["tokens"]
    assert array.sharding == batch_sharding(mesh)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(np.asarray(array), batch["tokens"])


def test_one_process_loads_all_rows():
    mesh = make_mesh(config_with(data=2))
    np.testing.assert_array_equal(host_rows(mesh, 8).ids, np.arange(8))


def test_rows_of_a_host_need_not_be_neighbours(monkeypatch):
    class Sharding:
        def addressable_devices_indices_map(self, shape):
            return {0: (slice(4, 6),), 1: (slice(0, 2),), 2: (slice(4, 6),)}

    with monkeypatch.context() as patch:
        patch.setattr(mesh_lib, "batch_sharding", lambda mesh: Sharding())
        rows = host_rows(make_mesh(config_with()), 8)
    np.testing.assert_array_equal(rows.ids, [0, 1, 4, 5])
    assert rows.total == 8
