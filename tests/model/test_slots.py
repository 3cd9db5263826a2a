"""Layouts of the slots of a memory, against loops over layers, heads and slots."""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.oracle import oracle_config

from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.slots import GROUPS, Group, SlotLayout, _partition

H = 3
LAYOUTS = {
    "uniform": ((2, 2), (2, 2), (2, 2)),
    "one slot in all": ((0, 0), (0, 1), (0, 0)),
    "one layer": ((3, 0, 1),),
    "groups, one without slots": ((1, 5), (0, 0), (0, 0), (4, 5)),
    "more layers than groups": tuple((9 * (i % 2), 1) for i in range(2 * GROUPS + 2)),
    **{f"random {seed}": None for seed in range(6)},
}


def layout(name: str) -> SlotLayout:
    counts = LAYOUTS[name]
    if counts is None:
        random = np.random.default_rng(int(name.split()[1]))
        L, K = random.integers(1, 7), random.integers(1, 4)
        full = random.integers(0, 6, (L, K)) * random.integers(0, 2, (L, 1))
        full[-1, -1] += 1
        counts = tuple(map(tuple, full.tolist()))
    return SlotLayout(counts)


def each(slots: SlotLayout) -> Iterator[tuple[int, int, int]]:
    """Layer, head and slot of all slots, in the order in which a bank stores them."""
    for layer, row in enumerate(slots.counts):
        for head, count in enumerate(row):
            for slot in range(count):
                yield layer, head, slot


def stored(slots: SlotLayout, *lead: int) -> jax.Array:
    L, K, P = slots.item_shape
    shape = (L, *lead, K, P, H)
    return jnp.arange(1, 1 + np.prod(shape), dtype=jnp.float32).reshape(shape)


def unfolded(slots: SlotLayout, x: jax.Array) -> np.ndarray:
    """By loops, `(L, …, K, largest, H)` of what is stored."""
    L, K = len(slots.counts), len(slots.counts[0])
    result = np.zeros((L, *x.shape[1:-3], K, slots.largest, H), np.float32)
    for number, (layer, head, slot) in enumerate(each(slots)):
        one = x[layer, ..., head, slot, :] if slots.uniform else x[0, ..., 0, number, :]
        result[layer, ..., head, slot, :] = one
    return result


@pytest.mark.parametrize("name", LAYOUTS)
def test_sizes(name: str) -> None:
    slots = layout(name)
    assert slots.size == len(list(each(slots)))
    assert slots.largest == max(map(max, slots.counts))
    L, K = len(slots.counts), len(slots.counts[0])
    expected = (L, K, slots.largest) if slots.uniform else (1, 1, slots.size)
    assert slots.item_shape == expected
    assert slots.uniform == (len(set(itertools.chain(*slots.counts))) == 1)
    assert np.prod(slots.item_shape) == slots.size  # no padding is stored


@pytest.mark.parametrize("name", LAYOUTS)
def test_memories_by_group_by_layer_and_padded(name: str) -> None:
    slots = layout(name)
    keys = stored(slots, 2, 3, 1)
    memory = ExplicitMemory(keys, -keys, jnp.zeros((2, 3, 1), jnp.int32))
    whole = unfolded(slots, keys)
    np.testing.assert_array_equal(slots.padded(keys), whole)
    assert [at for g in slots.groups for at in range(g.low, g.high)] == list(range(len(whole)))
    for group, part in zip(slots.groups, slots.by_group(memory), strict=True):
        rows = slots.counts[group.low : group.high]
        assert group.slots == max(map(max, rows)) and group.layers == len(rows)
        counts = slots.group_counts(group)
        if counts is None:
            assert {n for row in rows for n in row} == {group.slots}
        else:
            np.testing.assert_array_equal(counts, rows)
        if part is None:
            assert not group.slots
            continue
        np.testing.assert_array_equal(
            part.keys, whole[group.low : group.high, ..., : group.slots, :]
        )
        np.testing.assert_array_equal(part.values, -np.asarray(part.keys))
        assert part.length is memory.length
    for layer, part in enumerate(slots.by_layer(memory)):
        P = max(slots.counts[layer])
        assert (part is None) == (P == 0)
        if part is not None:
            np.testing.assert_array_equal(part.keys, whole[layer, ..., :P, :])
            np.testing.assert_array_equal(part.values, -whole[layer, ..., :P, :])
    assert slots.by_group(None) == [None] * len(slots.groups)
    assert slots.by_layer(None) == [None] * len(slots.counts)


