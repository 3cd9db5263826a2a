"""Writing and reading against the NumPy loops of `oracle.py`, values and gradients."""

import json
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_axes import by_reference
from ml_collections import ConfigDict
from model.oracle import Oracle, oracle_config, random_params, random_references, random_tokens
from quick import slow_among
from tolerance import close

from m3jax.config import PREFIX_TOKENS
from m3jax.make_model import make_model
from m3jax.memory.sparsify import received_weights, reconstruction_weights, sparsifier
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.layer import with_copies

LENGTHS = np.array([7, 1, 2, 5, 3, 0])  # full, short and empty references; 3 tokens are kept
TOLERANCE = 1e-5


@cache
def _jitted(name: str, key: str, prefix: tuple[int, ...]) -> Any:
    config = ConfigDict(json.loads(key))
    model = make_model(config, prefix)
    if name == "encode":
        keep = sparsifier(config.memory)

        @jax.jit
        def both(params: Any, tokens: Any) -> Any:  # memories, and the tokens that they keep
            written = model.on_references(params, tokens, keep)
            kept = model.slots.stack([None if x is None else x.indices for x in written])
            return model.encode(params, tokens, keep), kept

        return both
    return jax.jit(partial(getattr(model, name), sparsify=sparsifier(config.memory)))


def encode(config: ConfigDict, params: Any, tokens: np.ndarray, prefix=(1, 2)) -> Any:
    return _jitted("encode", config.to_json(), prefix)(params, tokens)


def logits(config: ConfigDict, params: Any, *arguments: Any, prefix=(1, 2), **named: Any) -> Any:
    return _jitted("logits", config.to_json(), prefix)(params, *arguments, **named)


# -- writing

WRITERS = {
    "first layers": {},
    "approximate, biases, scaled embedding": {
        "memory__selection": "approximate",
        "model__attention_bias": True,
        "model__embedding_scale": 3.0,
    },
    "middle": {"model__layers": 4, "memory__first_layer": 1, "memory__layers": 2},
    "normed queries and keys": {"model__qk_norm": True},
    "last layer alone": {"memory__first_layer": 2, "memory__layers": 1},
    "all layers, one query head a group": {"memory__layers": 3, "model__kv_heads": 4},
    "attention from behind": {"memory__selection": "received", "model__attention_bias": True},
    "attention from behind, a layer without RoPE": {
        "memory__selection": "received",
        "model__no_rope_every": 2,
    },
    "a copy, layers without RoPE in every segment": {
        "memory__selection": "reconstruction",
        "model__layers": 6,
        "model__no_rope_every": 2,
        "memory__first_layer": 2,
        "memory__layers": 2,
    },
    "a copy": {"memory__selection": "reconstruction", "model__qk_norm": True},
    "a copy, blocked": {
        "memory__selection": "reconstruction",
        "model__attention": "blocked",
        "model__attention_block": 3,
        "memory__first_layer": 1,
    },
    "a copy, after attention from behind": {
        "memory__selection": "reconstruction",
        "memory__each": 1,
        "memory__counts": "0:1+4,1:3+2",
    },
    "counts in groups of layers": {
        "model__layers": 5,
        "memory__first_layer": 1,
        "memory__layers": 4,
        "memory__counts": "1:1+5,3:0+3",
    },
    "counts in groups of layers, some without RoPE": {
        "model__layers": 5,
        "model__no_rope_every": 3,
        "memory__first_layer": 1,
        "memory__layers": 4,
        "memory__counts": "1:1+5,3:0+3",
    },
}


SLOW_WRITERS = (
    "a copy, after attention from behind",
    "a copy, layers without RoPE in every segment",
    "counts in groups of layers",
    "normed queries and keys",
    "last layer alone",
)


@pytest.mark.parametrize("name", slow_among(WRITERS, SLOW_WRITERS))
def test_writing_equals_the_loops(name: str) -> None:
    config = oracle_config(**WRITERS[name])
    params, references = random_params(config), random_references(1, LENGTHS)
    memory, kept = encode(config, params, references)
    oracle = Oracle(config, params)
    written = [oracle.write(reference) for reference in references]
    keys, values, lengths, expected = (np.stack(part) for part in zip(*written, strict=True))
    np.testing.assert_array_equal(memory.length, lengths)
    P = keys.shape[3]
    np.testing.assert_array_equal(lengths, np.minimum([7, 1, 2, 5, 3, 0], P))
    np.testing.assert_array_equal(np.moveaxis(np.asarray(kept), 0, 1), expected)
    counts = np.array(oracle.counts())
    if (counts < P).any():  # stored without padding, by layer, then head, then token
        own = np.arange(P) < counts[..., None]
        keys, values = (x[:, own][:, None, None] for x in (keys, values))
    memory = by_reference(memory)
    close(memory.keys, keys)
    close(memory.values, values)
    # Heads keep different tokens, and not just the first ones.
    assert (expected[0, :, 0] != expected[0, :, 1]).any() and expected[0].max() > 2


