"""Compile reports as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m3jax.aot.compile import best_report

_PATHS = {
    "none": "warmup",
    "precomputed": "precomputed memories",
    "online": "online memories",
    "stop_gradient": "online memories without gradient",
}


def path_of(found: dict[str, Any]) -> str:
    """What was compiled, in words."""
    names = {"writer": "memory writer", "decode": "decode"}
    return names.get(found["program"]) or _PATHS[found["source"]]


def compile_text(found: dict[str, Any]) -> str:
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
    bounds = ", ".join(f"{name} {value:.3g} s" for name, value in found["seconds"].items())
    lines.append(f"  lower bounds    {bounds}; MFU at most {found['mfu_ceiling']:.0%}")
    lines.append(f"  compiled in     {found['compile_seconds']:.0f} s")
    return "\n".join(lines)


def search_text(reports: Sequence[dict[str, Any]]) -> str:
    """The best of several meshes, with the flags that choose it."""
    chosen = best_report(reports)
    if chosen is None:
        return "none of the meshes fits"
    fields = {f"mesh.{axis}": size for axis, size in chosen["mesh"].items()}
    fields["train.microbatches"] = chosen["microbatches"]
    fields["model.remat"] = chosen["remat"]
    flags = " ".join(f"--config.{name}={value}" for name, value in fields.items())
    return f"best of {len(reports)}: {flags}"


def compile_table(reports: Sequence[dict[str, Any]]) -> str:
    """A table of docs/performance.md: a row for every report, compared with the slice's warmup."""
    lines = [
        "| slice | path | data × fsdp × tensor | microbatches | remat | GB of a chip's |"
        " executed / useful FLOP | executed / warmup's | a chip sends, GB |"
        " lower bounds: compute, memory, interconnect (s) | MFU at most | compiled in (s) |",
        "|---" * 12 + "|",
    ]
    warmup = {
        found["topology"]: found["flops"]["executed"]
        for found in reports
        if found["program"] == "train" and found["source"] == "none"
    }
    for found in reports:
        executed, mesh = found["flops"]["executed"], found["mesh"]
        base = warmup.get(found["topology"])
        held = f"{found['peak_bytes_per_chip'] / 1e9:.1f} of {found['chip_bytes'] / 1e9:.0f}"
        sent = sum(row["bytes"] for row in found["collectives"].values())
        cells = [
            found["topology"],
            path_of(found),
            " × ".join(str(mesh[axis]) for axis in ("data", "fsdp", "tensor")),
            str(found["microbatches"]),
            found["remat"],
            held if found["fits"] else f"{held}: does not fit",
            f"{found['flops']['executed_over_useful']:.3f}",
            f"{executed / base:.3f}" if base else "",
            f"{sent / 1e9:.1f}" if found["collectives"] else "",
            ", ".join(f"{value:.2f}" for value in found["seconds"].values()),
            f"{found['mfu_ceiling']:.0%}",
            f"{found['compile_seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