@pytest.mark.parametrize("name", LAYOUTS)
def test_flattening_is_the_inverse_and_reads_no_slot_that_a_head_has_not(name: str) -> None:
    slots = layout(name)
    keys = stored(slots, 4)
    parts = []
    for part, group in zip(
        slots.by_group(ExplicitMemory(keys, keys, jnp.zeros(4, jnp.int32))),
        slots.groups,
        strict=True,
    ):
        if part is not None:
            rows = np.array(slots.counts)[group.low : group.high, None, :, None, None]
            has = np.arange(group.slots)[:, None] < rows
            parts.append(jnp.where(has, part.keys, jnp.nan))
    np.testing.assert_array_equal(slots.flatten(parts), keys)
    shapes = jax.eval_shape(slots.flatten, parts)
    assert shapes.shape == (slots.item_shape[0], 4, *slots.item_shape[1:], H)


@pytest.mark.parametrize("name", LAYOUTS)
def test_slots_that_hold_a_token(name: str) -> None:
    slots = layout(name)
    lengths = np.array([0, 1, 2, 100])
    expected = np.zeros((4, len(slots.counts), len(slots.counts[0]), slots.largest), bool)
    flat = []
    for layer, head, slot in each(slots):
        flat.append(slot < lengths)
        expected[:, layer, head, slot] = flat[-1]
    np.testing.assert_array_equal(slots.in_counts(lengths), expected)
    assert slots.real(lengths).shape == (4, *slots.item_shape)
    np.testing.assert_array_equal(slots.real(lengths).reshape(4, -1), np.stack(flat, 1))


@pytest.mark.parametrize("name", LAYOUTS)
def test_results_of_groups_are_stacked(name: str) -> None:
    slots = layout(name)
    random = np.random.default_rng(0)
    parts = [
        jnp.asarray(random.normal(size=(g.layers, 2, g.slots))) if g.slots else None
        for g in slots.groups
    ]
    found = np.asarray(slots.stack(parts))
    assert found.shape == (len(slots.counts), 2, slots.largest)
    for group, part in zip(slots.groups, parts, strict=True):
        rows = found[group.low : group.high]
        if part is not None:
            np.testing.assert_array_equal(rows[..., : group.slots], part)
        assert not rows[..., group.slots :].any()


def test_the_layout_of_a_config() -> None:
    config = oracle_config(memory__layers=3)
    assert SlotLayout.of(config.model, config.memory).counts == ((3, 3),) * 3
    config.memory.heads = "0:1,2"
    assert SlotLayout.of(config.model, config.memory).counts == ((0, 3), (0, 0), (3, 3))
    config.memory.heads, config.memory.counts = "", "2:1+7"
    assert SlotLayout.of(config.model, config.memory).counts == ((0, 0), (0, 0), (1, 7))


# -- groups of layers


def cost(groups: tuple[Group, ...], largest: list[int]) -> float:
    padded = sum((high - low) * max(largest[low:high]) for low, high, _ in groups)
    return padded + 0.1 * sum(largest) * len(groups)


def partitions(L: int, most: int) -> Iterator[list[tuple[int, int]]]:
    for n in range(1, min(most, L) + 1):
        for cuts in itertools.combinations(range(1, L), n - 1):
            yield list(itertools.pairwise((0, *cuts, L)))


@pytest.mark.parametrize("seed", range(40))
def test_groups_are_the_best_of_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    L, most = int(random.integers(1, 9)), int(random.integers(1, 6))
    largest = (random.integers(0, 12, L) * random.integers(0, 2, L)).tolist()
    largest[random.integers(L)] += 1
    found = _partition(largest, most)
    assert len(found) <= most
    assert [at for g in found for at in range(g.low, g.high)] == list(range(L))
    assert all(g.slots == max(largest[g.low : g.high]) for g in found)
    every = [
        tuple(Group(low, high, max(largest[low:high])) for low, high in ranges)
        for ranges in partitions(L, most)
    ]
    best = min(cost(groups, largest) for groups in every)
    assert cost(found, largest) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        ([8] * 22, [(0, 22)]),
        ([8, 8, 7, 8], [(0, 4)]),  # saves less than a tenth
        ([8, 8, 0, 0, 8], [(0, 2), (2, 4), (4, 5)]),
        ([0, 0, 5], [(0, 2), (2, 3)]),
        ([1] * 10 + [40], [(0, 10), (10, 11)]),
    ],
)
def test_groups_of_layers(largest: list[int], expected: list[tuple[int, int]]) -> None:
    assert [(g.low, g.high) for g in _partition(largest, GROUPS)] == expected
