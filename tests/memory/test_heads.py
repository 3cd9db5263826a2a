"""Banks of heads with counts of their own: what they hold, how large they are, whom they fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from data.data_workdir import make_workdir
from data.data_workdir import tiny_config as workdir_config
from memory.memory_tiny import TinyReferences, build, shard_files, tiny_config, tiny_params
from memory_axes import by_reference
from model.oracle import Oracle
from quick import slow_among
from tolerance import close

from m3jax import flops
from m3jax.bench import quantizer as bench
from m3jax.config import PREFIX_TOKENS
from m3jax.data.pipeline import open_pipeline
from m3jax.errors import BankError, BenchmarkError
from m3jax.make_model import make_model
from m3jax.memory import codec as codecs
from m3jax.memory import storage
from m3jax.memory.bank import Bank, join_banks
from m3jax.memory.binding import layout_of, slots_of
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.slots import SlotLayout
from m3jax.train.evaluator import evaluator

IDS = np.arange(37)
COUNTS = "1:0+3,2:6+1"  # of the heads in the memory layers 1 and 2
SLOTS = 10
SOME = "1:1,2:0+1"  # three of the four heads


def config_of(compression: str, **changes: Any) -> Any:
    small = {"writer__coarse_bits": 4, "writer__fine_bits": 3}
    return tiny_config(writer__compression=compression, **small, **changes)


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same references with 4 tokens of all heads, and with counts; no test changes them."""
    folder = tmp_path_factory.mktemp("heads")
    found = {"all": folder / "all"}
    build(found["all"], config_of("none"))
    for name in ("none", "int8", "vector"):
        found[name] = folder / name
        build(found[name], config_of(name, memory__counts=COUNTS))
    return found


@pytest.mark.parametrize("selection", slow_among(["exact", "reconstruction"], ["exact"]))
def test_a_bank_holds_what_the_loops_write(
    banks: dict[str, Path], tmp_path: Path, selection: str
) -> None:
    """Of every head its own number of tokens, by layer, then head, then token, and no padding."""
    folder, changes = banks["none"], {"memory__counts": COUNTS}
    if selection == "reconstruction":
        folder = tmp_path / "bank"
        changes |= {"memory__selection": selection, "memory__each": 1}
        build(folder, config_of("none", **changes))
    config, asked = config_of("none", **changes), [0, 3, 11, 36]
    oracle, references = Oracle(config, tiny_params(config)), TinyReferences(37)
    found = by_reference(Bank.open(folder).read(np.array(asked)))
    assert found.keys.shape == (4, 1, 1, SLOTS, 8)
    lengths = np.minimum(references.lengths[asked], 6)
    np.testing.assert_array_equal(found.length, lengths)
    assert len(set(lengths.tolist())) > 1
    for row, reference in enumerate(asked):
        keys, values, *_ = oracle.write(references.table[reference])
        places = [(0, 1, s) for s in range(3)] + [(1, 0, s) for s in range(6)] + [(1, 1, 0)]
        close(found.keys[row, 0, 0], np.stack([keys[at] for at in places]))
        close(found.values[row, 0, 0], np.stack([values[at] for at in places]))


def test_some_heads_are_those_of_a_bank_with_all(banks: dict[str, Path], tmp_path: Path) -> None:
    """`memory.heads` names heads with `kept_tokens` each."""
    build(tmp_path / "some", config_of("none", memory__heads=SOME))
    build(tmp_path / "counts", config_of("none", memory__counts="1:0+4,2:4+4"))
    whole, some = Bank.open(banks["all"]), Bank.open(tmp_path / "some")
    expected, found = by_reference(whole.read(IDS)), by_reference(some.read(IDS))
    chosen = np.array([[False, True], [True, True]])
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(ours[:, 0, 0], theirs[:, chosen].reshape(37, 12, 8))
    np.testing.assert_array_equal(found.length, expected.length)
    for name in (storage.MANIFEST, storage.COMPLETE):
        one, other = (tmp_path / folder / name for folder in ("some", "counts"))
        assert one.read_bytes() == other.read_bytes()
    assert shard_files(tmp_path / "some") == shard_files(tmp_path / "counts")


def test_no_reference_is_zeros(banks: dict[str, Path]) -> None:
    found = by_reference(Bank.open(banks["none"]).read(np.array([3, -1])))
    assert not found.keys[1].any() and found.length[1] == 0 and found.keys[0].any()