@pytest.mark.slow
def test_writing_without_a_prefix() -> None:
    config = oracle_config()
    params, references = random_params(config), random_references(1, LENGTHS[:3])
    memory, kept = encode(config, params, references, prefix=())
    keys, _, _, expected = Oracle(config, params, ()).write(references[0])
    np.testing.assert_array_equal(kept[:, 0], expected)
    close(memory.keys[:, 0], keys)


@pytest.mark.parametrize("selection", ["exact", "received", "reconstruction"])
def test_a_reference_is_written_alone(selection: str) -> None:
    """Neither padding nor the other references of the batch change a memory."""
    config = oracle_config(memory__selection=selection)
    params, references = random_params(config), random_references(1, LENGTHS)
    together, _ = encode(config, params, references)
    order = np.array([3, 5, 0, 1, 4, 2])
    permuted, _ = encode(config, params, references[order])
    np.testing.assert_array_equal(permuted.keys, together.keys[:, order])
    np.testing.assert_array_equal(permuted.length, together.length[order])
    wide, kept = encode(config, params, np.pad(references, ((0, 0), (0, 4))))
    np.testing.assert_array_equal(kept, encode(config, params, references)[1])
    close(wide.values, np.asarray(together.values))


def test_a_copy_stands_behind_the_last_token() -> None:
    references = np.array([[5, 6, 7, 8], [5, 6, 0, 0], [5, 6, 7, 0], [0, 0, 0, 0]], np.int32)
    expected = [
        [5, 6, 7, 8, 5, 6, 7, 8],
        [5, 6, 5, 6, 0, 0, 0, 0],
        [5, 6, 7, 5, 6, 7, 0, 0],
        [0] * 8,
    ]
    np.testing.assert_array_equal(with_copies(jnp.asarray(references)), expected)


def test_copies_are_seen_by_no_memory() -> None:
    """A copy serves only the choice: keys and values are those of the reference without it."""
    plain, copied = (oracle_config(memory__selection=s) for s in ("exact", "reconstruction"))
    for config in (plain, copied):  # all tokens are kept
        config.memory.kept_tokens = 7
    params, references = random_params(plain), random_references(1, LENGTHS)
    expected, kept = encode(plain, params, references)
    found, also = encode(copied, params, references)
    np.testing.assert_array_equal(kept, also)
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("rule", ["received", "reconstruction"])
def test_weights_of_a_rule_equal_the_loops(rule: str) -> None:
    """`reconstruction`: a forward pass over [prefix ; reference ; reference] of a real model."""
    config = oracle_config(memory__selection=rule, memory__first_layer=1, model__layers=4)
    params, references = random_params(config), random_references(1, LENGTHS)
    model = make_model(config, PREFIX_TOKENS)
    function = {"received": received_weights, "reconstruction": reconstruction_weights}[rule]
    (found,) = jax.jit(lambda p, t: model.on_references(p, t, function))(params, references)
    oracle, copies = Oracle(config, params), 1 + (rule == "reconstruction")
    for r, n in enumerate(LENGTHS):
        text = [*oracle.prefix, *references[r, :n].tolist() * copies]
        expected = np.full((2, 2, 7), -np.inf)
        for number, projected, rotated in oracle.passed(text) if n else ():
            if number in oracle.memory_layers:
                weights = oracle.rule(rule, projected, rotated, n)
                expected[number - 1, :, :n] = weights
        close(found[:, r], expected)
    if rule == "reconstruction":
        assert found[:, 0].min() > 0 and found[:, 0].max() < 1


# -- reading


