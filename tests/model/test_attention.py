"""`attend` against an explicit concatenation of the keys each query sees, mask tables, memory."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.attention_inputs import Inputs
from quick import slow_among
from tolerance import close

from m3jax.model.attention import attend, attention_weights, resolve
from m3jax.model.attention_mask import ExplicitMemory, KeyValues, Scope, memory_mask

B, T, K, G, H, P = 2, 7, 2, 2, 4, 3
CHUNK = 3


def make_inputs(M: int, prefix: int = 2, dtype: Any = jnp.float32) -> tuple[Inputs, np.ndarray]:
    """Random inputs of 3 chunks (the last one cut short) and lengths 0 … P of the memories."""
    random = np.random.default_rng(M)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), dtype)

    C = -(-T // CHUNK)
    length = np.resize([3, 1, 0, 2, 3], (B, C, M)).astype(np.int32)
    constant = KeyValues(array(prefix, K, H), array(prefix, K, H)) if prefix else None
    memories = array(B, C, M, K, P, H), array(B, C, M, K, P, H)
    inputs = Inputs(array(B, T, K, G, H), array(B, T, K, H), array(B, T, K, H), constant, *memories)
    return inputs, length


def concatenated(inputs: Inputs, length: np.ndarray, window: int) -> Any:
    """Every query alone, over the list of keys it sees: no mask anywhere."""
    rows = []
    for b in range(B):
        for t in range(T):
            seen = [] if inputs.prefix is None else [inputs.prefix]
            for c in range(max(0, t // CHUNK - window + 1), t // CHUNK + 1):
                for m in range(length.shape[2]):
                    real = length[b, c, m]
                    pair = inputs.keys[b, c, m, :, :real], inputs.values[b, c, m, :, :real]
                    seen.append(KeyValues(*(jnp.swapaxes(x, 0, 1) for x in pair)))
            seen.append(KeyValues(inputs.k[b, : t + 1], inputs.v[b, : t + 1]))
            keys, values = (jnp.concatenate(part) for part in zip(*seen, strict=True))
            weights = jax.nn.softmax(jnp.einsum("KGH,SKH->KGS", inputs.q[b, t], keys) / H**0.5)
            rows.append(jnp.einsum("KGS,SKH->KGH", weights, values))
    return jnp.stack(rows).reshape(B, T, K, G, H)


def attended(inputs: Inputs, length: np.ndarray, window: int, **options: Any) -> Any:
    memory = ExplicitMemory(inputs.keys, inputs.values, length)
    scope = Scope(inputs.prefix, memory, chunk_length=CHUNK, window=window)
    return attend(*inputs[:3], scope, **options)


jitted = jax.jit(attended, static_argnames=("window", "implementation", "block"))


def value_and_gradients(function: Any, inputs: Inputs, length: np.ndarray) -> tuple[Any, Inputs]:
    weights = np.random.default_rng(9).normal(size=inputs.q.shape).astype(np.float32)

    def loss(inputs: Inputs) -> tuple[Any, Any]:
        out = function(inputs, length)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    return out, gradients


@pytest.mark.parametrize(
    ("window", "M", "prefix"),
    [(1, 5, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 1, 0), (5, 1, 2)])],
)
def test_equals_explicit_concatenation(window: int, M: int, prefix: int) -> None:
    """Values and gradients: the oracle, the call behind cuDNN, and blocks that do not divide T."""
    inputs, length = make_inputs(M, prefix)
    expected, wanted = value_and_gradients(partial(concatenated, window=window), inputs, length)
    cases: list[dict[str, Any]] = [{"implementation": "naive"}, {"implementation": "xla"}]
    cases += [
        {"implementation": "blocked", "block": block} for block in (3, 8)
    ]  # 8 spans two chunks
    for options in cases:
        found, gradients = value_and_gradients(
            partial(attended, window=window, **options), inputs, length
        )
        close(found, expected, what=str(options))
        for name, gradient, want in zip(Inputs._fields, gradients, wanted, strict=True):
            for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True):
                close(ours, theirs, what=f"{name}, {options}")


@pytest.mark.parametrize("block", slow_among([2, 7], [2]))
def test_blocked_equals_naive_without_prefix_and_memory(block: int) -> None:
    inputs, _ = make_inputs(1)
    arguments = inputs.q, inputs.k, inputs.v
    close(
        attend(*arguments, implementation="blocked", block=block),
        attend(*arguments, implementation="naive"),
        1e-6,
    )


@pytest.mark.parametrize("prefix", [0, 2])
def test_fused_equals_naive_without_memory(prefix: int) -> None:
    """The causal mask of the kernel serves, with queries to throw away in front."""
    inputs, length = make_inputs(1, prefix)

    def attention(inputs: Inputs, length: Any, implementation: str) -> Any:
        return attend(*inputs[:3], Scope(inputs.prefix), implementation=implementation)

    expected = value_and_gradients(partial(attention, implementation="naive"), inputs, length)
    fused = partial(attention, implementation="xla")
    found = value_and_gradients(fused, inputs, length)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(ours, theirs)
    program = str(jax.make_jaxpr(fused)(inputs, length))
    assert f"{T + prefix},{T + prefix}]" in program  # square: causal from corner to corner


def test_what_an_implementation_cannot_take_is_named() -> None:
    inputs, length = make_inputs(1)
    with pytest.raises(ValueError, match="implementation 'fused'; known: naive, blocked, splash"):
        attended(inputs, length, 1, implementation="fused")
    with pytest.raises(ValueError, match="takes bfloat16 or float16, not float32; set model.comp"):
        attended(inputs, length, 1, implementation="cudnn")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
    with pytest.raises(ValueError, match="multiple of 8 up to 128, not 4; set model.attention"):
        attended(half, length, 1, implementation="cudnn")


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "expected"),
    [
        ("tpu", "float32", 80, "splash"),
        ("gpu", "bfloat16", 80, "cudnn"),
        ("cuda", "float16", 128, "cudnn"),
        ("gpu", "float32", 80, "blocked"),
        ("gpu", "bfloat16", 136, "blocked"),
        ("gpu", "bfloat16", 20, "blocked"),
        ("rocm", "bfloat16", 80, "blocked"),
        ("cpu", "bfloat16", 80, "blocked"),
    ],
)
def test_auto_takes_the_fastest(platform: str, dtype: str, head_dim: int, expected: str) -> None:
    assert resolve("auto", platform, dtype, head_dim) == expected
    assert resolve("naive", platform, dtype, head_dim) == "naive"


# -- the mask

# One row of 3 chunks of 2 tokens. Columns: slots, chunk-major; P = 2 slots a memory.
SHORT = [[2], [1], [0]]  # lengths of one memory a chunk: full, short, empty
TABLES = {
    (1, 1): [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ],
    (2, 1): [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
    ],
    (5, 1): [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
    ],
    (1, 5): [  # two chunks of five memories: lengths 2 1 0 2 1 and 0 2 2 1 1
        [1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0],
    ],
    (2, 5): [
        [1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0],
    ],
}
FIVE = [[2, 1, 0, 2, 1], [0, 2, 2, 1, 1]]


@pytest.mark.parametrize(("window", "M"), list(TABLES))
def test_mask_tables(window: int, M: int) -> None:
    length = np.array([SHORT if M == 1 else FIVE], np.int32)
    keys = np.zeros((*length.shape, 1, 2, 1), np.float32)
    table = np.array(TABLES[window, M], bool)
    memory = ExplicitMemory(keys, keys, length)
    scope = Scope(None, memory, chunk_length=2, window=window)
    found = memory_mask(jnp.arange(len(table)), scope)
    np.testing.assert_array_equal(found, table[None])
    # A part of the row that begins at chunk 1 sees the same.
    rest = jax.tree.map(lambda x: x[:, 1:], memory)
    scope = dataclasses.replace(scope, memory=rest, low=1)
    part = memory_mask(jnp.arange(2, len(table)), scope)
    np.testing.assert_array_equal(part[0], table[2:, 2 * M :])


@pytest.mark.parametrize("implementation", ["naive", "blocked", "xla"])
def test_invalid_slots_take_no_attention(implementation: str) -> None:
    """Whatever lies in the slots past the length, even where a finite mask could be outweighed."""
    inputs, length = make_inputs(2)
    invalid = (np.arange(P) >= length[..., None])[:, :, :, None, :, None]
    options: dict[str, Any] = {"window": 2, "implementation": implementation, "block": 3}
    before = jitted(inputs, length, **options)
    poisoned = inputs._replace(
        keys=jnp.where(invalid, np.float32(1e4), inputs.keys),
        values=jnp.where(invalid, np.float32(1e6), inputs.values),
    )
    np.testing.assert_array_equal(jitted(poisoned, length, **options), before)
    memory = ExplicitMemory(poisoned.keys, poisoned.values, length)
    scope = Scope(inputs.prefix, memory, chunk_length=CHUNK, window=2)
    weights = attention_weights(inputs.q, inputs.k, scope)
    close(weights.sum(-1), 1)
    slots = np.asarray(weights[..., 2:-T]).reshape(B, K, G, T, 3, 2, P)
    assert not np.where((np.arange(P) >= length[..., None])[:, None, None, None], slots, 0).any()
    assert slots.max() > 0.1


@pytest.mark.parametrize("implementation", ["naive", "blocked"])
def test_causality_by_gradient(implementation: str) -> None:
    inputs, length = make_inputs(1)

    @jax.jit
    def reached(weight_T: Any) -> Inputs:
        """Gradient of chosen tokens' outputs."""
        return jax.grad(
            lambda x: jnp.sum(
                attended(x, length, 2, implementation=implementation, block=3)
                * weight_T[None, :, None, None, None]
            )
        )(inputs)

    for t in range(T):
        gradient = reached(jnp.arange(T) == t)
        for part in (gradient.k, gradient.v):
            tokens = np.abs(part).max((0, 2, 3)) > 0
            assert not tokens[t + 1 :].any() and (t == 0 or tokens[: t + 1].all())
        queries = np.abs(gradient.q).max((0, 2, 3, 4)) > 0
        assert not queries[np.arange(T) != t].any()
        own = t // CHUNK
        chunks = np.abs(gradient.values).max((0, 2, 3, 4, 5)) > 0
        visible = [own - 2 < c <= own and length[:, c].any() for c in range(3)]
        np.testing.assert_array_equal(chunks, visible)
        assert np.abs(gradient.prefix.values).min() > 0


