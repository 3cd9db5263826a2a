"""Counts the FLOP of the matrix products that a traced program executes, recomputation included.

XLA's own cost analysis counts a loop once and a custom kernel as 0. Here the body of a scan counts
once per iteration, an attention kernel once per block that its mask does not skip, and the body of
a `shard_map` once per device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from jax.extend import core
from ml_collections import ConfigDict

from m3jax.config import PACKED, PREFIX_TOKENS, prefix_tokens
from m3jax.model import splash_mask
from m3jax.model.slots import SlotLayout

Blocks = Mapping[tuple[int, int], int]


def executed_flops(jaxpr: Any, blocks: Blocks | None = None) -> float:
    """Counts the FLOP of a jaxpr over all devices; a multiplication and an addition are two.

    The body of a `while` loop counts once; a `cond` counts as its most expensive branch.

    Args:
      jaxpr: `jax.jit(f).trace(…).jaxpr`.
      blocks: result of `attention_blocks`: the number of blocks that an attention kernel computes,
        by its lengths (query rows, keys). Kernels of other lengths compute their whole grid.
    """
    blocks = blocks or {}
    return sum(_equation(equation, blocks) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def chunks_of_row(config: ConfigDict, tokens: int) -> int:
    """Returns the number of chunks of a row; for packed rows an estimate from above.

    The exact number for packed rows is known only after the chats are packed. Twice the number for
    one text suffices if texts are longer than a chunk on average.
    """
    several = config.data.packing in PACKED
    return tokens // config.memory.chunk_length * (2 if several else 1)


def attention_blocks(config: ConfigDict, *, tokens: int, references: bool) -> Blocks:
    """Counts the blocks that each splash kernel of a config computes.

    Args:
      config: a validated config.
      tokens: length of a row in tokens.
      references: whether the program also encodes references.

    Returns:
      The number of blocks by (query rows, keys) of the kernel, padding included; of kernels of one
      size (groups of layers whose slots are padded to as many keys) the largest number.
    """
    model, memory = config.model, config.memory
    plan = functools.partial(
        splash_mask.plan,
        group=model.query_heads // model.kv_heads,
        block=model.attention_block,
        kv_block=model.attention_kv_block,
        chunk_length=memory.chunk_length,
    )
    context = {"prefix": len(prefix_tokens(config)), "window": memory.window}
    context["packed"] = config.data.packing in PACKED
    layouts = [plan(tokens, **context)]
    if memory.source != "none":
        for group in SlotLayout.of(model, memory).groups:
            slots = memory.per_chunk * group.slots
            chunks = chunks_of_row(config, tokens) if slots else 0
            layouts.append(plan(tokens, chunks=chunks, chunk_slots=slots, **context))
    if references:
        copies = 2 if memory.selection == "reconstruction" else 1
        layouts.append(plan(copies * memory.reference_length, prefix=len(PREFIX_TOKENS)))
    blocks: dict[tuple[int, int], int] = {}
    for layout in layouts:
        size = layout.rows, layout.keys
        computed = splash_mask.pairs(layout)[0] // (layout.block * layout.kv_block)
        blocks[size] = max(computed, blocks.get(size, 0))
    return blocks


def _equation(equation: Any, blocks: Blocks) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        depth = math.prod(left[axis] for axis in contracted)
        return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
    if name == "cond":
        return max(executed_flops(branch, blocks) for branch in params["branches"])
    inside = sum(executed_flops(jaxpr, blocks) for jaxpr in _jaxprs(params))
    if name == "scan":
        return params["length"] * inside
    if name == "shard_map":
        return params["mesh"].size * inside
    if name == "pallas_call":
        return inside * _runs(equation, blocks)
    return inside


def _runs(equation: Any, blocks: Blocks) -> int:
    """Returns how many times a Pallas kernel runs its body: the blocks not skipped, or its grid."""
    grid = equation.params["grid_mapping"].grid
    wide = [x.aval.shape for x in equation.invars if x.aval.ndim > 2 and x.aval.dtype.itemsize > 1]
    if len(wide) > 1 and (wide[0][-2], wide[1][-2]) in blocks:  # queries, keys
        return math.prod(wide[0][:-2]) * blocks[wide[0][-2], wide[1][-2]]
    return math.prod(grid)


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """Lists the jaxprs among the parameters of an equation."""
    jaxprs = []
    for value in params.values():
        values = value if isinstance(value, (tuple, list)) else (value,)
        jaxprs += [x for x in values if isinstance(x, (core.Jaxpr, core.ClosedJaxpr))]
    return jaxprs
