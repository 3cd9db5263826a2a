"""Formats compile reports as text."""

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


def path_of(report: dict[str, Any]) -> str:
    """Returns a readable name of the compiled program, for training that of its memory source."""
    names = {"writer": "memory writer", "decode": "decode"}
    return names.get(report["program"]) or _PATHS[report["source"]]


def compile_text(report: dict[str, Any]) -> str:
    """Formats a report of `compile_report` as lines of aligned text."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
    head = f"{report['name']}, {path_of(report)}, {report['topology']} ({report['chips']} chips)"
    lines = [
        head,
        f"  mesh: {mesh}; microbatches {report['microbatches']}; remat {report['remat']}",
    ]
    memory = report["memory"]
    parts = ", ".join(f"{name} {_gb(memory[name])}" for name in memory if name != "peak")
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    lines.append(
        f"  a chip holds    {_gb(report['peak_bytes_per_chip'])} of {_gb(report['chip_bytes'])}:"
        f" {verdict}" + (f" ({parts})" if parts else "")
    )
    for kind, row in report["collectives"].items():
        lines.append(f"  {kind:<19} {int(row['count']):>6} runs, a chip sends {_gb(row['bytes'])}")
    work = report["flops"]
    lines.append(
        f"  work            {work['useful']:.3e} FLOP useful, {work['executed']:.3e} executed"
        f" ({work['executed_over_useful']:.2f}×)"
    )
    bounds = ", ".join(f"{name} {value:.3g} s" for name, value in report["seconds"].items())
    lines.append(f"  lower bounds    {bounds}; MFU at most {report['mfu_ceiling']:.0%}")
    lines.append(f"  compiled in     {report['compile_seconds']:.0f} s")
    return "\n".join(lines)


def search_text(reports: Sequence[dict[str, Any]]) -> str:
    """Returns a line with the flags of the best report of several meshes."""
    chosen = best_report(reports)
    if chosen is None:
        return "none of the meshes fits"
    fields = {f"mesh.{axis}": size for axis, size in chosen["mesh"].items()}
    fields["train.microbatches"] = chosen["microbatches"]
    fields["model.remat"] = chosen["remat"]
    flags = " ".join(f"--config.{name}={value}" for name, value in fields.items())
    return f"best of {len(reports)}: {flags}"


def compile_table(reports: Sequence[dict[str, Any]]) -> str:
    """Formats reports as a Markdown table with one row per report; a column compares the executed
    FLOP with those of the warmup step on the same slice."""
    lines = [
        "| slice | path | data × fsdp × tensor | microbatches | remat | GB of a chip's |"
        " executed / useful FLOP | executed / warmup's | a chip sends, GB |"
        " lower bounds: compute, memory, interconnect (s) | MFU at most | compiled in (s) |",
        "|---" * 12 + "|",
    ]
    warmup = {
        report["topology"]: report["flops"]["executed"]
        for report in reports
        if report["program"] == "train" and report["source"] == "none"
    }
    for report in reports:
        executed, mesh = report["flops"]["executed"], report["mesh"]
        base = warmup.get(report["topology"])
        held = f"{report['peak_bytes_per_chip'] / 1e9:.1f} of {report['chip_bytes'] / 1e9:.0f}"
        sent = sum(row["bytes"] for row in report["collectives"].values())
        cells = [
            report["topology"],
            path_of(report),
            " × ".join(str(mesh[axis]) for axis in ("data", "fsdp", "tensor")),
            str(report["microbatches"]),
            report["remat"],
            held if report["fits"] else f"{held}: does not fit",
            f"{report['flops']['executed_over_useful']:.3f}",
            f"{executed / base:.3f}" if base else "",
            f"{sent / 1e9:.1f}" if report["collectives"] else "",
            ", ".join(f"{value:.2f}" for value in report["seconds"].values()),
            f"{report['mfu_ceiling']:.0%}",
            f"{report['compile_seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