def test_rows_do_not_meet() -> None:
    inputs, length = make_inputs(1)
    turned = Inputs(*(x[::-1] for x in inputs[:3]), inputs.prefix, *(x[::-1] for x in inputs[4:]))
    found = jitted(turned, length[::-1], window=2)
    np.testing.assert_array_equal(found[::-1], jitted(inputs, length, window=2))


@pytest.mark.parametrize("implementation", ["naive", "blocked", "xla"])
def test_bfloat16(implementation: str) -> None:
    inputs, length = make_inputs(1)
    options: dict[str, Any] = {"implementation": implementation, "block": 5}
    expected, wanted = value_and_gradients(partial(attended, window=2, **options), inputs, length)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
    found, gradients = value_and_gradients(partial(attended, window=2, **options), half, length)
    assert found.dtype == jnp.bfloat16
    for ours, theirs in [(found, expected), *zip(gradients, wanted, strict=True)]:
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            error = np.linalg.norm(np.asarray(x, np.float32) - y) / np.linalg.norm(y)
            assert error < 2e-2


# -- memory


def _largest(jaxpr: Any, T: int) -> int:
    """The largest product of two axes that are both ≥ T, over all arrays of a program."""
    largest = 0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            sizes = sorted(getattr(variable.aval, "shape", ()))[-2:]
            if len(sizes) == 2 and sizes[0] >= T:
                largest = max(largest, sizes[0] * sizes[1])
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                largest = max(largest, _largest(inner, T))
    return largest


@pytest.mark.parametrize("gradient", [False, True])
def test_blocked_never_holds_a_square_of_scores(gradient: bool) -> None:
    length_T, block = 64, 16

    def arrays(implementation: str) -> int:
        def loss(q: Any, k: Any, v: Any, memory: Any) -> Any:
            slots = ExplicitMemory(*memory, np.full((B, 8, 1), P, np.int32))
            scope = Scope(None, slots, chunk_length=8, window=2)
            return jnp.sum(attend(q, k, v, scope, implementation=implementation, block=block))

        shapes = [(B, length_T, K, G, H), (B, length_T, K, H), (B, length_T, K, H)]
        memory = [jnp.zeros((B, 8, 1, K, P, H))] * 2
        function = jax.grad(loss, argnums=(0, 1, 2, 3)) if gradient else loss
        program = jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes), memory)
        return _largest(program.jaxpr, length_T)

    assert arrays("naive") >= length_T**2  # the test sees a square where there is one
    assert arrays("blocked") == 0
