"""Generation on the device: equal to the training-time forward, whatever its memories are when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_axes import by_reference, layers_first
from tolerance import close

from m3jax import config as config_lib
from m3jax.make_model import make_model
from m3jax.mesh import make_mesh
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.decode import Decoder, unstack
from m3jax.model.slots import SlotLayout

CHUNK, M, P = 4, 3, 2
LENGTHS = (9, 4, 1, 12)  # of prompts; the last one is the longest


def tiny(**changes):
    """Three layers: one below the memory layer and one above it."""
    config = config_lib.default()
    settings = {
        "model.layers": 4,
        "model.query_heads": 4,
        "model.kv_heads": 2,
        "model.head_dim": 8,
        "model.hidden": 16,
        "model.mlp_width": 32,
        "model.vocabulary": 64,
        "memory.first_layer": 1,
        "memory.layers": 2,
        "memory.reference_length": 6,
        "memory.kept_tokens": P,
        "memory.chunk_length": CHUNK,
        "data.sequence_length": 32,
        "text.vocabulary": 260,
        **{path.replace("__", "."): value for path, value in changes.items()},
    }
    for path, value in settings.items():
        section, field = path.split(".")
        config[section][field] = value
    return config


def memories(config, shape, seed=1):
    """Random memories of some lengths, `(L, *shape, K, P, H)` or `(1, *shape, 1, S, H)`."""
    rng, slots = np.random.default_rng(seed), SlotLayout.of(config.model, config.memory)
    size = (*shape, *slots.item_shape, config.model.head_dim)
    keys, values = rng.standard_normal((2, *size), np.float32)
    length = rng.integers(0, slots.largest + 1, shape, dtype=np.int32)
    return layers_first(ExplicitMemory(keys, values, length))


def greedy(logits, rows, number):
    return jnp.argmax(logits, axis=-1)


def expected(config, model, params, prompts, forced, prompt_memory, later):
    """Logprobs of the forced tokens by the forward of training, one token a chunk; and attention on
    memories `(B, n, L, K, G, M)`.

    Its query at every place of a row has the memories that the row had there: those of its chunk in
    the prompt; after it, from the query that generates token 4·g on, those recalled then.
    """
    one = config.copy_and_resolve_references()
    one.memory.chunk_length = 1
    oracle = make_model(one, model.prefix_tokens)
    B, n_forced = forced.shape
    T = max(LENGTHS) + n_forced - 1
    tokens, places = np.zeros((B, T), np.int32), np.zeros((B, n_forced), int)
    chunk = np.zeros((B, T), int)
    for row, n in enumerate(LENGTHS):
        tokens[row, : n + n_forced - 1] = np.concatenate([prompts[row, :n], forced[row, :-1]])
        chunk[row] = np.minimum(np.arange(T), n - 1) // CHUNK
        places[row] = n - 1 + np.arange(n_forced)
    memory, rows = None, np.arange(B)[:, None]
    if prompt_memory is not None:
        parts = [part[rows, chunk] for part in by_reference(prompt_memory)]
        for row, n in enumerate(LENGTHS):
            for g, recalled in enumerate(later, 1):
                for part, new in zip(parts, by_reference(recalled), strict=True):
                    part[row, n - 1 + CHUNK * g :] = new[row]
        memory = jax.tree.map(jnp.asarray, layers_first(ExplicitMemory(*parts)))
    logits = oracle.logits(params, jnp.asarray(tokens), memory, window=1)
    logprobs = np.asarray(jax.nn.log_softmax(logits))[rows, places, forced]
    if memory is None:
        return logprobs, None
    weights = np.asarray(oracle.memory_attention(params, jnp.asarray(tokens), memory, 1)).sum(-1)
    return logprobs, weights.transpose(1, 4, 5, 0, 2, 3, 6)[rows, places, places]


def generated(model, params, prompts, forced, prompt_memory, later, lengths=LENGTHS, **options):
    decoder = Decoder(model, greedy, **options)
    total = forced.shape[1]
    state, first = decoder.prefill(
        unstack(model, params),
        prompts,
        np.array(lengths, np.int32),
        np.array([(row, 0) for row in range(len(lengths))], np.int32),
        prompt_memory,
        forced[:, :1],
        slots=total,
    )
    written, recalled, done = [first], None, 1
    while done < total:
        steps = min(CHUNK - done % CHUNK if done % CHUNK else CHUNK, total - done)
        if done % CHUNK == 0 and prompt_memory is not None:
            recalled = later[done // CHUNK - 1]
        wanted = np.full((len(lengths), CHUNK), -1, np.int32)
        wanted[:, :steps] = forced[:, done : done + steps]
        state, more = decoder.generate(
            unstack(model, params), state, recalled, np.int32(steps), wanted
        )
        more = more._replace(
            tokens=more.tokens[:, :steps],
            logprobs=more.logprobs[:, :steps],
            by_token=None if more.by_token is None else more.by_token[:, :steps],
        )
        written.append(more)
        recalled, done = None, done + steps
    return written


@pytest.mark.parametrize(
    ("with_memory", "prefix", "qk_norm", "no_rope_every", "spacing"),
    [
        pytest.param(True, (1, 2), False, 0, 6, marks=pytest.mark.slow),
        (False, (), False, 2, 0),
        pytest.param(True, (1, 2), False, 0, 0, marks=pytest.mark.slow),
        pytest.param(True, (1, 2), True, 3, 2, marks=pytest.mark.slow),
    ],
)
def test_equals_the_forward_of_training(with_memory, prefix, qk_norm, no_rope_every, spacing):
    config = tiny(
        model__qk_norm=qk_norm, model__no_rope_every=no_rope_every, memory__spacing=spacing
    )
    model = make_model(config, prefix)
    params = jax.jit(model.init)(jax.random.key(0))
    if qk_norm:  # scales of one would hide where they are left out
        for segment in ("lower", "memory", "upper"):
            for name in ("query_norm", "key_norm"):
                shape = params[segment][name].shape
                params[segment][name] = 1 + 0.5 * jax.random.normal(jax.random.key(1), shape)
    rng = np.random.default_rng(0)
    B, C = len(LENGTHS), max(LENGTHS) // CHUNK
    prompts = rng.integers(4, 64, (B, C * CHUNK), dtype=np.int32)
    forced = rng.integers(4, 64, (B, 11), dtype=np.int32)
    prompt_memory = memories(config, (B, C, M)) if with_memory else None
    later = [memories(config, (B, M), seed) for seed in (2, 3)] if with_memory else []
    wanted, attention = expected(config, model, params, prompts, forced, prompt_memory, later)
    written = generated(model, params, prompts, forced, prompt_memory, later, observe=with_memory)
    np.testing.assert_array_equal(np.concatenate([x.tokens for x in written], 1), forced)
    found = np.concatenate([x.logprobs for x in written], 1)
    close(found, wanted)
    if attention is None:
        assert written[0].reading is None
        return
    by_token = np.concatenate([x.by_token for x in written], 1)
    close(by_token[..., :M], attention.mean((2, 3, 4)))
    close(by_token.sum(-1), 1)
    summed = sum(np.asarray(x.reading) for x in written)
    close(summed[..., :M], attention.sum(1), 1e-4)


@pytest.mark.slow
def test_heads_with_few_and_with_many_slots():
    """The first memory layer is divided into two groups of one head each; a row alone has arrays
    with neither rows nor heads."""
    config = tiny(memory__counts="1:18+1,2:2+1", memory__reference_length=20, memory__spacing=3)
    assert [len(config_lib.head_groups(counts)) for counts in ((18, 1), (2, 1))] == [2, 1]
    model = make_model(config, (1, 2))
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    B, C = len(LENGTHS), max(LENGTHS) // CHUNK
    prompts = rng.integers(4, 64, (B, C * CHUNK), dtype=np.int32)
    forced = rng.integers(4, 64, (B, 6), dtype=np.int32)
    prompt_memory, later = memories(config, (B, C, M)), [memories(config, (B, M), 2)]
    wanted, attention = expected(config, model, params, prompts, forced, prompt_memory, later)
    written = generated(model, params, prompts, forced, prompt_memory, later, observe=True)
    close(np.concatenate([x.logprobs for x in written], 1), wanted)
    summed = sum(np.asarray(x.reading) for x in written)
    close(summed[..., :M], attention.sum(1), 1e-4)

    def first(memory):
        parts = (x[:, :1] for x in memory[:2])
        return ExplicitMemory(*parts, memory.length[:1])

    alone = generated(
        *(model, params, prompts[:1], forced[:1], first(prompt_memory), [first(later[0])]),
        lengths=LENGTHS[:1],
    )
    close(np.concatenate([x.logprobs for x in alone], 1), wanted[:1])


@pytest.mark.slow
def test_a_mesh_generates_the_same():
    config = tiny(mesh__data=2, mesh__tensor=2, mesh__fsdp=1, data__batch_size=4)
    mesh = make_mesh(config, jax.devices()[:4])
    model, on_mesh = make_model(config, (1, 2)), make_model(config, (1, 2), mesh)
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    B, C = len(LENGTHS), max(LENGTHS) // CHUNK
    prompts = rng.integers(4, 64, (B, C * CHUNK), dtype=np.int32)
    free = np.full((B, 7), -1, np.int32)
    prompt_memory, later = memories(config, (B, C, M)), [memories(config, (B, M), 2)]
    arguments = (params, prompts, free, prompt_memory, later)
    one = generated(model, *arguments, observe=True)
    other = generated(on_mesh, *arguments, observe=True)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        for x, y in zip(a[1:], b[1:], strict=True):
            close(x, y)
