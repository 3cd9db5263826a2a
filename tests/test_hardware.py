"""The table of accelerators, and libtpu where there is none of its chips."""

import glob
import os
from collections.abc import Callable
from pathlib import Path

import processes
import pytest

from m3jax.errors import ConfigError, MachineError
from m3jax.hardware import (
    LIBTPU_ENVIRONMENT,
    chip_of_kind,
    chip_of_topology,
    quiet_libtpu,
    require_single_precision,
)

SCRIPT = """
import jax
from m3jax import cli
cli.run("", {"": cli.Command(lambda given: print(jax.devices()[0].platform), ())})
"""


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("cpu", None),
        ("TPU v2", None),
    ],
)
def test_peak_of_a_device_kind(kind, peak):
    chip = chip_of_kind(kind)
    assert (None if chip is None else chip.flops) == peak


def test_topology():
    chip, shape = chip_of_topology("v5e:16x16")
    assert (chip.name, shape) == ("v5e", (16, 16))
    assert chip.link_bandwidth * chip.links * 2 == 400e9  # as the data sheet states it
    assert chip_of_topology("v5p:4x4x8")[1] == (4, 4, 8)


@pytest.mark.parametrize("name", ["v5e", "v9:4x4", "h100:2x2", "v5e:4xa", "v5e:0x4", "v5e:4x²", ""])
def test_unknown_topology_lists_the_chips(name):
    with pytest.raises(ConfigError, match=r"chips: v4, v5e, v5p, v6e; .* v5e:16x16"):
        chip_of_topology(name)


@pytest.mark.parametrize(("name", "example"), [("v5e:4x4x4", "v5e:4x4"), ("v5p:4x4", "v5p:4x4x4")])
def test_topology_of_wrong_dimensions(name, example):
    with pytest.raises(ConfigError, match=f"as in {example}$"):
        chip_of_topology(name)


def test_libtpu_is_told_of_a_slice_only_where_there_is_no_tpu(monkeypatch: pytest.MonkeyPatch):
    for name in LIBTPU_ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that what is set below ends with the test
        monkeypatch.delenv(name)
    for device in ("/dev/accel0", "/dev/vfio/0"):
        monkeypatch.setattr(
            glob, "glob", lambda pattern, d=device: [d] * d.startswith(pattern[:-1])
        )
        quiet_libtpu()
        assert not set(LIBTPU_ENVIRONMENT) & set(os.environ)
    monkeypatch.setattr(glob, "glob", lambda pattern: [])
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-8")  # of the user
    quiet_libtpu()
    expected = {**LIBTPU_ENVIRONMENT, "TPU_ACCELERATOR_TYPE": "v6e-8"}
    assert {name: os.environ[name] for name in LIBTPU_ENVIRONMENT} == expected


@pytest.mark.parity
def test_scripts_print_nothing_of_libtpu(require: Callable) -> None:
    """The runtime looks for a TPU, finds none, and JAX goes on in silence."""
    require("libtpu")
    unset = {"JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL", *LIBTPU_ENVIRONMENT}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = processes.call(["python", "-c", SCRIPT], inherit=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("setting", ["1", "true", "On", "nonsense"])
def test_arrays_of_64_bits_are_refused(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_ENABLE_X64", setting)
    with pytest.raises(MachineError, match=f"^JAX_ENABLE_X64={setting}: .*; unset it$"):
        require_single_precision()
    for allowed in ("", "0", "False", "off"):
        monkeypatch.setenv("JAX_ENABLE_X64", allowed)
        require_single_precision()