def _batch(config: ConfigDict, M: int) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of three chunks, the last one cut short; references of all lengths."""
    lengths = np.resize(LENGTHS, (2, 3, M))
    return random_tokens(5, 2, 8), random_references(6, lengths)


def _oracle_logits(config: ConfigDict, params: Any, tokens, references, prefix=(1, 2)) -> Any:
    oracle = Oracle(config, params, prefix)
    rows = []
    for row, chunks in zip(tokens, references, strict=True):
        written = [[oracle.write(reference)[:3] for reference in chunk] for chunk in chunks]
        rows.append(oracle.read(row, written))
    return np.stack(rows)


def _written(config: ConfigDict, params: Any, references: np.ndarray) -> ExplicitMemory:
    lead = references.shape[:-1]
    memory, _ = encode(config, params, references.reshape(-1, references.shape[-1]))
    keys, values = (x.reshape(len(x), *lead, *x.shape[2:]) for x in memory[:2])
    return ExplicitMemory(keys, values, memory.length.reshape(lead))


READERS = {
    "first layers": ({}, 1),
    "middle, blocked, remat": (
        {
            "model__layers": 4,
            "memory__first_layer": 1,
            "model__attention": "blocked",
            "model__attention_block": 5,
            "model__remat": "full",
        },
        1,
    ),
    "all layers, window 5, tied, biased": (
        {
            "memory__layers": 3,
            "memory__window": 5,
            "model__tied_embeddings": True,
            "model__attention_bias": True,
            "model__embedding_scale": 0.5,
        },
        1,
    ),
    "normed queries and keys, blocked": (
        {"model__qk_norm": True, "model__attention": "blocked", "model__attention_block": 5},
        1,
    ),
    "a copy": (
        {"memory__selection": "reconstruction", "memory__each": 1, "model__remat": "full"},
        1,
    ),
    "layers without RoPE in every segment, remat": (
        {
            "model__layers": 6,
            "model__no_rope_every": 2,
            "memory__first_layer": 2,
            "model__attention": "blocked",
            "model__attention_block": 5,
            "model__remat": "full",
        },
        1,
    ),
    "attention from behind, two memories a chunk": ({"memory__selection": "received"}, 2),
    "one behind the other, layers without RoPE": (
        {"memory__spacing": 7, "model__no_rope_every": 2, "memory__window": 1},
        3,
    ),
    "one layer, window 1, two memories a chunk": (
        {"memory__layers": 1, "memory__window": 1},
        2,
    ),
}


SLOW_READERS = (
    "a copy",
    "attention from behind, two memories a chunk",
    "all layers, window 5, tied, biased",
    "normed queries and keys, blocked",
    "layers without RoPE in every segment, remat",
    "one behind the other, layers without RoPE",
    "one layer, window 1, two memories a chunk",
)


@pytest.mark.parametrize("name", slow_among(READERS, SLOW_READERS))
def test_reading_equals_the_loops_from_both_sources(name: str) -> None:
    changes, M = READERS[name]
    config = oracle_config(**changes)
    params = random_params(config)
    tokens, references = _batch(config, M)
    expected = _oracle_logits(config, params, tokens, references)
    memory = _written(config, params, references)
    close(logits(config, params, tokens, memory), expected)
    close(logits(config, params, tokens, reference_tokens=references), expected)
    # The memories matter, so that the comparison says something.
    assert np.abs(Oracle(config, params).read(tokens[0], []) - expected[0]).max() > 0.05


@pytest.mark.parametrize("prefix", [(), (1, 2)])
def test_reading_nothing_is_plain_language_modeling(prefix: tuple[int, ...]) -> None:
    config = oracle_config()
    params, tokens = random_params(config), random_tokens(5, 2, 8)
    expected = np.stack([Oracle(config, params, prefix).read(row, []) for row in tokens])
    close(logits(config, params, tokens, prefix=prefix), expected)
    # Empty memories are no memories.
    empty = np.zeros((2, 3, 1, 7), np.int32)
    close(logits(config, params, tokens, reference_tokens=empty, prefix=prefix), expected)


def test_the_window_can_be_set_for_a_pass() -> None:
    config = oracle_config(memory__window=1)
    params = random_params(config)
    tokens, references = _batch(config, 1)
    model = make_model(config, PREFIX_TOKENS)
    memory = _written(config, params, references)
    found = jax.jit(partial(model.logits, window=3))(params, tokens, memory)
    config.memory.window = 3
    close(found, _oracle_logits(config, params, tokens, references))


# -- gradients


def _directional(loss: Any, tree: Any, seed: int) -> list[tuple[str, Any, float]]:
    """For every leaf a random direction and the central difference of `loss` along it, float64."""
    random, result = np.random.default_rng(seed), []
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    for i, (path, leaf) in enumerate(leaves):
        direction = random.normal(size=leaf.shape)
        sides = []
        for step in (1e-5, -1e-5):
            moved = [np.asarray(x, np.float64) for _, x in leaves]
            moved[i] = moved[i] + step * direction
            sides.append(loss(jax.tree.unflatten(structure, moved)))
        result.append((jax.tree_util.keystr(path), direction, (sides[0] - sides[1]) / 2e-5))
    return result


def _check_gradients(gradient: Any, differences: list[tuple[str, Any, float]]) -> None:
    for (name, direction, expected), leaf in zip(
        differences, jax.tree.leaves(gradient), strict=True
    ):
        size = np.linalg.norm(leaf) * np.linalg.norm(direction) / np.sqrt(direction.size)
        found = float(np.vdot(np.asarray(leaf, np.float64), direction))
        assert abs(found - expected) <= TOLERANCE * max(1.0, size), (name, found, expected)


GRADIENTS = {
    "naive": {},
    "blocked, remat, middle": {
        "model__attention": "blocked",
        "model__attention_block": 5,
        "model__remat": "dots",
        "memory__first_layer": 1,
    },
}


@pytest.mark.parametrize("name", slow_among(GRADIENTS, ["naive"]))
def test_online_gradients_equal_differences_of_the_loops(name: str) -> None:
    """Through reading and writing, for every parameter; what is kept is held by the selection."""
    config = oracle_config(**GRADIENTS[name])
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
    online = oracle_config()
    config = oracle_config(memory__source="stop_gradient")
    params = random_params(config)
    tokens, references = random_tokens(5, 1, 5), random_references(6, np.array([[[7], [2]]]))
    weights = np.random.default_rng(3).normal(size=(1, 5, 260)).astype(np.float32)
    memory = jax.tree.map(np.asarray, _written(config, params, references))

    def gradient(config: ConfigDict, *read: Any, **more: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.sum(logits(config, params, tokens, *read, **more) * weights)

        return jax.jit(jax.grad(loss))(params)

    given = {"reference_tokens": references}
    close(logits(config, params, tokens, **given), logits(online, params, tokens, **given))
    found, expected = gradient(config, **given), gradient(config, memory)
    jax.tree.map(close, found, expected)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), gradient(online, **given), found)
    assert max(jax.tree.leaves(apart)) > 1e-2


def test_memory_gradients_equal_differences_of_the_loops() -> None:
    """With respect to precomputed keys and values: how a reader's loss pulls at a memory."""
    config = oracle_config(model__attention="blocked", model__attention_block=2)
    params = random_params(config)
    tokens, references = random_tokens(5, 1, 5), random_references(6, np.array([[[7], [2]]]))
    memory = jax.tree.map(np.asarray, _written(config, params, references))
    weights = np.random.default_rng(3).normal(size=(1, 5, 260))

    def loss(pair: Any) -> Any:
        found = logits(config, params, tokens, ExplicitMemory(*pair, memory.length))
        return jnp.sum(found * weights.astype(np.float32)) / 16

    def slow(pair: Any) -> float:
        parts = pair[0][:, 0, :, 0], pair[1][:, 0, :, 0]
        chunks = [[(parts[0][:, c], parts[1][:, c], memory.length[0, c, 0])] for c in (0, 1)]
        found = Oracle(config, params).read(tokens[0], chunks)
        return float(np.sum(found * weights[0]) / 16)

    pair = (memory.keys, memory.values)
    gradient = jax.jit(jax.grad(loss))(pair)
    _check_gradients(gradient, _directional(slow, pair, 4))
    assert np.abs(gradient[0][:, 0, 0]).max() > 1e-3
    assert not gradient[0][:, 0, 1, 0, :, 2].any()  # the third slot of a two-token memory


