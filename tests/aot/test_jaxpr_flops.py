"""Executed products, against counts made in another way."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec
from tolerance import close
from train.tiny import tiny_config

from m3jax import flops
from m3jax.aot.compile import abstract_batch
from m3jax.aot.jaxpr_flops import attention_blocks, executed_flops
from m3jax.mesh import make_mesh
from m3jax.model.attention import attend
from m3jax.model.attention_mask import ExplicitMemory, KeyValues, Scope
from m3jax.train.state import Program
from m3jax.train.step import make_step


def count(function, *shapes, **options):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return executed_flops(jax.jit(function).trace(*arrays).jaxpr, **options)


def test_products_loops_and_branches():
    assert count(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 840

    def loop(a, stack):
        return jax.lax.scan(lambda x, m: (x @ m, None), a, stack)[0]

    assert count(loop, (3, 5), (11, 5, 5)) == 11 * 2 * 3 * 5 * 5
    # Backward: twice the forward. Recomputation: the forward once more, without its last product.
    assert count(jax.grad(lambda a, s: loop(a, s).sum(), (0, 1)), (3, 5), (11, 5, 5)) == 3 * 1650

    def branches(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a @ b @ b.T @ b)

    assert count(branches, (3, 5), (5, 5)) == 3 * 2 * 3 * 5 * 5


def test_every_device_counts():
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("rows")
    split = jax.shard_map(
        lambda a, b: a @ b, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
    )
    assert count(split, (16, 5), (5, 7)) == 2 * 16 * 5 * 7


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_warmup_step_is_useful_work_and_known_waste(remat):
    config = tiny_config(model__remat=remat, model__attention="naive", data__sequence_length=16)
    mesh = make_mesh(config)
    program = Program(config, mesh)
    traced = make_step(program).trace(program.abstract, abstract_batch(config, mesh))
    found = executed_flops(traced.jaxpr)
    useful = flops.train_step(config)
    # Naive attention computes the whole square instead of the causal half.
    B, T = config.data.batch_size, config.data.sequence_length
    width = config.model.query_heads * config.model.head_dim
    half = 2 * 2 * config.model.layers * B * (T * T - T * (T + 1) // 2) * width
    head = 2 * B * T * config.model.hidden * config.model.vocabulary
    forward = useful / 3 - head + half  # of the layers
    # Recomputing a layer spares its last product, down, which nothing in the backward pass reads.
    last = 2 * B * T * config.model.hidden * config.model.mlp_width * config.model.layers
    expected = useful + 3 * half + (forward - last if remat == "full" else 0)
    close(found, expected, 1e-12)


@pytest.mark.parametrize("packing", ["chats", "pairs"])
def test_steps_of_packed_rows_are_traced_as_they_are(packing):
    """The abstract batch has what such a step reads."""
    config = tiny_config("precomputed", data__packing=packing, model__attention="naive")
    mesh = make_mesh(config, jax.devices()[:1])
    program, batch = Program(config, mesh), abstract_batch(config, mesh)
    assert batch.packing is not None
    assert (batch.base_logprobs is not None) == (packing == "pairs")
    B, T = config.data.batch_size, config.data.sequence_length
    C = 2 * T // config.memory.chunk_length
    assert batch.memory.length.shape == (B, C, 1)
    found = executed_flops(make_step(program).trace(program.abstract, batch).jaxpr)
    assert found > 0


@pytest.mark.parametrize("counts", [None, [8, 3]], ids=str)
def test_attention_kernels_count_the_blocks_that_are_left(counts):
    """Also if every head is a call of its own, because heads differ in their slots."""
    config = tiny_config("precomputed")
    config.model.query_heads, config.model.kv_heads, config.model.head_dim = 16, 2, 64
    config.model.attention_block = config.model.attention_kv_block = 128
    config.memory.chunk_length, config.memory.kept_tokens, config.memory.window = 64, 8, 2
    B, T, K, G, H, C = 2, 512, 2, 8, 64, 8
    if counts:
        config.memory.reference_length, config.memory.counts = 8, "0:8+3"
    blocks = attention_blocks(config, tokens=T, references=False)
    counts_K = counts and jnp.array(counts)

    def loss(q, k, v, prefix, slots):
        memory = ExplicitMemory(slots, slots, jnp.full((B, C, 1), 8, jnp.int32))
        constant = KeyValues(prefix, prefix)
        scope = Scope(constant, memory, counts=counts_K, chunk_length=64, window=2)
        options = {"implementation": "splash", "block": 128, "kv_block": 128}
        return jnp.sum(attend(q, k, v, scope, **options))

    shapes = ((B, T, K, G, H), (B, T, K, H), (B, T, K, H), (2, K, H), (B, C, 1, K, 8, H))
    forward = count(loss, *shapes, blocks=blocks)
    whole = count(loss, *shapes)
    pairs = T * (T + 1) // 2 + T * 2 + 64 * 8 * (2 * C - 1)
    useful = 2 * 2 * B * K * G * pairs * H
    assert useful < forward < whole
    assert forward % (2 * 2 * B * K * G * H * 128 * 128) == 0  # whole blocks
    # The gradient makes three and four products of the same size in its two passes, and one of
    # outputs with their cotangents.
    gradient = count(jax.grad(loss, (0, 1, 2)), *shapes, blocks=blocks)
    assert gradient == forward + forward / 2 * 7 + 2 * B * T * K * G * H


class Asked(dict):
    """Blocks by kernel, which remembers the kernels that were looked for."""

    def __init__(self, blocks):
        super().__init__(blocks)
        self.asked = set()

    def __contains__(self, kernel):
        self.asked.add(kernel)
        return super().__contains__(kernel)


@pytest.mark.parametrize("selection", ["exact", "reconstruction"])
def test_blocks_of_all_kernels_of_a_step_are_known(selection):
    """Groups of layers differ in their slots; a copy makes references twice as long."""
    counts = {"model__layers": 4, "memory__layers": 3, "memory__counts": "0:5+1,2:0+3"}
    sizes = {
        "memory__per_chunk": 32,
        "retrieval__candidates": 32,
        "memory__reference_length": 100,
        "data__batch_size": 1,
    }
    config = tiny_config("online", **counts, **sizes, memory__selection=selection)
    config.model.attention, config.model.head_dim = "splash", 64
    config.model.attention_block = config.model.attention_kv_block = 128
    mesh = make_mesh(config, jax.devices()[:1])
    program, batch = Program(config, mesh), abstract_batch(config, mesh)
    T = config.data.sequence_length
    blocks = Asked(attention_blocks(config, tokens=T, references=True))
    assert executed_flops(make_step(program).trace(program.abstract, batch).jaxpr, blocks) > 0
    assert blocks.asked == set(blocks) and len(blocks) == 4  # references, two groups, no memories
