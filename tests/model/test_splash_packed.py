"""The TPU kernel on rows of several texts: equal to the oracle, and what it skips is hidden."""

import jax.numpy as jnp
import numpy as np
import pytest
from model.attention_inputs import Case, make_inputs, value_and_gradients, weights
from quick import slow_among
from tolerance import close_trees

from m3jax.model.attention import resolve
from m3jax.model.attention_mask import ExplicitMemory, Packing, Scope, visible_mask
from m3jax.model.splash import _segments
from m3jax.model.splash_mask import PackedMask, packed_codes, plan

CASES = [
    Case(T=300, B=3),
    Case(T=300, B=3, chunk=12, window=2, M=2, prefix=0, G=1, K=2),  # a chunk, no power of two
    Case(T=260, B=3, window=3, M=0, G=2),
    Case(T=129, B=3, chunk=7, window=40, P=8),
]


def random_packing(case: Case, seed: int = 0) -> tuple[Packing, int]:
    """Texts of random lengths, short and long; some rows end with padding. And chunks of a row.

    As `m3jax.data.rows` makes them: padding is a text behind the last chunk.
    """
    random = np.random.default_rng(seed)
    starts, first = np.zeros((2, case.B, case.T), np.int32)
    ends, counts = [], []
    for b in range(case.B):
        place = chunk = 0
        while place < case.T - 20:
            size = int(random.choice([1, 2, random.integers(3, 30), random.integers(30, 150)]))
            end = min(place + size, case.T - (0 if b == 0 else 5))
            starts[b, place:end], first[b, place:end] = place, chunk
            place, chunk = end, chunk - (place - end) // case.chunk
        ends.append(place)
        counts.append(chunk)
    for b, end in enumerate(ends):
        starts[b, end:], first[b, end:] = end, max(counts)
    return Packing(jnp.asarray(starts), jnp.asarray(first)), max(counts)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case: Case) -> None:
    packing, chunks = random_packing(case)
    inputs, length = make_inputs(case, chunks)
    expected, found = (
        value_and_gradients(inputs, length, weights(inputs), case, packing, implementation=name)
        for name in ("naive", "splash_interpret")
    )
    close_trees(found, expected)


@pytest.mark.parametrize(
    "case", slow_among(CASES, [case for case in CASES if case.T != 260]), ids=str
)
def test_the_mask_is_the_oracles_and_nothing_that_is_seen_is_skipped(case: Case) -> None:
    for seed in range(8):
        packing, chunks = random_packing(case, seed)
        inputs, length = make_inputs(case, chunks)
        memory = ExplicitMemory(inputs.keys, inputs.values, length) if case.M else None
        layout = plan(
            case.T,
            case.G,
            prefix=case.prefix,
            chunks=chunks if case.M else 0,
            chunk_slots=case.M * case.P,
            chunk_length=case.chunk,
            window=case.window,
            block=128,
            kv_block=128,
            packed=True,
        )
        mask, codes = PackedMask(layout), packed_codes(layout, packing)
        assert codes.shape == (case.B, layout.rows)
        key = jnp.arange(layout.keys, dtype=jnp.int32)
        pairs = jnp.broadcast_arrays(codes[:, :: layout.group, None], key[None, None])
        seen = np.array(mask.mask_function(*pairs))
        if memory is not None:
            seen &= np.asarray(_segments(layout, memory) == 0)[:, None]
        possible = mask[0 : layout.rows : layout.group, 0 : layout.keys]
        assert not (seen & ~possible).any()
        # The oracle's order of keys is prefix, memories, context.
        scope = Scope(inputs.prefix, memory, packing, chunk_length=case.chunk, window=case.window)
        wanted = visible_mask(jnp.arange(case.T), case.T, scope)[:, 0]
        front = layout.start - layout.prefix
        order = [
            *range(front, layout.start),
            *range(layout.gap, layout.gap + layout.slots),
            *range(layout.start, layout.start + case.T),
        ]
        np.testing.assert_array_equal(seen[:, : case.T, order], wanted)
        hidden = np.setdiff1d(np.arange(layout.keys), order)
        assert not seen[:, : case.T, hidden].any()


def test_some_blocks_are_skipped() -> None:
    """The future, and the memories of chunks that no text can have there."""
    layout = plan(
        *(1024, 2),
        **{"prefix": 0, "chunks": 16, "chunk_slots": 16, "chunk_length": 64, "window": 1},
        **{"block": 128, "kv_block": 128, "packed": True},
    )
    assert layout.start == 256
    mask, found = PackedMask(layout), np.zeros((8, 10), int)
    for i, j in np.ndindex(8, 10):
        rows = slice(256 * i, 256 * (i + 1))
        found[i, j] = mask[rows, 128 * j : 128 * (j + 1)].any()
    np.testing.assert_array_equal(found[:, 0], [1] * 4 + [0] * 4)  # chunks 0 … 7
    np.testing.assert_array_equal(found[:, 1], [1] * 8)
    np.testing.assert_array_equal(found[:, 2:], np.tri(8))


def test_rows_too_long_for_a_code() -> None:
    options = {"prefix": 2, "chunk_slots": 8, "chunk_length": 64, "window": 5, "packed": True}
    blocks = {"block": 256, "kv_block": 256}
    plan(2048, 5, chunks=1023, **options, **blocks)
    with pytest.raises(ValueError, match=r"2048 tokens in several texts with 1024 .*'blocked'"):
        plan(2048, 5, chunks=1024, **options, **blocks)
    assert resolve("auto", "tpu", jnp.bfloat16, 80, packed=4096) == "splash"
    assert resolve("auto", "tpu", jnp.bfloat16, 80, packed=8192) == "blocked"
