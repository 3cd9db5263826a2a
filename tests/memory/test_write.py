"""The writer: what it writes, how it resumes, what it copies, and what stops it."""

import collections
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
from memory.memory_tiny import (
    TinyReferences,
    build,
    shard_files,
    tiny_config,
    tiny_params,
)
from tolerance import close

from m3jax.config import PREFIX_TOKENS
from m3jax.errors import BankError
from m3jax.make_model import make_model
from m3jax.memory import storage
from m3jax.memory.bank import Bank
from m3jax.memory.codec import Codec
from m3jax.memory.sparsify import sparsifier
from m3jax.memory.write import Build
from m3jax.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank that no test changes."""
    folder = tmp_path_factory.mktemp("write") / "bank"
    report = build(folder)
    assert report["encoded"] == report["references"] == 37
    assert report["kept"] == report["copied"] == 0
    assert report["bytes"] == Bank.open(folder).bytes
    assert 0 < report["encode_share"] <= 1 and report["memories_per_second"] > 0
    return folder


def _copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def _shard(folder: Path, shard: int) -> Path:
    return folder / storage.shard_key(shard)


def test_the_bank_holds_what_encode_returns(folder: Path) -> None:
    config = tiny_config()
    model, references = make_model(config, PREFIX_TOKENS), TinyReferences(37)
    assert references.lengths.min() < 4 < references.lengths.max()
    memory = jax.jit(lambda p, t: model.encode(p, t, sparsifier(config.memory)))(
        tiny_params(config), references.tokens(np.arange(37))
    )
    found = Bank.open(folder).read(np.arange(37))
    close(found.keys, memory.keys)
    close(found.values, memory.values)
    np.testing.assert_array_equal(found.length, memory.length)


def test_a_finished_bank_is_left_alone(folder: Path, tmp_path: Path) -> None:
    own = _copy(folder, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in own.rglob("c/**/0")}
    report = build(own)
    assert report["kept"] == 37 and report["encoded"] == 0
    assert {path: path.stat().st_mtime_ns for path in own.rglob("c/**/0")} == before


def test_deleted_shards_come_back_the_same(folder: Path, tmp_path: Path) -> None:
    own = _copy(folder, tmp_path)
    for shard in (1, 3):
        _shard(own, shard).unlink()
    kept = _shard(own, 0).stat().st_mtime_ns
    report = build(own)
    assert report["kept"] == 20 and report["encoded"] == 17
    assert shard_files(own) == shard_files(folder)
    assert _shard(own, 0).stat().st_mtime_ns == kept
    assert Bank.open(own).verify() == []


def test_a_bank_is_not_complete_while_shards_are_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = _copy(folder, tmp_path)
    _shard(own, 2).unlink()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Build, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        build(own)
    with pytest.raises(BankError, match="not finished"):
        Bank.open(own)
    monkeypatch.undo()
    build(own)
    assert shard_files(Bank.open(own).folder) == shard_files(folder)


def test_leftovers_of_a_killed_write_are_removed(folder: Path, tmp_path: Path) -> None:
    own = _copy(folder, tmp_path)
    leftovers = [
        _shard(own, 1).with_name("0.__lock"),
        own / "manifest.json.__lock",
        own / "memories.zarr/zarr.json.__lock",
    ]
    for leftover in leftovers:
        leftover.write_bytes(b"torn")
    _shard(own, 1).unlink()
    build(own)
    assert not list(own.rglob("*__lock*"))
    assert shard_files(own) == shard_files(folder)


def test_killed_before_the_manifest(folder: Path, tmp_path: Path) -> None:
    own = _copy(folder, tmp_path)
    for name in ("manifest.json", "COMPLETE"):
        (own / name).unlink()
    assert build(own)["encoded"] == 37
    assert shard_files(own) == shard_files(folder)


def test_lost_side_files_come_back(folder: Path, tmp_path: Path) -> None:
    own = _copy(folder, tmp_path)
    (own / "lengths.npy").unlink()
    (own / "record_hashes.npy").write_bytes(b"damaged")
    with pytest.raises(BankError, match="lengths.npy is missing.*write_bank"):
        Bank.open(own)
    build(own)
    np.testing.assert_array_equal(Bank.open(own).lengths, Bank.open(folder).lengths)
    np.testing.assert_array_equal(Bank.open(own).record_hashes, Bank.open(folder).record_hashes)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"weights": 1}, "written by other weights"),
        ({"tokenizer": "t2"}, "another tokenizer: bank tokenizer, here t2"),
        ({"references": TinyReferences(37, seed=1)}, "other references"),
        ({"references": TinyReferences(38)}, "other references"),
        ({"config": {"memory__kept_tokens": 3}}, "kept_tokens = 4, here 3"),
        ({"config": {"memory__dtype": "bfloat16"}}, "dtype = 'float32', here 'bfloat16'"),
        ({"config": {"writer__shard_memories": 7}}, "config.writer.shard_memories = 10, here 7"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_bank_is_refused(
    folder: Path, tmp_path: Path, other: dict, words: str, finished: bool
) -> None:
    own = _copy(folder, tmp_path)
    if not finished:
        (own / "COMPLETE").unlink()
        _shard(own, 1).unlink()
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*")}
    if "config" in other:
        other = {"config": tiny_config(**other["config"])}
    with pytest.raises(BankError, match=words) as caught:
        build(own, **other)
    assert str(own) in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in own.rglob("*")} == before


# -- what there is to write


def _references(*rows: list[int]) -> TinyReferences:
    references = TinyReferences(len(rows))
    references.lengths = np.array([len(row) for row in rows], np.int32)
    references.table = np.zeros((len(rows), 12), np.int32)
    for table, row in zip(references.table, rows, strict=True):
        table[: len(row)] = row
    return references


def test_nothing_to_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="the reference set is empty"):
        build(tmp_path / "bank", references=TinyReferences(0))
    with pytest.raises(BankError, match="none of the 2 references has usable tokens"):
        build(tmp_path / "bank", references=_references([], []))
    with pytest.raises(BankError, match="reference 0 has 34 tokens, .*reference_length = 12"):
        build(tmp_path / "bank", references=TinyReferences(1, seed=2, length=40))
    assert not (tmp_path / "bank").exists()


def test_padding_inside_a_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="reference 1 has tokens that are 0"):
        build(tmp_path / "bank", references=_references([5, 6, 7, 8], [5, 0, 7]))


def test_a_reference_without_tokens_among_others(tmp_path: Path) -> None:
    build(tmp_path / "bank", references=_references([5, 6, 7, 8, 9], [], [6]))
    found = Bank.open(tmp_path / "bank").read(np.arange(3))
    np.testing.assert_array_equal(found.length, [4, 0, 1])
    assert not found.keys[:, 1].any() and not found.keys[:, 2, :, 1:].any()


def test_fewer_references_than_a_batch_or_shard(tmp_path: Path) -> None:
    build(tmp_path / "bank", references=TinyReferences(3))
    assert list(shard_files(tmp_path / "bank")) == ["0/0/0/0/0/0"]
    assert Bank.open(tmp_path / "bank").read(np.arange(3)).length.all()


def test_on_a_mesh(folder: Path, tmp_path: Path) -> None:
    config = tiny_config()
    config.mesh.data, config.mesh.fsdp = 2, 4
    config.data.batch_size = 16
    build(tmp_path / "bank", config, mesh=make_mesh(config))
    ours, theirs = Bank.open(tmp_path / "bank"), Bank.open(folder)
    assert ours.binding == theirs.binding
    ids = np.arange(37)
    close(ours.read(ids).values, theirs.read(ids).values)
    config.writer.batch_references = 12
    with pytest.raises(BankError, match="batch_references = 12 cannot be split over the 8 devices"):
        build(tmp_path / "other", config, mesh=make_mesh(config))


# -- copying from an older bank


def test_only_edited_references_are_encoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: collections.Counter[int] = collections.Counter()
    edited = TinyReferences(37)
    edited.table[[4, 30], 0] = [61, 62]
    # One is new at the front and one is gone: the others have other ids than in the base.
    edited.table = np.concatenate([edited.table[:1], edited.table[:20], edited.table[21:]])
    edited.table[0, :2] = [63, 64]
    edited.lengths = (edited.table != 0).sum(1).astype(np.int32)
    tokens = TinyReferences.tokens
    monkeypatch.setattr(
        TinyReferences, "tokens", lambda self, ids: seen.update(ids.tolist()) or tokens(self, ids)
    )
    report = build(tmp_path / "edited", references=edited, base=Bank.open(folder))
    assert report["copied"] == 34 and report["encoded"] == 3
    assert seen == {0: 1, 5: 1, 30: 1}
    build(tmp_path / "fresh", references=edited)
    assert shard_files(tmp_path / "edited") == shard_files(tmp_path / "fresh")
    old, new = Bank.open(folder), Bank.open(tmp_path / "edited")
    assert not np.array_equal(new.read(np.array([5])).keys, old.read(np.array([4])).keys)
    np.testing.assert_array_equal(new.read(np.array([1])).keys, old.read(np.array([0])).keys)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"weights": 1}, "written by other weights"),
        ({"tokenizer": "t2"}, "another tokenizer"),
        ({"config": tiny_config(memory__kept_tokens=3)}, "kept_tokens = 4, here 3"),
    ],
)
def test_a_base_of_another_writer_is_refused(
    folder: Path, tmp_path: Path, other: dict, words: str
) -> None:
    with pytest.raises(BankError, match=f"cannot be copied from the base bank .*{words}"):
        build(tmp_path / "bank", base=Bank.open(folder), **other)


# -- full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 128 kB; the bank of 37 memories takes about 43 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk]
    if not shutil.which("mount") or processes.call(command).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    processes.succeed(["umount", disk])


def test_too_small_a_disk_stops_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BankError, match="needs 45.1kB for 4 missing shards, but .* 10.0kB free"):
        build(tmp_path / "bank")
    assert not shard_files(tmp_path / "bank")


def test_a_disk_that_fills_up_is_named_and_the_build_resumes(
    folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(os.urandom(80_000))
    # The check before the start is blind: something else fills the disk while the bank is written.
    monkeypatch.setattr(Build, "check_space", lambda self, progress: None)
    with pytest.raises(BankError) as caught:
        build(small_disk / "bank")
    message = str(caught.value)
    assert "the disk is full: shard file" in message and "memories.zarr/c/" in message
    assert "missing shards" in message and "run the same command again" in message
    assert not list(small_disk.rglob("*__lock*"))
    with pytest.raises(BankError, match="not finished"):
        Bank.open(small_disk / "bank")
    filler.unlink()
    report = build(small_disk / "bank")
    assert report["kept"] < 37
    assert shard_files(small_disk / "bank") == shard_files(folder)


def test_a_full_disk_reported_by_a_shard_write(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without root: the third shard's write fails as TensorStore reports it."""
    open_array = storage.open_array

    class Full:
        def __init__(self, array: object) -> None:
            self.array = array

        def __getitem__(self, span: slice) -> object:
            if span.start == 20:
                raise ValueError(
                    'RESOURCE_EXHAUSTED: Failed to write "0.__lock" [OS error 28: ENOSPC No space'
                    " left on device]"
                )
            return self.array[span]

    own = tmp_path / "bank"
    monkeypatch.setattr(
        storage,
        "open_array",
        lambda *a, create=False, **k: (
            open_array(*a, create=True, **k) if create else Full(open_array(*a, **k))
        ),
    )
    with pytest.raises(BankError, match=r"the disk is full: shard file .*c/2/0/0/0/0/0 could not"):
        build(own)
    monkeypatch.undo()
    assert build(own)["kept"] >= 20
    assert shard_files(own) == shard_files(folder)


def test_another_failure_of_a_write_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = OSError("input/output error")
    manifest, codec = {"shape": [3], "shard_memories": 2}, Codec("none", 8, "float32")
    found = Build(tmp_path, manifest, [], np.zeros(3, int), None, codec)
    error = found.failure(1, failure)
    assert "c/1/0/0/0/0/0 could not be written: input/output error" in str(error)


def test_progress_says_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "bank", progress=True)
    shown = capsys.readouterr()
    assert "37 of 37 memories to write, 45.1kB" in shown.out
    assert "37/37" in shown.err and "memories/s" in shown.err