@pytest.mark.parametrize("name", ["none", "int8", "vector"])
def test_bytes_are_those_of_the_slots(banks: dict[str, Path], name: str) -> None:
    bank = Bank.open(banks[name])
    manifest = json.loads((banks[name] / storage.MANIFEST).read_bytes())
    vector = {"none": 8 * 4, "int8": 8 + 2, "vector": 4}[name]
    assert bank.bytes == 37 * 2 * SLOTS * vector
    assert manifest["shape"][:5] == [37, 2, 1, 1, SLOTS]
    layout = manifest["binding"]["layout"]
    assert layout["counts"] == COUNTS and layout["kept_tokens"] == 6
    config = config_of(name, memory__counts=COUNTS)
    assert slots_of(layout) == SlotLayout.of(config.model, config.memory)
    assert 37 * flops.memory_bytes(config, vector) == bank.bytes
    assert 16 * bank.bytes == SLOTS * 37 * flops.memory_bytes(config_of(name), vector)
    assert sum(map(len, shard_files(banks[name]).values())) < bank.bytes + 37 * 4 + 4 * 200


@pytest.mark.parametrize("name", ["int8", "vector"])
def test_compressed_slots_are_near_the_plain_ones(banks: dict[str, Path], name: str) -> None:
    plain, coded = (by_reference(Bank.open(banks[kind]).read(IDS)) for kind in ("none", name))
    config = config_of(name, memory__counts=COUNTS)
    real = SlotLayout.of(config.model, config.memory).real(TinyReferences(37).lengths)[:, 0, 0]
    for ours, theirs in ((coded.keys, plain.keys), (coded.values, plain.values)):
        apart = np.square(ours - theirs)[:, 0, 0][real].sum()
        assert 0 < apart < 0.1 * np.square(theirs[:, 0, 0][real]).sum()


@pytest.mark.slow
def test_codebooks_are_trained_on_the_tokens_alone() -> None:
    """Slots that hold none, here with NaN, are left out."""
    slots = SlotLayout(((0, 3), (6, 1)))
    lengths = np.random.default_rng(0).integers(1, 12, 400)
    real = slots.real(lengths)
    memories = np.random.default_rng(1).normal(size=(400, 2, 1, 1, SLOTS, 8)).astype(np.float32)
    memories = np.where(real[:, None, ..., None], memories, np.nan)
    codec = codecs.train_codec(memories, real, "float32", 4, 3)
    assert codec.codebooks is not None
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(codec.codebooks))
    whole = codecs.train_codec(
        np.where(np.isnan(memories), 0, memories), np.ones_like(real), "float32", 4, 3
    )
    assert not codecs.same(codec, whole)


@pytest.mark.parametrize("name", ["all", "none"])
def test_the_benchmark_of_codebooks_reads_the_tokens_alone(
    banks: dict[str, Path], name: str
) -> None:
    config = config_of("none", **({"memory__counts": COUNTS} if name == "none" else {}))
    bank, slots = Bank.open(banks[name]), SlotLayout.of(config.model, config.memory)
    real, memory = slots.real(TinyReferences(37).lengths), by_reference(bank.read(IDS))
    expected = np.concatenate([memory.keys[real], memory.values[real]])
    workdir = banks[name].parent / f"of_{name}"
    workdir.mkdir(exist_ok=True)
    shutil.copytree(banks[name], workdir / "bank", dirs_exist_ok=True)
    found = bench.bank_vectors(workdir, len(expected))
    assert sorted(map(tuple, found)) == sorted(map(tuple, expected))
    assert len(bench.bank_vectors(workdir, 11)) == 11
    with pytest.raises(BenchmarkError, match=f"has {len(expected)} vectors"):
        bench.bank_vectors(workdir, len(expected) + 1)


def test_other_counts_do_not_fit(banks: dict[str, Path], tmp_path: Path) -> None:
    words = "counts = '1:0[+]3,2:6[+]1', here ''"
    with pytest.raises(BankError, match=words):
        build(banks["none"], config_of("none"))
    with pytest.raises(BankError, match="counts = '', here '1:0[+]3,2:6[+]1'"):
        build(banks["all"], config_of("none", memory__counts=COUNTS))
    with pytest.raises(BankError, match="counts = '1:0[+]3,2:6[+]1', here '1:0[+]3,2:1[+]6'"):
        build(banks["none"], config_of("none", memory__counts="1:0+3,2:1+6"))
    some, other = Bank.open(banks["none"]), tmp_path / "other"
    build(other, config_of("none", memory__counts="1:6+0"))
    with pytest.raises(BankError, match="counts = '1:6[+]0', here '1:0[+]3,2:6[+]1'"):
        join_banks([some, Bank.open(other)], np.zeros(0, int), "r")
    with pytest.raises(BankError, match=words.replace("''", "'1:0[+]4'")):
        build(tmp_path / "copy", config_of("none", memory__heads="1:1"), base=some)


def test_another_rule_or_mixture_does_not_fit(tmp_path: Path) -> None:
    one = config_of("none", memory__selection="reconstruction", memory__each=2)
    build(tmp_path, one)
    with pytest.raises(BankError, match="written with each = 2, here 1"):
        build(tmp_path, config_of("none", memory__selection="reconstruction", memory__each=1))
    with pytest.raises(BankError, match="selection = 'reconstruction', here 'received'"):
        build(tmp_path, config_of("none", memory__selection="received"))


