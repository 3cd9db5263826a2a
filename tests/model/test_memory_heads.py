"""Memories of some heads: the others attend as if there were none, by every way of attending."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from model.oracle import Oracle, oracle_config, random_params
from model.test_attention import (
    CHUNK,
    B,
    G,
    H,
    Inputs,
    K,
    T,
    make_inputs,
    value_and_gradients,
)
from model.test_decode import CHUNK as DECODED
from model.test_decode import LENGTHS, M, expected, generated, memories, tiny
from model.test_transformer import _batch, _written, logits
from tolerance import close

from m3jax.config import PREFIX_TOKENS
from m3jax.make_model import make_model
from m3jax.memory.binding import layout_of
from m3jax.memory.codec import heads_of
from m3jax.model.attention import attend, attention_weights
from m3jax.model.attention_mask import ExplicitMemory, KeyValues, Packing, Scope


def listed(inputs: Inputs, length: np.ndarray, window: int, heads: np.ndarray) -> Any:
    """Every query and head alone, over the list of keys that it sees."""
    rows = []
    for b in range(B):
        for t in range(T):
            for k in range(K):
                seen = [] if inputs.prefix is None else [[x[:, k] for x in inputs.prefix]]
                for c in range(max(0, t // CHUNK - window + 1), t // CHUNK + 1):
                    for m in range(length.shape[2]) if heads[k] else ():
                        real = length[b, c, m]
                        sides = inputs.keys, inputs.values
                        seen.append([x[b, c, m, k, :real] for x in sides])
                seen.append([x[b, : t + 1, k] for x in (inputs.k, inputs.v)])
                keys, values = (jnp.concatenate(part) for part in zip(*seen, strict=True))
                weights = jax.nn.softmax(inputs.q[b, t, k] @ keys.T / H**0.5)
                rows.append(weights @ values)
    return jnp.stack(rows).reshape(B, T, K, G, H)


def attended(inputs: Inputs, length: Any, window: int, heads: Any, **options: Any) -> Any:
    memory = ExplicitMemory(inputs.keys, inputs.values, length)
    scope = Scope(inputs.prefix, memory, heads=heads, chunk_length=CHUNK, window=window)
    return attend(*inputs[:3], scope, **options)


WAYS: list[dict[str, Any]] = [
    {"implementation": "naive"},
    {"implementation": "blocked", "block": 3},
    {"implementation": "xla"},
    {"implementation": "splash_interpret", "block": 128, "kv_block": 128},
]


@pytest.mark.parametrize(
    "heads", [(True, False), pytest.param((False, False), marks=pytest.mark.slow)], ids=str
)
def test_heads_without_memories_see_none(heads: tuple[bool, ...]) -> None:
    """Values and gradients; the mask is an argument of the program, as in a scan over layers."""
    inputs, length = make_inputs(2)
    mask = np.array(heads)
    expect, wanted = value_and_gradients(partial(listed, window=2, heads=mask), inputs, length)
    for options in WAYS:
        found, gradients = value_and_gradients(
            partial(attended, window=2, heads=jnp.asarray(mask), **options), inputs, length
        )
        close(found, expect, what=str(options))
        for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
            close(ours, theirs, what=str(options))
        assert not gradients.keys[:, :, :, ~mask].any()


@pytest.mark.parametrize("options", WAYS, ids=lambda way: way["implementation"])
def test_all_heads_are_what_no_mask_is(options: dict[str, Any]) -> None:
    inputs, length = make_inputs(1)
    plain = attended(inputs, length, 5, None, **options)
    np.testing.assert_array_equal(attended(inputs, length, 5, jnp.ones(K, bool), **options), plain)


def test_texts_of_a_packed_row() -> None:
    """Two texts a row, whose chunks begin with them; each against a row of its own."""
    inputs, length = make_inputs(1)
    packing = Packing(
        jnp.array([[0, 0, 0, 0, 4, 4, 4]] * B), jnp.array([[0, 0, 0, 0, 2, 2, 2]] * B)
    )
    heads = jnp.array([False, True])
    memory = ExplicitMemory(inputs.keys, inputs.values, length)
    for way in WAYS[:3]:
        scope = Scope(inputs.prefix, memory, packing, heads, chunk_length=CHUNK, window=2)
        found = attend(*inputs[:3], scope, **way)
        for low, high, chunks in ((0, 4, slice(0, 2)), (4, 7, slice(2, 3))):
            own = (x[:, low:high] for x in inputs[:3])
            part = jax.tree.map(lambda x, c=chunks: x[:, c], memory)
            alone = attend(*own, dataclasses.replace(scope, memory=part, packing=None), **way)
            close(found[:, low:high], alone)


def test_attention_weights_of_hidden_memories_are_zero() -> None:
    inputs, length = make_inputs(1)
    memory = ExplicitMemory(inputs.keys, inputs.values, length)
    heads = jnp.array([True, False])
    scope = Scope(inputs.prefix, memory, heads=heads, chunk_length=CHUNK, window=5)
    weights = attention_weights(inputs.q, inputs.k, scope)
    slots = weights[..., 2 : 2 + length[0].size * 3]
    assert slots[:, 0].any() and not slots[:, 1].any()
    close(weights.sum(-1), 1)


# -- the model

CASES = {
    "some of both layers": {"memory__heads": "0:1,1:0"},
    "a layer with none, blocked": {"memory__heads": "1", "model__attention": "blocked"},
    "middle, all layers but one head": {
        "model__layers": 4,
        "memory__first_layer": 1,
        "memory__heads": "1:0+1,2:1",
        "model__attention": "splash_interpret",
        "model__remat": "full",
    },
}


def without(config: ConfigDict, memory: tuple[np.ndarray, np.ndarray, int]) -> Any:
    """A memory of the loops, in which heads that have none have NaN."""
    keys, values, length = memory
    heads = heads_of(layout_of(config, ()))
    assert heads is not None
    keys = np.where(heads.mask[:, :, None, None], keys, np.nan)
    return keys, values, length


@pytest.mark.parametrize(
    "name",
    [
        *list(CASES)[:2],
        pytest.param("middle, all layers but one head", marks=pytest.mark.slow),
    ],
)
def test_reading_equals_loops_in_which_other_heads_have_no_memory_keys(name: str) -> None:
    config = oracle_config(**CASES[name])
    params = random_params(config)
    tokens, references = _batch(config, 1)
    oracle = Oracle(config, params)
    rows = [
        oracle.read(
            row, [[without(config, oracle.write(r)[:3]) for r in chunk] for chunk in chunks]
        )
        for row, chunks in zip(tokens, references, strict=True)
    ]
    memory = _written(config, params, references)
    close(logits(config, params, tokens, memory), np.stack(rows))
    close(logits(config, params, tokens, reference_tokens=references), np.stack(rows))
    whole = logits(oracle_config(**{**CASES[name], "memory__heads": ""}), params, tokens, memory)
    assert np.abs(np.asarray(whole) - np.stack(rows)).max() > 0.01


def test_naming_all_heads_names_none() -> None:
    one, other = oracle_config(), oracle_config(memory__heads="0,1:1+0")
    params = random_params(one)
    tokens, references = _batch(one, 1)
    assert make_model(other, PREFIX_TOKENS).memory_heads is None
    a, b = (logits(c, params, tokens, reference_tokens=references) for c in (one, other))
    np.testing.assert_array_equal(a, b)


def test_generation_equals_the_forward_of_training() -> None:
    config = tiny(memory__heads="1:0,2:1")
    model = make_model(config, (1, 2))
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    rows, C = len(LENGTHS), max(LENGTHS) // DECODED
    prompts = rng.integers(4, 64, (rows, C * DECODED), dtype=np.int32)
    forced = rng.integers(4, 64, (rows, 11), dtype=np.int32)
    prompt_memory = memories(config, (rows, C, M))
    later = [memories(config, (rows, M), seed) for seed in (2, 3)]
    wanted, attention = expected(config, model, params, prompts, forced, prompt_memory, later)
    written = generated(config, model, params, prompts, forced, prompt_memory, later, observe=True)
    found = np.concatenate([x.logprobs for x in written], 1)
    close(found, wanted)
    summed = sum(np.asarray(x.reading) for x in written)
    close(summed[..., :M], attention.sum(1), 1e-4)
    assert not summed[:, 0, 1, :, :M].any() and summed[:, 0, 0, :, :M].any()


def test_prefixless_heads() -> None:
    """A head that sees neither memories nor a prefix still sees the context."""
    inputs, length = make_inputs(1, 0)
    heads = np.array([False, True])
    expect = listed(inputs, length, 5, heads)
    found = attended(inputs, length, 5, jnp.asarray(heads))
    close(found, expect)
    assert isinstance(inputs.prefix, KeyValues | None)
