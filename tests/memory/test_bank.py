"""The bank: what it returns, and what it refuses by name."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from memory.memory_tiny import (
    TinyReferences,
    build,
    flip,
    read_by_threads,
    tiny_config,
    tiny_params,
)
from memory_axes import by_reference
from ml_collections import ConfigDict

from m3jax.errors import BankError
from m3jax.memory import shard_reader, storage
from m3jax.memory.bank import Bank
from m3jax.memory.binding import Binding, layout_of, writer_fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank that no test changes."""
    folder = tmp_path_factory.mktemp("bank") / "bank"
    build(folder)
    return folder


def test_read_returns_every_memory_in_any_order_and_shape(folder: Path) -> None:
    bank = Bank.open(folder)
    everything = bank.read(np.arange(bank.size))
    assert everything.keys.shape == (2, 37, 2, 4, 8) and everything.keys.flags.c_contiguous
    assert everything.keys.dtype == np.float32 and everything.length.dtype == np.int32
    np.testing.assert_array_equal(everything.length, np.minimum(TinyReferences(37).lengths, 4))
    ids = np.random.default_rng(1).integers(-1, 37, (3, 5, 9)).astype(np.int32)
    assert (ids == -1).any() and len(np.unique(ids)) < ids.size
    found = bank.read(ids)
    for part, whole in zip(by_reference(found), by_reference(everything), strict=True):
        absent = np.zeros((1, *whole.shape[1:]), whole.dtype)
        np.testing.assert_array_equal(part, np.concatenate([whole, absent])[ids])
    assert np.abs(everything.keys).max() > 0 and not np.array_equal(found.keys, found.values)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_read_takes_any_shape(folder: Path, shape: tuple[int, ...]) -> None:
    found = Bank.open(folder).read(np.full(shape, -1, np.int64))
    assert found.keys.shape == found.values.shape == (2, *shape, 2, 4, 8)
    assert found.length.shape == shape and not found.length.any() and not found.keys.any()


def test_reads_own_their_arrays(folder: Path) -> None:
    bank = Bank.open(folder)
    first = bank.read(np.array([3, 4]))
    copy = first.keys.copy()
    second = bank.read(np.array([5, 6]))
    second.keys[:] = 7
    np.testing.assert_array_equal(first.keys, copy)
    np.testing.assert_array_equal(bank.read(np.array([3, 4])).keys, copy)


def test_reads_equal_those_of_tensorstore(folder: Path) -> None:
    bank, manifest = Bank.open(folder), storage.read_manifest(folder)
    assert manifest is not None
    ids = np.random.default_rng(0).integers(-1, 37, (6, 9))
    assert (np.bincount(ids[ids >= 0]) > 1).any() and (ids == -1).any()
    stored = storage.open_array(folder, manifest).read().result()
    expected = np.where(ids.reshape(6, 9, 1, 1, 1, 1, 1) < 0, 0, stored[ids])
    found = np.stack(by_reference(bank.read(ids))[:2], axis=2)
    np.testing.assert_array_equal(found, expected)


def test_many_shards_are_read_with_few_open_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Bank.open(folder).read(np.arange(37)).keys
    opened, shards = [], set()
    open_shard = shard_reader._Files._open

    def count(files, shard):
        assert sum(not file.closed for file in opened) < 2
        opened.append(open_shard(files, shard))
        shards.add(shard)
        return opened[-1]

    monkeypatch.setattr(shard_reader._Files, "_files", 2)
    monkeypatch.setattr(shard_reader._Files, "_open", count)
    np.testing.assert_array_equal(Bank.open(folder).read(np.arange(37)).keys, expected)
    assert len(shards) > 2


