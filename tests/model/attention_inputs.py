"""Inputs of the attention; random ones for the TPU kernel, of rows of one text and of several."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.model.attention import attend
from m3jax.model.attention_mask import ExplicitMemory, KeyValues, Packing, Scope


class Case(NamedTuple):
    """Shapes of a call; M = 0 is no memory, prefix = 0 none."""

    H: int = 16
    T: int = 150
    B: int = 1
    K: int = 1
    G: int = 3
    M: int = 1
    P: int = 4
    prefix: int = 2
    chunk: int = 16
    window: int = 5
    block: int = 128
    kv_block: int = 128


class Inputs(NamedTuple):
    """Arguments of `attend` that gradients flow to."""

    q: Any
    k: Any
    v: Any
    prefix: KeyValues | None
    keys: Any
    values: Any


def make_inputs(
    case: Case, chunks: int | None = None, dtype: Any = jnp.float32
) -> tuple[Inputs, np.ndarray]:
    """Random arrays, and lengths from 0 to P; chunks of a row, default those of one text.

    Of one text the first and the last chunk of the first row are empty.
    """
    random = np.random.default_rng(case.H + case.T)
    C = -(-case.T // case.chunk) if chunks is None else chunks

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), dtype)

    context = (case.B, case.T, case.K)
    slots = (case.B, C, case.M, case.K, case.P, case.H)
    length = random.integers(0, case.P + 1, (case.B, C, case.M)).astype(np.int32)
    if chunks is None:
        length[0, [0, -1]] = 0
    prefix = KeyValues(*(array(case.prefix, case.K, case.H) for _ in range(2)))
    return Inputs(
        array(*context, case.G, case.H),
        array(*context, case.H),
        array(*context, case.H),
        prefix if case.prefix else None,
        array(*slots) if case.M else None,
        array(*slots) if case.M else None,
    ), length


def attended(
    inputs: Inputs, length: Any, case: Case, packing: Packing | None = None, **options: Any
) -> Any:
    """The attention of the inputs."""
    memory = None if inputs.keys is None else ExplicitMemory(inputs.keys, inputs.values, length)
    options = {"block": case.block, "kv_block": case.kv_block, **options}
    shape = {"chunk_length": case.chunk, "window": case.window}
    scope = Scope(inputs.prefix, memory, packing, **shape)
    return attend(*inputs[:3], scope, **options)


@partial(jax.jit, static_argnames=("case", "implementation"))
def value_and_gradients(
    inputs: Inputs,
    length: Any,
    weights: Any,
    case: Case,
    packing: Packing | None = None,
    **options: Any,
) -> Any:
    """The attention, and the gradients of its weighted sum."""

    def loss(inputs: Inputs) -> tuple[Any, Any]:
        out = attended(inputs, length, case, packing, **options)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    gradients, out = jax.grad(loss, has_aux=True)(inputs)
    return out, gradients


def weights(inputs: Inputs) -> Any:
    """Of the sum that is differentiated."""
    return np.random.default_rng(9).normal(size=inputs.q.shape).astype(np.float32)
