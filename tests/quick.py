"""What keeps the tests quick: XLA flags, and marks of parameters whose like are tried anyway."""

from collections.abc import Collection, Iterable
from importlib import metadata
from typing import Any

import pytest

# LLVM is asked for one module, not one a core, and without the emitters of fusions, which later
# versions cannot do without: each takes a third of the time away.
OLD_JAX = metadata.version("jaxlib").startswith("0.10.")
QUICK = " --xla_cpu_parallel_codegen_split_count=1"
QUICK += " --xla_cpu_use_fusion_emitters=false" if OLD_JAX else ""


def xla_flags(devices: int) -> str:
    """Returns the flags for a number of virtual devices."""
    return f"--xla_force_host_platform_device_count={devices}{QUICK}"


def slow_among(values: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """Returns parameters of a test, of which those in `slow` are marked as slow."""
    slow = [*slow]
    return [pytest.param(v, marks=pytest.mark.slow) if v in slow else v for v in values]
