"""Collectives of a compiled program, read from its text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from m3jax.aot.collectives import by_kind, collectives

# What the TPU compiler writes, cut short: a loop of 22, a chain of kernels that are one all-gather,
# a reduce-scatter written as an all-reduce, and groups stated in three ways.
PROGRAM = """\
HloModule step

%condition.1 (arg: (s32[], bf16[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(22), metadata={op_name="x"}
  %get = s32[] get-tuple-element(%arg), index=0
  ROOT %less = pred[] compare(%get, %constant.3), direction=LT
}

%all-reduce-scatter.2 (input: f32[8,400,3200]) -> f32[1250,8,128] {
  %all-reduce.9 = f32[10000,8,128]{2,1,0:T(8,128)} all-reduce(%input), EIGHTS, to_apply=%add
  ROOT %slice = f32[1250,8,128] dynamic-slice(%all-reduce.9), dynamic_slice_sizes={1250,8,128}
}

%overlap.1 (p: bf16[1,400,3200]) -> bf16[1,3200,3200] {
  ROOT %gather.1 = bf16[1,3200,3200] all-gather(%p), replica_groups=[2,8]<=[16], f={chain_id="7"}
}

%overlap.2 (p: bf16[1,400,3200]) -> bf16[1,3200,3200] {
  ROOT %gather.2 = bf16[1,3200,3200] all-gather(%p), replica_groups=[2,8]<=[16], f={chain_id="7"}
}

%body.1 (arg: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %start = bf16[1,3200,3200] fusion(%x), kind=kOutput, calls=%overlap.1
  %done = bf16[1,3200,3200] fusion(%x), kind=kOutput, calls=%overlap.2
  %scattered = f32[1250,8,128] fusion(%g), kind=kCustom, calls=%all-reduce-scatter.2
  %rs = f32[1,400,640]{2,1,0} reduce-scatter(%g2), EIGHTS, dimensions={0}, to_apply=%add
}

ENTRY %main.1 (p: bf16[8]) -> bf16[8] {
  %loop = (s32[], bf16[8]) while(%init), condition=%condition.1, body=%body.1
  %pair = (f32[100], f32[28]) all-reduce(%a, %b), replica_groups=mesh['data'=2,'fsdp'=8] {'data'}
  %one = f32[64] all-reduce(%c), replica_groups={{0},{1}}, to_apply=%add
  %permute = (f32[4], f32[4], u32[]) collective-permute-start(%d), source_target_pairs={{0,1},{1,2}}
}
""".replace("EIGHTS", "replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}")


def test_what_the_tpu_compiler_writes():
    found = {(one.kind, one.times): one for one in collectives(PROGRAM)}
    assert len(collectives(PROGRAM)) == 5
    gather = found["all-gather", 22]
    assert (gather.dtype, gather.group, gather.depth) == ("bf16", 8, 1)
    assert gather.sent_bytes == 22 * 3200 * 3200 * 2 * 7 / 8
    scatters = [one for one in collectives(PROGRAM) if one.kind == "reduce-scatter"]
    assert sorted(one.operand_bytes for one in scatters) == [400 * 640 * 4 * 8, 10000 * 8 * 128 * 4]
    reduce = found["all-reduce", 1]
    assert (reduce.operand_bytes, reduce.group) == (128 * 4, 2)
    assert reduce.sent_bytes == 2 * 512 / 2
    assert found["collective-permute", 1].sent_bytes == 16
    table = by_kind(collectives(PROGRAM))
    assert table["reduce-scatter"]["count"] == 44
    assert list(table)[0] == "reduce-scatter"  # the most bytes first


@pytest.mark.parametrize("length", [3, 5])
def test_a_real_program(length):
    """On the devices of the tests: a gather in a loop, and a sum after it."""
    mesh = jax.make_mesh((2, 4), ("rows", "parts"), axis_types=(AxisType.Auto,) * 2)

    def local(x, weights):
        def body(x, part):
            return x @ jax.lax.all_gather(part, "parts", axis=0, tiled=True), None

        x, _ = jax.lax.scan(body, x, weights)
        return jax.lax.psum(jnp.sum(x), "rows")

    spec = PartitionSpec
    function = jax.shard_map(
        local, mesh=mesh, in_specs=(spec("rows"), spec(None, "parts")), out_specs=spec(),
        check_vma=False,
    )  # fmt: skip
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 64), (length, 64, 64))]
    found = collectives(jax.jit(function).lower(*shapes).compile().as_text())
    kinds = {one.kind: one for one in found}
    assert set(kinds) == {"all-gather", "all-reduce"}
    gather = kinds["all-gather"]
    assert (gather.times, gather.group, gather.operand_bytes) == (length, 4, 64 * 64 * 4)
    assert (kinds["all-reduce"].group, kinds["all-reduce"].operand_bytes) == (2, 4)
