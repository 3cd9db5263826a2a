"""The batch's memories reach the step in the order of the scan over layers: nothing copies them."""

import itertools
import re

import jax
import numpy as np
import pytest
from train.tiny import SyntheticPipeline, tiny_config

from m3jax.memory.codec import Codec
from m3jax.mesh import host_rows, make_mesh
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.train.loss import place_batch
from m3jax.train.state import Program
from m3jax.train.step import make_step

LAYERS, KEPT = 3, 7  # in no other array of the step


def copies_of_memories(text: str, least: int) -> list[str]:
    """Operations of a compiled program that only move the memories of all layers."""
    copies = []
    for line in text.splitlines():
        match = re.search(r"= \w+\[([\d,]+)\]\S* (copy|transpose|copy-start)\(", line)
        size = np.prod([int(size) for size in match[1].split(",")]) if match else 0
        if size >= least and size % (LAYERS * KEPT) == 0:
            copies.append(line.strip())
    return copies


# Every codec, number of microbatches and of devices once; the slow ones are other combinations.
QUICK = {("int8", 1, 1)}
CASES = list(itertools.product(("none", "int8"), (1, 2), (1, 4)))


@pytest.mark.parametrize(
    ("codec", "microbatches", "devices"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_no_step_begins_with_a_copy_of_the_memories(
    devices: int, microbatches: int, codec: str
) -> None:
    config = tiny_config(
        "precomputed",
        model__layers=4,
        memory__layers=LAYERS,
        memory__kept_tokens=KEPT,
        memory__reference_length=8,
        train__microbatches=microbatches,
        mesh__fsdp=devices,
    )
    mesh = make_mesh(config, jax.devices()[:devices])
    program = Program(config, mesh)
    batch = SyntheticPipeline(config).batch(0)
    numbers = batch.memory.keys.size // (devices * microbatches)  # of all layers
    stored, dequantize = batch.memory, None
    if codec == "int8":
        quantizer = Codec("int8", config.model.head_dim, config.memory.dtype)
        shape = (*stored.keys.shape[:-1], quantizer.width)
        codes = np.zeros(shape, np.uint8)
        stored, dequantize = ExplicitMemory(codes, codes, stored.length), quantizer.dequantize
    batch = batch._replace(memory=stored)
    step = make_step(program, dequantize)
    placed = place_batch(mesh, batch, host_rows(mesh, config.data.batch_size))
    text = step.lower(program.abstract, placed).compile().as_text()
    # A layer's memories may be moved, as attention takes them; those of all layers may not.
    assert copies_of_memories(text, numbers) == []
