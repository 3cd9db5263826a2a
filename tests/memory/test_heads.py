"""Banks of some heads: what they hold, how much smaller they are, and whom they fit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.data_workdir import make_workdir
from data.data_workdir import tiny_config as workdir_config
from memory.memory_tiny import build, shard_files, tiny_config
from memory_axes import by_reference

from m3jax import flops
from m3jax.config import PREFIX_TOKENS
from m3jax.data.pipeline import open_pipeline
from m3jax.errors import BankError
from m3jax.make_model import make_model
from m3jax.memory import storage
from m3jax.memory.bank import Bank, join_banks
from m3jax.memory.binding import layout_of
from m3jax.memory.codec import Heads, heads_of
from m3jax.train.evaluator import evaluator

IDS = np.arange(37)
CHOSEN = "1:1,2:0+1"  # three of the four heads in the memory layers 1 and 2


def config_of(compression: str, **changes: Any) -> Any:
    small = {"writer__coarse_bits": 4, "writer__fine_bits": 3}
    return tiny_config(writer__compression=compression, **small, **changes)


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same references with all heads and with some; no test changes them."""
    folder = tmp_path_factory.mktemp("heads")
    found = {"all": folder / "all"}
    build(found["all"], config_of("none"))
    for name in ("none", "int8", "vector"):
        found[name] = folder / name
        build(found[name], config_of(name, memory__heads=CHOSEN))
    return found


def test_taking_and_placing() -> None:
    x = np.random.default_rng(0).normal(size=(5, 2, 3, 2, 4, 6)).astype(np.float32)
    heads = Heads(3, 2, (0, 3, 4))
    taken = np.asarray(heads.take(jnp.asarray(x)))
    for place, (layer, head) in enumerate(((0, 0), (1, 1), (2, 0))):
        np.testing.assert_array_equal(taken[:, :, 0, place], x[:, :, layer, head])
    assert taken.shape == (5, 2, 1, 3, 4, 6)
    placed = np.asarray(heads.place(jnp.moveaxis(jnp.asarray(taken), 2, 0)))
    expected = np.moveaxis(x * heads.mask[None, None, :, :, None, None], 2, 0)
    np.testing.assert_array_equal(placed, expected)
    assert heads_of(layout_of(tiny_config(), ())) is None
    assert heads_of(layout_of(tiny_config(memory__heads="2,1"), ())) is None
    assert heads_of(layout_of(tiny_config(memory__heads=CHOSEN), ())) == Heads(2, 2, (1, 2, 3))


def test_a_bank_holds_the_chosen_heads_of_one_with_all(banks: dict[str, Path]) -> None:
    whole, some = Bank.open(banks["all"]), Bank.open(banks["none"])
    expected, found = by_reference(whole.read(IDS)), by_reference(some.read(IDS))
    mask = np.array([[False, True], [True, True]])[None, :, :, None, None]
    np.testing.assert_array_equal(found.keys, expected.keys * mask)
    np.testing.assert_array_equal(found.values, expected.values * mask)
    np.testing.assert_array_equal(found.length, expected.length)
    none = by_reference(some.read(np.array([3, -1])))
    assert not none.keys[1].any() and none.length[1] == 0 and none.keys[0].any()


@pytest.mark.parametrize("name", ["none", "int8", "vector"])
def test_bytes_are_those_of_the_heads(banks: dict[str, Path], name: str) -> None:
    bank = Bank.open(banks[name])
    manifest = json.loads((banks[name] / storage.MANIFEST).read_bytes())
    vector = {"none": 8 * 4, "int8": 8 + 2, "vector": 4}[name]
    assert bank.bytes == 37 * 2 * 3 * 4 * vector
    assert manifest["shape"][:5] == [37, 2, 1, 3, 4]
    assert manifest["binding"]["layout"]["heads"] == CHOSEN
    config = config_of(name, memory__heads=CHOSEN)
    assert 37 * flops.memory_bytes(config, vector) == bank.bytes
    assert 4 * bank.bytes == 3 * 37 * flops.memory_bytes(config_of(name), vector)
    assert sum(map(len, shard_files(banks[name]).values())) < bank.bytes + 37 * 4 + 4 * 200


