"""XLA flags of the tests."""

from importlib import metadata

# LLVM is asked for one module, not one a core, and without the emitters of fusions, which later
# versions cannot do without: each takes a third of the time away.
OLD_JAX = metadata.version("jaxlib").startswith("0.10.")
QUICK = " --xla_cpu_parallel_codegen_split_count=1"
QUICK += " --xla_cpu_use_fusion_emitters=false" if OLD_JAX else ""


def xla_flags(devices: int) -> str:
    """Returns the flags for a number of virtual devices."""
    return f"--xla_force_host_platform_device_count={devices}{QUICK}"
