"""The TPU kernel in plain operations: equal to the oracle, whole and split over eight devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from model.attention_inputs import Case, make_inputs, value_and_gradients, weights
from tolerance import close_trees

from m3jax.hardware import LIBTPU_ENVIRONMENT
from m3jax.model.attention_mask import ExplicitMemory, Scope, memory_mask
from m3jax.model.splash import _segments, make_kernel
from m3jax.model.splash_mask import EDGE_BYTES, SCORE_BYTES, VMEM, RowMask, pairs, plan

CASES = [
    Case(H=80, B=2),  # one token block and a bit, of three heads
    Case(H=64, K=2, G=1, M=3, window=1, T=128, prefix=0),
    Case(H=128, K=2, G=2, T=100, window=100, block=64, kv_block=256),
    Case(H=80, M=0, G=5, T=129),
    Case(H=64, M=0, prefix=0, T=5, G=4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case: Case) -> None:
    inputs, length = make_inputs(case)
    expected = value_and_gradients(inputs, length, weights(inputs), case, implementation="naive")
    found = value_and_gradients(
        inputs, length, weights(inputs), case, implementation="splash_interpret"
    )
    close_trees(found, expected)


def test_invalid_slots_take_no_attention_and_bfloat16() -> None:
    """Whatever lies in the slots past the length, even scores that would outweigh all others."""
    case = CASES[0]
    inputs, length = make_inputs(case)
    expected = value_and_gradients(inputs, length, weights(inputs), case, implementation="naive")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
    invalid = (np.arange(case.P) >= length[..., None])[:, :, :, None, :, None]
    poisoned = half._replace(
        keys=jnp.where(invalid, jnp.bfloat16(1e4), half.keys),
        values=jnp.where(invalid, jnp.bfloat16(1e6), half.values),
    )
    options = {"implementation": "splash_interpret"}
    found = value_and_gradients(poisoned, length, weights(inputs), case, **options)
    assert found[0].dtype == jnp.bfloat16
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float32) - theirs) / np.linalg.norm(theirs)
        assert error < 2e-2
    for gradient in found[1][4:]:
        assert not np.where(invalid, gradient, 0).any()


# -- the mask and what it skips

# 6 tokens in chunks of 2, one memory of 2 slots a chunk, window 2: memories, prefix, context.
TABLE = [
    [1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0],
    [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
    [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
]


def make_plan(tokens: int, group: int = 1, **changes: int) -> Any:
    options = {"prefix": 1, "chunks": 3, "chunk_slots": 2, "chunk_length": 2, "window": 2}
    return plan(tokens, group, **{**options, "block": 128, "kv_block": 128, **changes})


def test_mask_table() -> None:
    layout = make_plan(6, group=2)
    assert (layout.gap, layout.start, layout.keys, layout.rows) == (0, 7, 128, 128)
    mask = RowMask(layout)
    table = np.array(TABLE, bool)
    np.testing.assert_array_equal(mask[0:12, 0:13], table.repeat(2, axis=0))
    assert not mask[0:12, 13:128].any()
    np.testing.assert_array_equal(mask[12:128, :], mask[11:12, :].repeat(116, axis=0))
    # The memory columns are those of the oracle, row by row of a batch through the segments.
    length = np.array([[[2], [1], [0]], [[0], [2], [2]]], np.int32)
    empty = np.zeros((2, 3, 1, 1, 2, 1), np.float32)
    memory = ExplicitMemory(empty, empty, length)
    wanted = memory_mask(jnp.arange(6), Scope(None, memory, chunk_length=2, window=2))
    segments = np.asarray(_segments(layout, memory))
    np.testing.assert_array_equal(segments[:, :6], [[0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    assert not segments[:, 6:].any()
    found = mask[0:12:2, 0:6][None] & (segments[:, None, :6] == 0)
    np.testing.assert_array_equal(found, wanted)


def test_the_gap_is_hidden() -> None:
    """Where the context is aligned to blocks, the gap before the memories is seen by nobody."""
    layout = make_plan(512, chunks=8, chunk_slots=8, chunk_length=64, window=3)
    assert (layout.gap, layout.start) == (63, 128)
    memory = ExplicitMemory(*(np.zeros((1, 8, 1, 1, 8, 1), np.float32),) * 2, np.full((1, 8, 1), 8))
    seen = RowMask(layout)[0:512, 0:640] & (np.asarray(_segments(layout, memory)) == 0)
    assert not seen[:, :63].any() and seen[:, 127].all()
    token, key = np.arange(512)[:, None], np.arange(640)[None]
    np.testing.assert_array_equal(seen[:, 128:], token >= key[:, :512])
    distance = token // 64 - np.arange(64)[None] // 8
    np.testing.assert_array_equal(seen[:, 63:127], (distance >= 0) & (distance < 3))


BLOCKS = [  # of 128 tokens × 128 keys: two blocks of memories, window 1, and four of context
    [1, 0, 1, 0, 0, 0],
    [1, 0, 1, 1, 0, 0],
    [0, 1, 1, 1, 1, 0],
    [0, 1, 1, 1, 1, 1],
]


def test_hidden_blocks_are_skipped() -> None:
    layout = make_plan(512, prefix=0, chunks=8, chunk_slots=32, chunk_length=64, window=1)
    assert layout.start == 256
    mask, found = RowMask(layout), np.zeros((4, 6), int)
    for i, j in np.ndindex(4, 6):
        found[i, j] = mask[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)].any()
    np.testing.assert_array_equal(found, BLOCKS)
    # What the kernels run: forward, gradient of the queries, gradient of keys and values.
    kernel = make_kernel(layout, kv_heads=2)
    for tables in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
        assert int((tables.block_mask > 0).sum()) == np.sum(BLOCKS)
        assert tables.partial_mask_blocks is None  # no mask is stored
    assert pairs(layout) == (14 * 128 * 128, 512 * 513 // 2 + 512 * 32)


def test_the_waste_at_the_shape_of_memory3_2b() -> None:
    """T = 2048, 32 chunks of 8 slots, window 5, prefix 2: needed pairs of a row, and executed."""
    options = {"chunks": 32, "chunk_slots": 8, "chunk_length": 64, "window": 5, "prefix": 2}
    needed = 2048 * 2049 // 2 + 2048 * 2 + 64 * 8 * (1 + 2 + 3 + 4 + 28 * 5)
    visited = {(128, 128): 166, (256, 256): 46, (256, 512): 28}
    for (block, kv_block), blocks in visited.items():
        layout = make_plan(2048, 5, **options, block=block, kv_block=kv_block)
        assert pairs(layout) == (blocks * block * kv_block, needed)


def test_blocks_fit_the_chip() -> None:
    for group in (1, 5, 8, 16, 48):
        layout = make_plan(4096, group, block=512, kv_block=512)
        rows = layout.block * group
        assert rows % 128 == 0 and layout.rows % rows == 0 and layout.keys % 512 == 0
        assert EDGE_BYTES * (rows + 512) + SCORE_BYTES * rows * 512 <= VMEM
    sizes = [make_plan(4096, 5, block=512, kv_block=keys).block for keys in (256, 512, 1024)]
    assert sizes == [256, 256, 128]
    with pytest.raises(ValueError, match="tokens and 2097152 memory slots is too long"):
        make_plan(2**20, chunks=2**14, chunk_slots=128, chunk_length=64)


# -- for the chip

COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, PartitionSpec
from m3jax.model.attention import attend
from m3jax.model.attention_mask import ExplicitMemory, KeyValues, Packing, Scope

devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices)
mesh = Mesh(devices.reshape(8, 2), ("rows", "heads"))

def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)

B, T, K, G, H, C, P = 8, 512, 4, 5, 80, 8, 8
context, slots = PartitionSpec("rows", None, "heads"), PartitionSpec("rows", None, None, "heads")
constant = PartitionSpec(None, "heads")

def loss(q, k, v, prefix, keys, values, length, *packing):
    memory = ExplicitMemory(keys, values, length)
    scope = Scope(prefix, memory, Packing(*packing) if packing else None, window=5)
    return jnp.sum(attend(q, k, v, scope, implementation="splash").astype(jnp.float32))

specs = (context, context, context, KeyValues(constant, constant), slots, slots)
packing = [array(B, T, dtype=jnp.int32)] * (2 if sys.argv[1:] == ["packed"] else 0)
rows = [PartitionSpec("rows")] * (1 + len(packing))
gradient = jax.shard_map(
    jax.grad(loss, argnums=range(6)), mesh=mesh, in_specs=(*specs, *rows),
    out_specs=specs, check_vma=False,
)
arguments = (
    array(B, T, K, G, H), array(B, T, K, H), array(B, T, K, H),
    KeyValues(*[array(2, K, H)] * 2), *[array(B, C, 1, K, P, H)] * 2,
    array(B, C, 1, dtype=jnp.int32), *packing,
)
lowered = jax.jit(gradient).trace(*arguments).lower(lowering_platforms=("tpu",))
print(lowered.compile().as_text().count('"tpu_custom_call"'))
"""


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("rows", ["whole", "packed"])
def test_compiles_for_tpu(require: Callable, rows: str) -> None:
    """The compiler of the chip takes the three kernels, split over 16 chips."""
    require("libtpu")
    environment = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        **LIBTPU_ENVIRONMENT,
    }
    done = processes.call(["python", "-c", COMPILE, rows], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["3"]
