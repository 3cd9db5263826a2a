"""Data-sheet figures of accelerators, and the settings with which JAX starts on them."""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import os
from pathlib import Path

from m3jax.errors import ConfigError, MachineError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data-sheet figures of one accelerator, as one JAX device.

    Attributes:
      name: short name such as `v5e`; for TPUs the part of a topology's name before the colon.
      kinds: substrings, any of which identifies the chip in JAX's `device_kind` in lower case.
      flops: peak of dense matrix products in bfloat16, FLOP/s.
      memory: size of the high-bandwidth memory, bytes.
      memory_bandwidth: bandwidth of that memory, bytes/s.
      link_bandwidth: bandwidth of one interconnect link in one direction, bytes/s; 0 for chips
        whose interconnect is not modelled.
      links: number of links of a chip, two per dimension of the torus; 0 for the same chips.
      network: bandwidth of the host's network divided by its chips, bytes/s; 0 if the data sheet
        has none.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float = 0.0
    links: int = 0
    network: float = 0.0


# Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e) and NVIDIA's data sheets. The interconnect
# there is given in both directions and over all links: v5e 400 GB/s = 4 links · 2 · 50 GB/s. The
# network is that of a physical host of 8 chips: 2 × 100 Gbit/s (v5e), 4 × 200 Gbit/s (v6e).
_GB = 1e9
CHIPS = (
    Chip("v4i", ("tpu v4 lite",), 138e12, 8 * _GB, 614 * _GB),
    Chip("v4", ("tpu v4",), 275e12, 32 * _GB, 1228 * _GB, 50 * _GB, 6),
    Chip("v5e", ("tpu v5 lite", "tpu v5e"), 197e12, 16 * _GB, 819 * _GB, 50 * _GB, 4, 25e9 / 8),
    Chip("v5p", ("tpu v5",), 459e12, 95 * _GB, 2765 * _GB, 100 * _GB, 6),
    Chip("v6e", ("tpu v6",), 918e12, 32 * _GB, 1638 * _GB, 100 * _GB, 4, 100e9 / 8),
    Chip("a100", ("a100",), 312e12, 80 * _GB, 2039 * _GB),
    Chip("h100-pcie", ("h100 pcie",), 756e12, 80 * _GB, 2000 * _GB),
    Chip("h100-nvl", ("h100 nvl",), 835e12, 94 * _GB, 3900 * _GB),
    Chip("h100", ("h100",), 989.4e12, 80 * _GB, 3350 * _GB),
    Chip("h200-nvl", ("h200 nvl",), 835e12, 141 * _GB, 4800 * _GB),
    Chip("h200", ("h200",), 989.4e12, 141 * _GB, 4800 * _GB),
)


def chip_of_kind(device_kind: str) -> Chip | None:
    """Returns the chip of a `device_kind` of JAX, or None if the table has no such chip."""
    kind = device_kind.lower()
    return next((chip for chip in CHIPS if any(part in kind for part in chip.kinds)), None)


def chip_of_topology(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """Parses the name of a TPU slice such as `v5e:16x16` into its chip and shape.

    Raises:
      ConfigError: the name is not CHIP:SHAPE, the chip is unknown, or the shape has another number
        of dimensions than the chip's torus. The message lists chips and examples.
    """
    name, _, shape = topology.partition(":")
    chip = next((chip for chip in CHIPS if chip.name == name and chip.links), None)
    sizes = shape.split("x")
    if chip is None or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        known = ", ".join(chip.name for chip in CHIPS if chip.links)
        raise ConfigError(
            f"topology {topology!r} is not CHIP:SHAPE; chips: {known}; shapes are chips along each"
            " dimension of the slice, for example v5e:4x4, v5e:16x16, v6e:16x16 (two dimensions),"
            " v4:2x2x1, v5p:4x4x8 (three)"
        )
    if len(sizes) != chip.links // 2:
        raise ConfigError(
            f"topology {topology!r}: a {chip.name} slice has {chip.links // 2} dimensions, as in"
            f" {chip.name}:{'x'.join(['4'] * (chip.links // 2))}"
        )
    return chip, tuple(int(size) for size in sizes)


# Environment of libtpu on a host without a TPU. The slice in it is arbitrary: libtpu then compiles
# for other slices, too.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def require_single_precision() -> None:
    """Raises `MachineError` if the environment makes JAX compute with 64 bits."""
    setting = os.environ.get("JAX_ENABLE_X64", "")
    if setting.lower() not in ("", "0", "false", "no", "n", "f", "off"):
        raise MachineError(f"JAX_ENABLE_X64={setting}: arrays have at most 32 bits here; unset it")


def require_devices() -> None:
    """Initializes JAX's devices, which raises an error where the platform that is set has none.

    For scripts that do long work before they use one.
    """
    import jax

    jax.devices()


def quiet_libtpu() -> None:
    """Silences libtpu on a host without a TPU, where it would print errors about missing metadata.

    Call it before JAX initializes its backends. JAX then finds no TPU, and all other devices.
    """
    if not glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*"):
        for name, value in LIBTPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def use_compilation_cache(folder: Path | str | None) -> None:
    """Makes JAX store compiled programs in a folder or bucket and reuse them; None changes nothing.

    Raises:
      ConfigError: it is a bucket and gcsfs is missing.
    """
    import jax

    if folder is None:
        return
    if isinstance(folder, str):
        if importlib.util.find_spec("gcsfs") is None:
            raise ConfigError(f"--compilation_cache={folder}: pip install gcsfs, which reads gs://")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        folder = str(folder.absolute())
    jax.config.update("jax_compilation_cache_dir", folder)