def test_a_rewritten_shard_is_read_by_an_open_bank(tmp_path: Path) -> None:
    """As by the repair of a bank in use: the place of a memory in its file may change."""
    build(tmp_path)
    bank = Bank.open(tmp_path)
    before = bank.read(np.arange(37))
    shard = tmp_path / "memories.zarr" / "c" / "1" / "0" / "0" / "0" / "0" / "0"
    kept = shard.read_bytes()
    flip(shard, 5)
    with pytest.raises(BankError, match="checksum differs"):
        bank.read(np.arange(37))
    shard.write_bytes(kept)
    for one, other in zip(before, Bank.open(tmp_path).read(np.arange(37)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_threads_read_the_same(folder: Path) -> None:
    bank = Bank.open(folder)
    read_by_threads(bank, bank.read(np.arange(37)).values)


@pytest.mark.parametrize("wrong", [-2, 37, 10**9])
def test_an_unknown_id_is_refused(folder: Path, wrong: int) -> None:
    with pytest.raises(BankError, match=f"reference id {wrong} is not in bank .*0 … 36"):
        Bank.open(folder).read(np.array([0, wrong, 1]))


def test_properties(folder: Path) -> None:
    bank = Bank.open(folder)
    assert bank.size == 37
    assert bank.bytes == 37 * 2 * 2 * 2 * 4 * 8 * 4
    assert bank.verify() == []
    assert bank.writer == {"hash": bank.binding.writer, "path": "", "step": 0, "run": ""}
    np.testing.assert_array_equal(bank.record_hashes, TinyReferences(37).record_hashes)
    array = json.loads((folder / "memories.zarr" / "zarr.json").read_text())
    (sharding,) = array["codecs"]
    assert sharding["name"] == "sharding_indexed"
    assert sharding["configuration"]["chunk_shape"] == [1, 2, 2, 2, 4, 8]
    names = [codec["name"] for codec in sharding["configuration"]["codecs"]]
    assert names == ["bytes", "crc32c"]
    assert array["chunk_grid"]["configuration"]["chunk_shape"][0] == 10


def test_a_url_opens_the_same_bank(folder: Path) -> None:
    ids = np.arange(37)
    there = Bank.open(f"file://{folder}/").read(ids)
    np.testing.assert_array_equal(there.keys, Bank.open(folder).read(ids).keys)


def test_bfloat16_is_native(tmp_path: Path) -> None:
    build(tmp_path / "half", tiny_config(memory__dtype="bfloat16"))
    build(tmp_path / "full")
    half, full = Bank.open(tmp_path / "half"), Bank.open(tmp_path / "full")
    assert half.bytes * 2 == full.bytes
    keys = half.read(np.arange(37)).keys
    assert keys.dtype == ml_dtypes.bfloat16
    expected = full.read(np.arange(37)).keys.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(keys.view(np.uint16), expected.view(np.uint16))


def _expected(config: ConfigDict | None = None, weights: int = 0, **changes: str) -> Binding:
    config = tiny_config() if config is None else config
    params = tiny_params(config, weights)
    parts = {
        "writer": writer_fingerprint(params, config.memory),
        "tokenizer": "tokenizer",
        "references": TinyReferences(37).fingerprint,
        **changes,
    }
    return Binding(**parts, layout=layout_of(config, (1, 2)))


def test_a_fitting_bank_opens(folder: Path) -> None:
    Bank.open(folder).require(_expected())


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"weights": 1}, "written by other weights: bank"),
        ({"tokenizer": "another"}, "written with another tokenizer: bank tokenizer, here another"),
        ({"references": "others"}, "written from other references"),
        ({"config": {"memory__kept_tokens": 3}}, "written with kept_tokens = 4, here 3"),
        ({"config": {"memory__selection": "approximate"}}, "selection = 'exact'"),
        ({"config": {"model__rope_base": 500.0}}, "rope_base = 10000.0, here 500.0"),
        ({"config": {"model__no_rope_every": 4}}, "no_rope_every = 0, here 4"),
        ({"config": {"model__embedding_scale": 6.0}}, "embedding_scale = 1.0, here 6.0"),
        ({"config": {"memory__dtype": "bfloat16"}}, "dtype = 'float32', here 'bfloat16'"),
    ],
)
def test_a_bank_of_something_else_is_refused_by_name(folder: Path, expected, words: str) -> None:
    if "config" in expected:
        expected = {"config": tiny_config(**expected["config"])}
    with pytest.raises(BankError, match=words) as caught:
        Bank.open(folder).require(_expected(**expected))
    assert "launch/write_bank.py" in str(caught.value)


def test_every_difference_is_named(folder: Path) -> None:
    expected = _expected(tiny_config(memory__kept_tokens=3), weights=1, tokenizer="t")
    with pytest.raises(BankError) as caught:
        Bank.open(folder).require(expected)
    for words in ("other weights", "another tokenizer", "kept_tokens"):
        assert words in str(caught.value)
    assert "other references" not in str(caught.value)


def test_prefix_tokens_are_bound() -> None:
    ours, theirs = (
        Binding("w", "t", "r", layout_of(tiny_config(), prefix)) for prefix in ((1,), (1, 2))
    )
    assert ours.differences(theirs) == ["written with prefix_tokens = [1, 2], here [1]"]
    # A binding survives JSON.
    assert Binding(**json.loads(json.dumps(vars(ours)))) == ours


def test_the_fingerprint_sees_what_writes_and_nothing_else() -> None:
    config = tiny_config(model__layers=4)
    params = tiny_params(config)
    before = writer_fingerprint(params, config.memory)
    for name in ("upper", "final_norm", "head"):
        changed = {**params, name: jax.tree.map(lambda x: x + 1, params[name])}
        assert writer_fingerprint(changed, config.memory) == before, name
    for name in ("embedding", "lower", "memory"):
        for i, leaf in enumerate(jax.tree.leaves(params[name])):
            leaves, tree = jax.tree.flatten(params[name])
            other = leaf.copy()
            other.reshape(-1)[-1] += 1
            leaves[i] = other
            changed = {**params, name: jax.tree.unflatten(tree, leaves)}
            assert writer_fingerprint(changed, config.memory) != before, (name, i)
    half = {**params, "embedding": params["embedding"].astype(ml_dtypes.bfloat16)}
    assert writer_fingerprint(half, config.memory) != before


