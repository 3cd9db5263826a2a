"""Parses the collectives of a compiled program: bytes that devices send, and number of runs."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_COLLECTIVE = re.compile(r"= (.*?) (" + "|".join(KINDS) + r")(-start)?\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|called_computations|async_execution_thread_call)=\{?%?([\w.-]+)"
)
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      dtype: HLO dtype of its largest array.
      group: number of devices per group.
      operand_bytes: size of the whole array: the result of a gather, or the array to reduce.
      times: number of runs in one run of the program.
      depth: number of nested loops around it.
    """

    kind: str
    dtype: str
    group: int
    operand_bytes: int
    times: int
    depth: int

    @property
    def sent_bytes(self) -> float:
        """Number of bytes that one device sends in all runs with ring algorithms."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * factor * self.operand_bytes


def collectives(text: str) -> list[Collective]:
    """Lists the collectives with more than one device per group.

    Collectives inside loops count once per iteration. The TPU compiler also writes a reduce-scatter
    as an all-reduce in a kernel named `all-reduce-scatter`, and an all-gather that overlaps with
    products as a chain of kernels: they count as one reduce-scatter and one all-gather.

    Args:
      text: `compiled.as_text()`.
    """
    entry, computations = _computations(text)
    crossings: list[Collective] = []
    seen: set[tuple[str, str]] = set()
    for name, line, times, depth in _walk(computations, entry, 1, 0):
        collective = _parse(name, line, times, depth)
        if collective is None or collective.group < 2:
            continue
        if chain := re.search(r'chain_id="(\d+)"', line):
            key = (collective.kind, chain.group(1))
            if key in seen:
                continue
            seen.add(key)
        crossings.append(collective)
    return crossings


def by_kind(crossings: list[Collective]) -> dict[str, dict[str, float]]:
    """Sums, for each kind of collective, the runs (`count`) and the `bytes` that a device sends."""
    table: dict[str, dict[str, float]] = {}
    for collective in crossings:
        row = table.setdefault(collective.kind, {"count": 0, "bytes": 0.0})
        row["count"] += collective.times
        row["bytes"] += collective.sent_bytes
    return dict(sorted(table.items(), key=lambda item: -item[1]["bytes"]))


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """Returns the name of the entry computation, and the instructions of every computation."""
    entry = name = ""
    computations = collections.defaultdict(list)
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            name = start.group(2)
            entry = name if start.group(1) else entry
        elif line.startswith("  "):
            computations[name].append(line)
    if not entry:
        raise ValueError("the text of the compiled program has no ENTRY computation")
    return entry, computations


def _walk(
    computations: dict[str, list[str]], name: str, times: int, depth: int
) -> Iterator[tuple[str, str, int, int]]:
    """Yields (computation, instruction, runs, nesting depth of loops) of all instructions that a
    computation runs, directly or by calls."""
    for line in computations.get(name, []):
        yield name, line, times, depth
        if loop := _WHILE.search(line):
            trips = _trips(computations, line, loop.group(1))
            yield from _walk(computations, loop.group(2), times * trips, depth + 1)
            continue
        if _COLLECTIVE.search(line):
            continue  # its `to_apply` only reduces two scalars
        for called in _CALLED.findall(line):
            yield from _walk(computations, called, times, depth)
        for branches in _BRANCHES.findall(line):
            for called in branches.replace("%", "").split(", "):
                yield from _walk(computations, called, times, depth)


def _trips(computations: dict[str, list[str]], line: str, condition: str) -> int:
    """Returns the trip count of a loop: as the instruction states it, or the only constant in its
    condition; 1 if neither is there."""
    if stated := re.search(r"known_trip_count[^\d]*(\d+)", line):
        return int(stated.group(1))
    constants = {
        int(value)
        for text in computations.get(condition, [])
        for value in re.findall(r"s32\[\][^ ]* constant\((\d+)\)", text)
    }
    return constants.pop() if len(constants) == 1 else 1


def _parse(computation: str, line: str, times: int, depth: int) -> Collective | None:
    """Parses an instruction; returns None if it is not a collective."""
    match = _COLLECTIVE.search(line)
    if match is None:
        return None
    result, kind, start = match.group(1), match.group(2), match.group(3)
    sizes = [(_bytes(dtype, dims), dtype) for dtype, dims in _SHAPE.findall(result)]
    arrays = [(size, dtype) for size, dtype in sizes if dtype not in ("u32", "s32")] or sizes
    # A `-start` instruction lists operands and results; only those of an all-reduce all count.
    whole = sum(size for size, _ in arrays)
    size = max(arrays)[0] if start and kind != "all-reduce" else whole
    group = _group(line)
    if kind == "reduce-scatter":
        size = size if start else size * group  # the result is one of `group` parts
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    return Collective(kind, max(arrays)[1], group, size, times, depth)


def _bytes(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)
    return math.prod(int(size) for size in dims.split(",") if size) * bits // 8


def _group(line: str) -> int:
    """Returns the number of devices per group, from any of HLO's notations of groups."""
    if "source_target_pairs={{" in line:
        return 2
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed.group(1).count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota.group(1))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", named.group(2)))
    return 1