def test_naming_equal_counts_writes_the_same_bank(banks: dict[str, Path], tmp_path: Path) -> None:
    """The layout of uniform counts, and so the bank, is that of banks without counts."""
    named = {"heads": {"memory__heads": "1:0+1,2"}}
    named["counts"] = {"memory__counts": "2:4+4,1:4+4", "memory__kept_tokens": 9}
    for folder, changes in named.items():
        build(tmp_path / folder, config_of("none", **changes))
        assert shard_files(tmp_path / folder) == shard_files(banks["all"])
        for name in (storage.MANIFEST, storage.COMPLETE):
            assert (tmp_path / folder / name).read_bytes() == (banks["all"] / name).read_bytes()
    layout = layout_of(config_of("none"), ())
    assert not {"counts", "heads", "each"} & set(layout) and layout["kept_tokens"] == 4
    assert slots_of(layout).counts == ((4, 4), (4, 4))


@pytest.mark.slow
def test_resumed_and_copied(banks: dict[str, Path], tmp_path: Path) -> None:
    """A build that lost shards, and a bank of int8 made from a plain one, both with counts."""
    own = tmp_path / "bank"
    config = config_of("none", memory__counts=COUNTS)
    build(own, config)
    (own / storage.shard_key(1)).unlink()
    (own / storage.COMPLETE).unlink()
    assert build(own, config)["encoded"] == 10
    assert shard_files(own) == shard_files(banks["none"])
    coded = config_of("int8", memory__counts=COUNTS)
    report = build(tmp_path / "int8", coded, base=Bank.open(own))
    assert report["copied"] == 37
    assert shard_files(tmp_path / "int8") == shard_files(banks["int8"])
    both = join_banks([Bank.open(own), Bank.open(banks["none"])], np.array([0]), "r")
    found, expected = both.read(np.array([38, 5])), Bank.open(own).read(np.array([1, 5]))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["none", "int8"])
def test_losses_are_those_of_memories_that_each_head_reads(
    tmp_path: Path, compression: str
) -> None:
    """The evaluator reads the bank as it is stored; losses are those of the loops."""
    changes = {"model__layers": 3, "memory__layers": 2, "evaluation__batches": 1}
    counts = {"memory__counts": "0:1+5,1:0+2", "writer__compression": compression}
    config = workdir_config(**changes, **counts)
    workdir = make_workdir(tmp_path, config)
    params = jax.jit(make_model(config, PREFIX_TOKENS).init)(jax.random.key(1))
    pipeline = open_pipeline(config, workdir, split="validation")
    batch, bank = pipeline.batch(0), pipeline.bank
    assert batch.memory is not None and bank is not None
    assert batch.memory.keys.shape[::4] == (1, 1) and batch.memory.keys.shape[-2] == 8
    assert (pipeline.dequantize is None) == (compression == "none")
    found = evaluator(config, workdir)(params)
    read = by_reference(bank.read(batch.reference_ids))  # (B, C, M, 1, 1, S, H)
    parts = []
    for x in read[:2]:
        dense = np.zeros((*x.shape[:3], 2, 2, 5, x.shape[-1]))
        starts = ((0, 0, 0, 1), (0, 1, 1, 5), (1, 1, 6, 2))
        for layer, head, start, n in starts:
            dense[..., layer, head, :n, :] = x[..., 0, 0, start : start + n, :]
        parts.append(dense)
    oracle, total = Oracle(config, params), np.zeros(2)
    for row in range(2):
        chunks = [
            [tuple(part[row, c, m] for part in (*parts, read.length)) for m in range(M)]
            for c, M in enumerate([read.length.shape[2]] * read.length.shape[1])
        ]
        logits = oracle.read(batch.tokens[row], chunks)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        nats = -np.take_along_axis(logits, batch.targets[row][:, None], -1)[:, 0]
        total += (nats * batch.weights[row]).sum(), batch.weights[row].sum()
    model = make_model(config, PREFIX_TOKENS)
    memory = ExplicitMemory(*bank.read(batch.reference_ids))
    ours = np.asarray(jax.jit(model.logits)(params, batch.tokens, memory), np.float64)
    ours -= np.log(np.exp(ours).sum(-1, keepdims=True))
    nats = -np.take_along_axis(ours, batch.targets[..., None], -1)[..., 0] * batch.weights
    assert nats[:2].sum() / batch.weights[:2].sum() == pytest.approx(total[0] / total[1], rel=1e-4)
    assert found["loss_memory"] == pytest.approx(nats.sum() / batch.weights.sum(), rel=1e-5)
    assert found["loss_memory"] != pytest.approx(found["loss_none"], rel=1e-4)