# -- who may know what


def test_logits_are_causal() -> None:
    """No gradient of the logits of token t reaches the embedding of a later token."""
    config = oracle_config()
    params = random_params(config)
    tokens = np.arange(10, 18)[None].astype(np.int32)  # each token once: a row of the table each
    references = random_references(6, np.array([[[7], [7], [7]]])) % 7 + 200

    @jax.jit
    def gradient(table: Any, t: Any) -> Any:
        def loss(table: Any) -> Any:
            found = logits(
                config, {**params, "embedding": table}, tokens, reference_tokens=references
            )
            return jnp.sum(found[0, t] ** 2)

        return jax.grad(loss)(table)

    for t in range(8):
        reached = np.abs(gradient(params["embedding"], t)).max(1)[tokens[0]] > 0
        np.testing.assert_array_equal(reached, np.arange(8) <= t)


@pytest.mark.parametrize("implementation", ["naive", "blocked"])
def test_no_reference_reaches_an_earlier_chunk_or_leaves_its_window(implementation: str) -> None:
    config = oracle_config(model__attention=implementation, model__attention_block=4)
    config.memory.layers = 1  # over more layers the context carries on what an earlier token read
    params = random_params(config)
    config.model.layers = 1
    params = {k: v for k, v in params.items() if k != "upper"}
    params["memory"] = jax.tree.map(lambda x: x[:1], params["memory"])
    tokens = random_tokens(5, 1, 12)
    references = random_references(6, np.full((1, 4, 1), 7))
    before = np.asarray(logits(config, params, tokens, reference_tokens=references))
    for chunk in range(4):
        changed = references.copy()
        changed[0, chunk] = random_tokens(9 + chunk, 1, 7)
        after = np.asarray(logits(config, params, tokens, reference_tokens=changed))
        moved = (after != before).any(-1)[0].reshape(4, 3).all(-1)
        still = (after == before).all(-1)[0].reshape(4, 3).all(-1)
        sees = np.array([0 <= c - chunk < 2 for c in range(4)])  # window 2
        np.testing.assert_array_equal(moved, sees)
        np.testing.assert_array_equal(still, ~sees)


