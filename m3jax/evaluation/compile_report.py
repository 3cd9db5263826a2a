"""Compile reports as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_PATHS = {"none": "warmup", "precomputed": "precomputed memories", "online": "online memories"}


def path_of(found: dict[str, Any]) -> str:
    """What was compiled, in words."""
    return "memory writer" if found["program"] == "writer" else _PATHS[found["source"]]


def show(found: dict[str, Any]) -> str:
    """One report as lines of aligned text."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
    head = f"{found['name']}, {path_of(found)}, {found['topology']} ({found['chips']} chips)"
    lines = [head, f"  mesh: {mesh}; microbatches {found['microbatches']}; remat {found['remat']}"]
    memory = found["memory"]
    parts = ", ".join(f"{name} {_gb(memory[name])}" for name in memory if name != "peak")
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    lines.append(
        f"  a chip holds    {_gb(found['peak_bytes_per_chip'])} of {_gb(found['chip_bytes'])}:"
        f" {verdict}" + (f" ({parts})" if parts else "")
    )
    for kind, row in found["collectives"].items():
        lines.append(f"  {kind:<19} {int(row['count']):>6} runs, a chip sends {_gb(row['bytes'])}")
    work = found["flops"]
    lines.append(
        f"  work            {work['useful']:.3e} FLOP useful, {work['executed']:.3e} executed"
        f" ({work['executed_over_useful']:.2f}×)"
    )
    bounds = ", ".join(f"{name} {value:.3f} s" for name, value in found["seconds"].items())
    lines.append(f"  lower bounds    {bounds}; MFU at most {found['mfu_ceiling']:.0%}")
    lines.append(f"  compiled in     {found['compile_seconds']:.0f} s")
    return "\n".join(lines)


def show_search(reports: Sequence[dict[str, Any]]) -> str:
    """The best of several meshes, with the flags that choose it."""
    from m3jax.evaluation.compiled import best

    chosen = best(reports)
    if chosen is None:
        return "none of the meshes fits"
    fields = {f"mesh.{axis}": size for axis, size in chosen["mesh"].items()}
    fields["train.microbatches"] = chosen["microbatches"]
    flags = " ".join(f"--config.{name}={value}" for name, value in fields.items())
    return f"best of {len(reports)}: {flags}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
