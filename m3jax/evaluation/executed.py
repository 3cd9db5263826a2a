"""Counts the matrix products of a traced program: what the devices execute, recomputation included.

XLA's own count takes a loop once and a custom kernel not at all. Here scans count as often as they
run, kernels by what they state, and the bodies of `shard_map` once for every device.
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core


def executed_flops(jaxpr: Any) -> float:
    """FLOP of all products in a jaxpr, over all devices; a multiplication and an addition are two.

    A `while` loop whose length is not known counts once; a `cond` as its dearest branch.

    Args:
      jaxpr: `jax.jit(f).trace(…).jaxpr`.
    """
    return sum(_equation(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        depth = math.prod(left[axis] for axis in contracted)
        return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
    if name == "pallas_call":
        return _kernel(equation)
    if name == "cond":
        return max(executed_flops(branch) for branch in params["branches"])
    inside = sum(executed_flops(jaxpr) for jaxpr in _jaxprs(params))
    if name == "scan":
        return params["length"] * inside
    if name == "shard_map":
        return params["mesh"].size * inside
    return inside


def _kernel(equation: Any) -> float:
    """A kernel's stated cost; without one, its body once for every point of the grid."""
    stated = equation.params.get("cost_estimate")
    if stated is not None:
        return float(stated.flops)
    points = math.prod(equation.params["grid_mapping"].grid)
    return points * sum(executed_flops(jaxpr) for jaxpr in _jaxprs(equation.params))


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """Programs among the parameters of an operation, each once."""
    found = []
    for name, value in params.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):  # derivatives, not run here
            continue
        values = value if isinstance(value, (tuple, list)) else (value,)
        found += [x for x in values if isinstance(x, (core.Jaxpr, core.ClosedJaxpr))]
    return found
