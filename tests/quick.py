"""XLA flags of the tests."""

from importlib import metadata

# LLVM without the emitters of fusions takes half as long; later versions refuse the flag.
OLD_JAX = metadata.version("jaxlib").startswith("0.10.")
QUICK = " --xla_cpu_use_fusion_emitters=false" if OLD_JAX else ""


def xla_flags(devices: int) -> str:
    """Returns the flags for a number of virtual devices."""
    return f"--xla_force_host_platform_device_count={devices}{QUICK}"
