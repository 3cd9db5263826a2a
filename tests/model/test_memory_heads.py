"""Heads with numbers of memory slots of their own: they see these, by every way of attending."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.oracle import (
    Oracle,
    Reader,
    oracle_config,
    random_params,
    random_references,
    random_tokens,
)
from model.test_attention import (
    CHUNK,
    B,
    G,
    H,
    Inputs,
    K,
    P,
    T,
    make_inputs,
    value_and_gradients,
)
from model.test_decode import CHUNK as DECODED
from model.test_decode import LENGTHS, M, expected, generated, memories, tiny
from model.test_transformer import (
    _batch,
    _check_gradients,
    _directional,
    _oracle_logits,
    _written,
    logits,
)
from quick import slow_among
from tolerance import close, close_trees

from m3jax.config import PREFIX_TOKENS
from m3jax.make_model import make_model
from m3jax.model.attention import attend, attention_weights
from m3jax.model.attention_mask import ExplicitMemory, KeyValues, Packing, Scope
from m3jax.model.slots import SlotLayout


def listed(inputs: Inputs, length: np.ndarray, window: int, counts: np.ndarray) -> Any:
    """Every query and head alone, over the list of keys that it sees."""
    rows = []
    for b in range(B):
        for t in range(T):
            for k in range(K):
                seen = [] if inputs.prefix is None else [[x[:, k] for x in inputs.prefix]]
                for c in range(max(0, t // CHUNK - window + 1), t // CHUNK + 1):
                    for m in range(length.shape[2]):
                        real = min(length[b, c, m], counts[k])
                        sides = inputs.keys, inputs.values
                        seen.append([x[b, c, m, k, :real] for x in sides])
                seen.append([x[b, : t + 1, k] for x in (inputs.k, inputs.v)])
                keys, values = (jnp.concatenate(part) for part in zip(*seen, strict=True))
                weights = jax.nn.softmax(inputs.q[b, t, k] @ keys.T / H**0.5)
                rows.append(weights @ values)
    return jnp.stack(rows).reshape(B, T, K, G, H)


def attended(inputs: Inputs, length: Any, window: int, counts: Any, **options: Any) -> Any:
    memory = ExplicitMemory(inputs.keys, inputs.values, length)
    scope = Scope(inputs.prefix, memory, counts=counts, chunk_length=CHUNK, window=window)
    return attend(*inputs[:3], scope, **options)


WAYS: list[dict[str, Any]] = [
    {"implementation": "naive"},
    {"implementation": "blocked", "block": 3},
    {"implementation": "xla"},
    {"implementation": "splash_interpret", "block": 128, "kv_block": 128},
]


@pytest.mark.parametrize("counts", slow_among([(P, 0), (1, 2), (0, 0)], [(P, 0), (0, 0)]), ids=str)
def test_a_head_sees_the_first_slots_of_a_memory(counts: tuple[int, ...]) -> None:
    """Values and gradients; counts are an argument of the program, as in a scan over layers."""
    inputs, length = make_inputs(2)
    array = np.array(counts)
    expect, wanted = value_and_gradients(partial(listed, window=2, counts=array), inputs, length)
    for options in WAYS:
        found, gradients = value_and_gradients(
            partial(attended, window=2, counts=jnp.asarray(array), **options), inputs, length
        )
        close(found, expect, what=str(options))
        for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
            close(ours, theirs, what=str(options))
        for k, count in enumerate(counts):
            assert not gradients.keys[:, :, :, k, count:].any()
            assert not count or gradients.keys[:, :, :, k, count - 1].any()


@pytest.mark.parametrize(
    "options", slow_among(WAYS, WAYS[1:]), ids=lambda way: way["implementation"]
)
def test_all_slots_of_all_heads_are_what_no_counts_are(options: dict[str, Any]) -> None:
    inputs, length = make_inputs(1)
    plain = attended(inputs, length, 5, None, **options)
    for count in (P, P + 1):
        found = attended(inputs, length, 5, jnp.full(K, count), **options)
        np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("way", slow_among(WAYS, WAYS[1:]), ids=lambda way: way["implementation"])
def test_texts_of_a_packed_row(way: dict[str, Any]) -> None:
    """Two texts a row, whose chunks begin with them; each against a row of its own."""
    inputs, length = make_inputs(2)
    packing = Packing(
        jnp.array([[0, 0, 0, 0, 4, 4, 4]] * B), jnp.array([[0, 0, 0, 0, 2, 2, 2]] * B)
    )
    counts = jnp.array([0, 2])
    memory = ExplicitMemory(inputs.keys, inputs.values, length)
    scope = Scope(inputs.prefix, memory, packing, counts, chunk_length=CHUNK, window=2)
    found = attend(*inputs[:3], scope, **way)
    for low, high, chunks in ((0, 4, slice(0, 2)), (4, 7, slice(2, 3))):
        own = (x[:, low:high] for x in inputs[:3])
        part = jax.tree.map(lambda x, c=chunks: x[:, c], memory)
        alone = attend(*own, dataclasses.replace(scope, memory=part, packing=None))
        close(found[:, low:high], alone)


def test_attention_weights_of_slots_that_a_head_has_not_are_zero() -> None:
    inputs, length = make_inputs(1)
    memory = ExplicitMemory(inputs.keys, inputs.values, length)
    scope = Scope(inputs.prefix, memory, counts=jnp.array([2, 0]), chunk_length=CHUNK, window=5)
    weights = attention_weights(inputs.q, inputs.k, scope)
    slots = weights[..., 2 : 2 + length[0].size * P].reshape(B, K, G, T, -1, P)
    assert slots[:, 0, ..., 1].any() and not slots[:, 0, ..., 2].any() and not slots[:, 1].any()
    close(weights.sum(-1), 1)


@pytest.mark.slow
def test_prefixless_heads() -> None:
    """A head that sees neither memories nor a prefix still sees the context."""
    inputs, length = make_inputs(1, 0)
    counts = np.array([0, P])
    close(attended(inputs, length, 5, jnp.asarray(counts)), listed(inputs, length, 5, counts))
    assert isinstance(inputs.prefix, KeyValues | None)


# -- the model

GROUPS = {"model__layers": 5, "memory__first_layer": 1, "memory__layers": 4}
CASES: dict[str, dict[str, Any]] = {
    "some heads": {"memory__heads": "0:1,1:0"},
    "counts": {"memory__counts": "0:1+5,1:3+2"},
    "a layer without slots first, blocked": {
        "memory__counts": "1:2+7",
        "model__attention": "blocked",
        "model__attention_block": 4,
    },
    "a layer without slots last": {"memory__heads": "0", "memory__window": 1},
    "layers without slots between and last": {**GROUPS, "memory__counts": "1:1+5,3:0+3"},
    "layers without slots between, splash": {
        **GROUPS,
        "memory__counts": "1:7+7,4:2+3",
        "model__attention": "splash_interpret",
        "model__remat": "full",
    },
    "a copy, all layers": {
        "memory__layers": 3,
        "memory__selection": "reconstruction",
        "memory__each": 2,
        "memory__counts": "0:1+5,1:2+2,2:7+0",
        "model__remat": "dots",
    },
}
QUICK = ("counts",)  # the others are slow


@pytest.mark.parametrize("name", slow_among(CASES, [name for name in CASES if name not in QUICK]))
def test_reading_equals_loops_in_which_a_head_has_its_own_slots(name: str) -> None:
    config = oracle_config(**CASES[name])
    params = random_params(config)
    tokens, references = _batch(config, 1)
    expect = _oracle_logits(config, params, tokens, references)
    memory = _written(config, params, references)
    slots = SlotLayout.of(config.model, config.memory)
    assert not slots.uniform and memory.keys.shape == (1, 2, 3, 1, 1, slots.size, 4)
    close(logits(config, params, tokens, memory), expect)
    close(logits(config, params, tokens, reference_tokens=references), expect)
    changes = {**CASES[name], "memory__heads": "", "memory__counts": "", "memory__each": 0}
    whole = oracle_config(**changes, memory__kept_tokens=slots.largest)
    others = logits(whole, params, tokens, reference_tokens=references)
    assert np.abs(np.asarray(others) - expect).max() > 0.01


def test_groups_of_layers_are_as_many_as_the_cases_say() -> None:
    def layers(name: str) -> list[tuple[int, int]]:
        config = oracle_config(**CASES[name])
        return [(g.layers, g.slots) for g in SlotLayout.of(config.model, config.memory).groups]

    assert layers("counts") == [(1, 5), (1, 3)]
    assert layers("layers without slots between and last") == [(1, 5), (1, 0), (1, 3), (1, 0)]
    assert layers("layers without slots between, splash") == [(1, 7), (2, 0), (1, 3)]


@pytest.mark.parametrize(
    "one",
    [
        {"memory__heads": "0,1:1+0"},
        {"memory__counts": "0:3+3,1:3+3"},
        {"memory__counts": "1:3+3, 0:3+3", "memory__kept_tokens": 7},
    ],
    ids=str,
)
def test_naming_equal_counts_of_all_heads_names_none(one: dict[str, Any]) -> None:
    plain, named = oracle_config(), oracle_config(**one)
    assert make_model(named, PREFIX_TOKENS).slots == make_model(plain, PREFIX_TOKENS).slots
    params = random_params(plain)
    tokens, references = _batch(plain, 1)
    a, b = (logits(c, params, tokens, reference_tokens=references) for c in (plain, named))
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_heads_that_are_hidden_for_a_pass_read_nothing() -> None:
    """`memory_heads` of a pass takes slots from heads, and gives none to heads without."""
    config = oracle_config(memory__counts="0:1+5,1:3+2")
    less = oracle_config(memory__counts="0:0+5,1:3+0")
    params = random_params(config)
    tokens, references = _batch(config, 1)
    hidden = np.array([[False, True], [True, False]])
    expect = _oracle_logits(less, params, tokens, references)
    given = {"reference_tokens": references, "memory_heads": hidden}
    close(logits(config, params, tokens, **given), expect)
    memory = _written(config, params, references)
    close(logits(config, params, tokens, memory, memory_heads=hidden), expect)
    all_heads = np.ones((2, 2), bool)
    found = logits(less, params, tokens, reference_tokens=references, memory_heads=all_heads)
    close(found, expect)


@pytest.mark.parametrize("name", ["counts", "layers without slots between and last"])
def test_observed_attention_equals_the_loops(name: str) -> None:
    config = oracle_config(**CASES[name])
    params = random_params(config)
    tokens, references = _batch(config, 1)
    memory, model = _written(config, params, references), make_model(config, PREFIX_TOKENS)
    found = jax.jit(model.memory_attention, static_argnums=3)(params, tokens, memory, 2)
    first, L, P = config.memory.first_layer, config.memory.layers, model.slots.largest
    wanted = np.zeros((L, 2, 2, 2, 8, 3, 1, P))
    for row in range(2):
        oracle = Oracle(config, params)
        reader = Reader(config, params, oracle.prefix)
        written = [[oracle.write(r)[:3] for r in chunk] for chunk in references[row]]
        reader.logits(tokens[row], written)
        for layer, t in np.ndindex(L, 8):
            weights = reader.attention[(first + layer) * (2 + 8) + 2 + t]
            start = 0
            for chunk in range(max(0, t // 3 - 1), t // 3 + 1):
                n = written[chunk][0][2]
                at = weights[:, :, start : start + n]
                wanted[layer, row, :, :, t, chunk, 0, :n] = at
                start += n
    close(found, wanted)
    counts = model.slots.counts_LK
    for layer, k in np.ndindex(*counts.shape):
        assert not found[layer, :, k, ..., counts[layer, k] :].any()


# -- gradients


@pytest.mark.slow
@pytest.mark.parametrize("name", ["counts", "layers without slots between and last"])
def test_online_gradients_equal_differences_of_the_loops(name: str) -> None:
    config = oracle_config(**CASES[name], model__hidden=8, model__vocabulary=260)
    params = random_params(config)
    tokens, references = random_tokens(5, 1, 5), random_references(6, np.array([[[7], [2]]]))
    weights = np.random.default_rng(3).normal(size=(1, 5, 260))

    def loss(params: Any) -> Any:
        found = logits(config, params, tokens, reference_tokens=references)
        return jnp.sum(found * weights.astype(np.float32)) / 16

    def slow(params: Any) -> float:
        return float(np.sum(_oracle_logits(config, params, tokens, references) * weights) / 16)

    _check_gradients(jax.jit(jax.grad(loss))(params), _directional(slow, params, 4))


@pytest.mark.slow
def test_without_gradient_memories_are_constants() -> None:
    """Values are those of the online path; gradients those of memories that came precomputed."""
    counts = {"memory__counts": "0:1+5,1:0+2"}
    online = oracle_config(**counts)
    config = oracle_config(memory__source="stop_gradient", **counts)
    params = random_params(config)
    tokens, references = random_tokens(5, 1, 5), random_references(6, np.array([[[7], [2]]]))
    weights = np.random.default_rng(3).normal(size=(1, 5, 260)).astype(np.float32)
    memory = jax.tree.map(np.asarray, _written(config, params, references))

    def gradient(config: Any, *read: Any, **more: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.sum(logits(config, params, tokens, *read, **more) * weights)

        return jax.jit(jax.grad(loss))(params)

    given = {"reference_tokens": references}
    close(logits(config, params, tokens, **given), logits(online, params, tokens, **given))
    found = gradient(config, **given)
    close_trees(found, gradient(config, memory))
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), gradient(online, **given), found)
    assert max(jax.tree.leaves(apart)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "attention", "dots"])
def test_what_is_recomputed_does_not_change_gradients(remat: str) -> None:
    tokens, references = random_tokens(5, 1, 5), random_references(6, np.array([[[7], [2]]]))
    params = random_params(oracle_config(**GROUPS))

    def gradient(remat: str) -> Any:
        counts = {"memory__counts": "1:1+5,3:0+3", "memory__selection": "reconstruction"}
        config = oracle_config(**GROUPS, **counts, model__remat=remat)

        def loss(params: Any) -> Any:
            found = logits(config, params, tokens, reference_tokens=references)
            return jnp.sum(jax.nn.log_softmax(found)[..., 7])

        return jax.jit(jax.grad(loss))(params)

    close_trees(gradient(remat), gradient("none"))


# -- generation


@pytest.mark.parametrize(
    ("changes", "prefix"),
    [
        pytest.param({"memory__counts": "1:1+4,2:3+0"}, (1, 2), marks=pytest.mark.slow),
        pytest.param({"memory__counts": "2:2+5"}, (), marks=pytest.mark.slow),
        pytest.param({"memory__heads": "1"}, (1, 2), marks=pytest.mark.slow),
    ],
    ids=["counts", "none in the first layer", "none in the last layer"],
)
def test_generation_equals_the_forward_of_training(
    changes: dict[str, Any], prefix: tuple[int, ...]
) -> None:
    config = tiny(**changes)
    model = make_model(config, prefix)
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    rows, C = len(LENGTHS), max(LENGTHS) // DECODED
    prompts = rng.integers(4, 64, (rows, C * DECODED), dtype=np.int32)
    forced = rng.integers(4, 64, (rows, 11), dtype=np.int32)
    prompt_memory = memories(config, (rows, C, M))
    assert prompt_memory.keys.shape == (1, rows, C, M, 1, model.slots.size, 8)
    later = [memories(config, (rows, M), seed) for seed in (2, 3)]
    wanted, attention = expected(config, model, params, prompts, forced, prompt_memory, later)
    written = generated(model, params, prompts, forced, prompt_memory, later, observe=True)
    found = np.concatenate([x.logprobs for x in written], 1)
    close(found, wanted)
    summed = sum(np.asarray(x.reading) for x in written)
    close(summed[..., :M], attention.sum(1), 1e-4)
    for layer, k in np.ndindex(2, 2):
        reads = bool(model.slots.counts[layer][k])
        assert summed[:, layer, k, :, :M].any() == reads


@pytest.mark.slow
def test_generation_without_memories_of_heads_with_counts() -> None:
    config = tiny(memory__counts="1:1+4,2:3+0")
    model = make_model(config, (1, 2))
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    prompts = rng.integers(4, 64, (len(LENGTHS), max(LENGTHS)), dtype=np.int32)
    forced = rng.integers(4, 64, (len(LENGTHS), 3), dtype=np.int32)
    wanted, _ = expected(config, model, params, prompts, forced, None, [])
    written = generated(model, params, prompts, forced, None, [])
    close(np.concatenate([x.logprobs for x in written], 1), wanted)