def test_no_reference_reaches_an_earlier_chunk_in_depth() -> None:
    config = oracle_config()
    params = random_params(config)
    tokens, references = random_tokens(5, 1, 9), random_references(6, np.full((1, 3, 1), 7))
    before = np.asarray(logits(config, params, tokens, reference_tokens=references))
    references[0, 2] = random_tokens(7, 1, 7)
    after = np.asarray(logits(config, params, tokens, reference_tokens=references))
    np.testing.assert_array_equal(after[0, :6], before[0, :6])
    assert (after[0, 6:] != before[0, 6:]).any(-1).all()


def test_rows_do_not_meet() -> None:
    config = oracle_config()
    params = random_params(config)
    tokens, references = _batch(config, 1)
    forward = np.asarray(logits(config, params, tokens, reference_tokens=references))
    turned = logits(config, params, tokens[::-1], reference_tokens=references[::-1])
    np.testing.assert_array_equal(turned[::-1], forward)
    lone = logits(config, params, tokens[:1], reference_tokens=references[:1])
    close(lone, forward[:1])


def test_memory_attention_is_what_the_softmax_gave_to_memories() -> None:
    config = oracle_config()
    params = random_params(config)
    tokens, references = _batch(config, 1)
    memory = _written(config, params, references)
    model = make_model(config, PREFIX_TOKENS)
    found = jax.jit(model.memory_attention, static_argnums=3)(params, tokens, memory, 2)
    assert found.shape == (2, 2, 2, 2, 8, 3, 1, 3)
    found = np.asarray(found)[..., 0, :]  # … T C P
    assert (found.sum((-1, -2)) < 1).all() and found.max() > 0.05
    for t in range(8):
        for chunk in range(3):
            seen = 0 <= t // 3 - chunk < 2
            for row in range(2):
                length = memory.length[row, chunk, 0]
                assert (found[:, row, :, :, t, chunk, :length] > 0).all() == (seen or length == 0)
                assert not found[:, row, :, :, t, chunk, length:].any()


# -- precision


def test_bfloat16_is_close_to_float32() -> None:
    config, half = oracle_config(), oracle_config(model__compute_dtype="bfloat16")
    params = random_params(config)
    tokens, references = _batch(config, 1)
    expected = np.asarray(logits(config, params, tokens, reference_tokens=references))
    # The selection is discrete: give both the same memories.
    memory = _written(config, params, references)
    found = logits(half, params, tokens, memory)
    assert found.dtype == jnp.float32
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 2e-2, error
    written, _ = encode(half, params, references.reshape(-1, 7))
    assert written.keys.dtype == written.values.dtype == jnp.bfloat16
