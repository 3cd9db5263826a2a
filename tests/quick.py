"""XLA flags of the tests."""


def xla_flags(devices: int) -> str:
    """For so many virtual devices; LLVM without the emitters of fusions takes half as long."""
    return f"--xla_force_host_platform_device_count={devices} --xla_cpu_use_fusion_emitters=false"