@pytest.mark.parametrize("name", ["int8", "vector"])
def test_compressed_heads_are_near_the_plain_ones(banks: dict[str, Path], name: str) -> None:
    plain, coded = (by_reference(Bank.open(banks[kind]).read(IDS)) for kind in ("none", name))
    for ours, theirs in ((coded.keys, plain.keys), (coded.values, plain.values)):
        assert not ours[:, 0, 0].any()  # the head that is not stored
        real = np.arange(4) < np.asarray(plain.length)[:, None]
        apart = np.square(ours - theirs).sum((1, 2, 4))[real].sum()
        assert 0 < apart < 0.1 * np.square(theirs).sum()


def test_other_heads_do_not_fit(banks: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BankError, match="heads = '1:1,2:0[+]1', here ''"):
        build(banks["none"], config_of("none"))
    with pytest.raises(BankError, match="heads = '', here '1:1,2:0[+]1'"):
        build(banks["all"], config_of("none", memory__heads=CHOSEN))
    some, other = Bank.open(banks["none"]), tmp_path / "other"
    build(other, config_of("none", memory__heads="1:0"))
    with pytest.raises(BankError, match="heads = '1:0', here '1:1,2:0[+]1'"):
        join_banks([some, Bank.open(other)], np.zeros(0, int), "r")
    with pytest.raises(BankError, match="heads"):
        build(tmp_path / "copy", config_of("none", memory__heads="1:0"), base=some)


def test_naming_all_heads_writes_the_same_bank(banks: dict[str, Path], tmp_path: Path) -> None:
    build(tmp_path / "bank", config_of("none", memory__heads="1:0+1,2"))
    assert shard_files(tmp_path / "bank") == shard_files(banks["all"])
    for name in (storage.MANIFEST, storage.COMPLETE):
        assert (tmp_path / "bank" / name).read_bytes() == (banks["all"] / name).read_bytes()


def test_resumed_and_copied(banks: dict[str, Path], tmp_path: Path) -> None:
    """A build that lost shards, and a bank of int8 made from a plain one, both of some heads."""
    own = tmp_path / "bank"
    config = config_of("none", memory__heads=CHOSEN)
    build(own, config)
    (own / storage.shard_key(1)).unlink()
    (own / storage.COMPLETE).unlink()
    assert build(own, config)["encoded"] == 10
    assert shard_files(own) == shard_files(banks["none"])
    report = build(tmp_path / "int8", config_of("int8", memory__heads=CHOSEN), base=Bank.open(own))
    assert report["copied"] == 37
    assert shard_files(tmp_path / "int8") == shard_files(banks["int8"])
    both = join_banks([Bank.open(own), Bank.open(banks["none"])], np.array([0]), "r")
    found, expected = both.read(np.array([38, 5])), Bank.open(own).read(np.array([1, 5]))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_batches_are_placed_where_they_are_read(tmp_path: Path) -> None:
    """The evaluator reads the bank as it is stored; losses are those of the memories placed."""
    changes = {"model__layers": 3, "memory__layers": 2, "evaluation__batches": 1}
    config = workdir_config(**changes, memory__heads="0:1,1:0")
    workdir = make_workdir(tmp_path, config)
    params = jax.jit(make_model(config, PREFIX_TOKENS).init)(jax.random.key(1))
    pipeline = open_pipeline(config, workdir, split="validation")
    stored = pipeline.batch(0).memory
    assert stored.keys.shape[::4] == (1, 2) and pipeline.dequantize is not None
    found = evaluator(config, workdir)(params)
    placed = jax.tree.map(np.asarray, pipeline.dequantize(stored))
    assert placed.keys.shape[::4] == (2, 2)
    batch = pipeline.batch(0)
    logits = np.asarray(
        jax.jit(make_model(config, PREFIX_TOKENS).logits)(params, batch.tokens, placed), np.float64
    )
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    expected = (nats * batch.weights).sum() / batch.weights.sum()
    assert found["loss_memory"] == pytest.approx(expected, rel=1e-5)
    assert found["loss_memory"] != pytest.approx(found["loss_none"], rel=1e-4)
    bank = pipeline.bank
    assert bank is not None and dataclasses.replace(bank.codec, heads=None).plain
