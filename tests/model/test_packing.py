"""Several texts in a row: each gives what it gives alone, and nothing passes between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_axes import layers_first
from tolerance import close
from train.tiny import tiny_config

from m3jax.config import PREFIX_TOKENS
from m3jax.make_model import make_model
from m3jax.model.attention_mask import ExplicitMemory, Packing, Scope, memory_mask, visible_mask

LENGTHS = (6, 3, 1, 5)  # of a row of 16, chunks of 4: 2 + 1 + 1 + 2 chunks, one token of padding
CHUNKS = 6


def packing() -> Packing:
    starts = np.repeat([0, 6, 9, 10, 15], [6, 3, 1, 5, 1])[None].astype(np.int32)
    first = np.repeat([0, 2, 3, 4, CHUNKS], [6, 3, 1, 5, 1])[None].astype(np.int32)
    return Packing(jnp.asarray(starts), jnp.asarray(first))


def memories(rng: np.random.Generator, rows: int, chunks: int, layers: int = 1) -> ExplicitMemory:
    shape = (rows, chunks, 1, layers, 2, 2, 8)
    keys, values = rng.standard_normal((2, *shape), np.float32)
    length = rng.integers(1, 3, (rows, chunks, 1), dtype=np.int32)
    return jax.tree.map(jnp.asarray, layers_first(ExplicitMemory(keys, values, length)))


def of_chunks(memory: ExplicitMemory, chunks: slice) -> ExplicitMemory:
    """Returns the memories of some chunks; keys and values are in the order of layers."""
    keys, values, length = memory.keys[:, :, chunks], memory.values[:, :, chunks], memory.length
    return ExplicitMemory(keys, values, length[:, chunks])


def test_the_mask_as_a_table() -> None:
    """Texts of three and two tokens and padding; chunks of two, memories of a window of two."""
    starts = jnp.array([[0, 0, 0, 3, 3, 5]], jnp.int32)
    first = jnp.array([[0, 0, 0, 2, 2, 3]], jnp.int32)
    packed = Packing(starts, first)
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    seen = visible_mask(jnp.arange(6), 6, Scope(packing=packed, chunk_length=2, window=2))[:, 0]
    assert seen[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    slots = jnp.zeros((1, 3, 1, 1, 1, 1))  # one slot for each of the three chunks
    memory = ExplicitMemory(slots[..., 0, :, :], slots[..., 0, :, :], jnp.ones((1, 3, 1), int))
    read = memory_mask(jnp.arange(6), Scope(None, memory, packed, chunk_length=2, window=2))
    assert read[0].astype(int).tolist() == [
        [1, 0, 0],
        [1, 0, 0],
        [1, 1, 0],
        [0, 0, 1],  # not the chunk before: it is another text's
        [0, 0, 1],
        [0, 0, 0],
    ]


@pytest.mark.parametrize(
    ("implementation", "with_memory"),
    [
        ("blocked", True),
        *(
            pytest.param(name, with_memory, marks=pytest.mark.slow)
            for name in ("naive", "blocked", "xla", "splash_interpret")
            for with_memory in (True, False)
            if (name, with_memory) != ("blocked", True)
        ),
    ],
)
def test_a_packed_text_is_predicted_as_it_is_alone(implementation: str, with_memory: bool) -> None:
    config = tiny_config(
        "precomputed" if with_memory else "none",
        model__attention=implementation,
        model__attention_block=5,
        model__prefix="always",
    )
    model = make_model(config, PREFIX_TOKENS)
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(4, 264, (1, 16), dtype=np.int32))
    memory = memories(rng, 1, CHUNKS) if with_memory else None
    packed = jax.jit(model.logits)(params, tokens, memory, packing=packing())
    start = chunk = 0
    for length in LENGTHS:
        count = -(-length // 4)
        own = None
        if memory is not None:
            own = of_chunks(memory, slice(chunk, chunk + count))
        alone = jax.jit(model.logits)(params, tokens[:, start : start + length], own)
        close(packed[:, start : start + length], alone)
        start, chunk = start + length, chunk + count


def test_nothing_passes_between_texts() -> None:
    """Bitwise: other tokens and memories of the other texts change nothing."""
    config = tiny_config("precomputed")
    model = make_model(config, PREFIX_TOKENS)
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(2)
    tokens = rng.integers(4, 264, (1, 16), dtype=np.int32)
    logits = jax.jit(model.logits)
    memory = memories(rng, 1, CHUNKS)
    before = logits(params, jnp.asarray(tokens), memory, packing=packing())
    changed, other = tokens.copy(), memories(rng, 1, CHUNKS)
    changed[:, :6], changed[:, 9:] = 5, 6  # all but the second text, whose chunk is number 2
    kept = of_chunks(memory, slice(2, 3))
    mixed = ExplicitMemory(
        other.keys.at[:, :, 2:3].set(kept.keys),
        other.values.at[:, :, 2:3].set(kept.values),
        other.length.at[:, 2:3].set(kept.length),
    )
    after = logits(params, jnp.asarray(changed), mixed, packing=packing())
    np.testing.assert_array_equal(after[:, 6:9], before[:, 6:9])
    assert (np.abs(after - before) > 1e-3)[:, :6].any()