# -- damage


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of the bank, to break."""
    return Path(shutil.copytree(folder, tmp_path / "bank"))


def _shard(folder: Path, shard: int) -> Path:
    return folder / "memories.zarr" / "c" / str(shard) / "0/0/0/0/0"


def test_an_unfinished_bank_is_refused(own: Path, tmp_path: Path) -> None:
    (own / "COMPLETE").unlink()
    with pytest.raises(BankError, match="is not finished: COMPLETE is missing.*write_bank"):
        Bank.open(own)
    with pytest.raises(BankError, match="holds no bank.*write_bank"):
        Bank.open(tmp_path / "nothing")


@pytest.mark.parametrize("place", [40, 900, -5])  # two memories and the shard's index
def test_a_flipped_bit_names_the_shard(own: Path, place: int) -> None:
    flip(_shard(own, 1), place)
    bank = Bank.open(own)
    (problem,) = bank.verify()
    assert f"{own}/memories.zarr/c/1/0/0/0/0/0" in problem and "damaged" in problem
    bank.read(np.array([0, 9, 20, 36]))  # other shards still serve
    with pytest.raises(BankError, match="c/1/0/0/0/0/0 .*is damaged.*[Mm]ove.*write_bank"):
        bank.read(np.arange(37))


def test_a_truncated_shard_names_the_shard(own: Path) -> None:
    path = _shard(own, 2)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BankError, match="c/2/0/0/0/0/0 .*is damaged"):
        Bank.open(own).read(np.array([25]))


def test_exchanged_shards_are_refused(own: Path, tmp_path: Path) -> None:
    """With one another, or with a shard of another bank of the same shape."""
    shards = [_shard(own, i) for i in range(4)]
    contents = [path.read_bytes() for path in shards]
    shards[0].write_bytes(contents[1])
    shards[1].write_bytes(contents[0])
    build(tmp_path / "other", weights=1)
    shards[2].write_bytes(_shard(tmp_path / "other", 2).read_bytes())
    bank = Bank.open(own)
    assert len(bank.verify()) == 3 and all("of another place or bank" in p for p in bank.verify())
    for ids in ([3], [12], [25]):
        with pytest.raises(BankError, match="holds other memories than were written there"):
            bank.read(np.array(ids))
    bank.read(np.array([30, 36]))
    for path in shards[:3]:
        path.unlink()
    report = build(own)
    assert report["kept"] == 7 and Bank.open(own).verify() == []
    assert [path.read_bytes() for path in shards] == contents


@pytest.mark.parametrize("name", ["COMPLETE", "crc32c.bin", "manifest.json"])
def test_writing_again_mends_what_says_that_a_bank_is_whole(own: Path, name: str) -> None:
    files = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    place = files[own / name].find(b"writer_step") + 16 if name == "manifest.json" else 3
    flip(own / name, place)
    with pytest.raises(BankError, match=rf"{name}.* was changed or lost .*keeps the memories"):
        Bank.open(own)
    assert build(own)["kept"] == 37
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == files


def test_a_missing_shard_is_no_zeros(own: Path) -> None:
    _shard(own, 3).unlink()
    bank = Bank.open(own)
    (problem,) = bank.verify()
    assert "c/3/0/0/0/0/0 (memories 30 … 36) is missing" in problem
    with pytest.raises(BankError, match="c/3/0/0/0/0/0 .*is missing.*write_bank"):
        bank.read(np.array([35]))


@pytest.mark.parametrize(
    ("name", "words"),
    [("lengths.npy", "lengths.npy is damaged"), ("manifest.json", "was changed")],
)
def test_a_damaged_side_file_is_named(own: Path, name: str, words: str) -> None:
    data = (own / name).read_bytes().replace(b"\x04\x00", b"\x03\x00").replace(b"10000", b"10001")
    assert data != (own / name).read_bytes()
    (own / name).write_bytes(data)
    with pytest.raises(BankError, match=words):
        Bank.open(own)


def test_another_format_is_refused(own: Path) -> None:
    manifest = json.loads((own / "manifest.json").read_text())
    text = json.dumps({**manifest, "format": 99}).encode()
    (own / "manifest.json").write_bytes(text)
    with pytest.raises(BankError, match="manifest.json or COMPLETE was changed"):
        Bank.open(own)
    (own / "COMPLETE").write_bytes(storage.complete_stamp(text))
    with pytest.raises(BankError, match="has format 99, this version of m3jax reads 2"):
        Bank.open(own)
    (own / "manifest.json").write_text("{")
    (own / "COMPLETE").write_bytes(storage.complete_stamp(b"{"))
    with pytest.raises(BankError, match="is no manifest"):
        Bank.open(own)
    (own / "manifest.json").unlink()
    with pytest.raises(BankError, match="holds no bank"):
        Bank.open(own)


def test_a_missing_array_is_named(own: Path) -> None:
    (own / "memories.zarr" / "zarr.json").unlink()
    with pytest.raises(BankError, match="zarr.json is missing"):
        Bank.open(own)
