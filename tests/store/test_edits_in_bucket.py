"""Edits of knowledge in a bucket: as on a disk, from several hosts, killed at any moment."""

import concurrent.futures
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.data_workdir import make_workdir
from knowledge.test_edit import CONFIG, documents, found, opened, write
from store.cloud_storage import BUCKET, CloudStorage, Fault, lose_answers

from m3jax import mirror as mirrors
from m3jax import store
from m3jax.errors import BankError, StoreError, UserError, VersionError
from m3jax.knowledge.current import read_current
from m3jax.knowledge.edit import edit, merge, refresh, rollback
from m3jax.knowledge.maintain import compact, repair, verify
from m3jax.knowledge.versions import (
    fetch_current,
    open_references,
    open_version,
    require_unedited,
    versions,
)
from m3jax.memory import storage
from m3jax.memory.bank import Bank
from m3jax.mirror import Mirror
from m3jax.store import Store
from m3jax.text.tokenizer import Tokenizer

URL = f"gs://{BUCKET}/runs/wiki"
PARTS = ("tokenizer", "corpus/train", "corpus/validation", "references", "index")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workdir(tmp_path_factory.mktemp("prepared"), CONFIG)


@pytest.fixture
def server(
    quick_server: CloudStorage, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A bucket that holds the prepared workdir and its bank."""
    monkeypatch.setattr(store, "LEASE", 1.0)
    monkeypatch.setattr(storage, "RETRIES", store.RETRIES)
    storage._context.cache_clear()
    mirror = Mirror(URL, tmp_path / "maker")
    shutil.copytree(prepared, mirror.local, dirs_exist_ok=True)
    for part in PARTS:
        mirror.publish(part)
    for path in (path for path in (prepared / "bank").rglob("*") if path.is_file()):
        Store(f"{URL}/bank").write(str(path.relative_to(prepared / "bank")), path.read_bytes())
    yield quick_server
    storage._context.cache_clear()


@pytest.fixture
def local(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "local"))


def host(tmp_path: Path, name: str) -> Path:
    """Another machine's mirror."""
    return Mirror(URL, tmp_path / name).local


def keys_of(workdir: Path) -> set[str]:
    version, tokenizer = open_version(workdir), Tokenizer.load(workdir / "tokenizer")
    return {*open_references(CONFIG, version, tokenizer).live_keys()}


def assert_same(workdir: Path, local: Path) -> None:
    """What a host reads is what a local workdir has, bit by bit."""
    mine, theirs = opened(workdir), opened(local)
    assert versions(workdir) == versions(local)
    assert [*mine[0].live_keys()] == [*theirs[0].live_keys()]
    live = np.asarray(theirs[0].live)
    for values, expected in zip(mine[2].read(live), theirs[2].read(live), strict=True):
        np.testing.assert_array_equal(values, expected)
    query = mine[1].embedder.embed(["Zork otter", "pet"])
    for values, expected in zip(mine[1].search(query, 5), theirs[1].search(query, 5), strict=True):
        np.testing.assert_array_equal(values, expected)


@pytest.mark.slow
def test_edits_of_two_hosts_are_those_of_a_disk(server, tmp_path, local):
    first, second = host(tmp_path, "first"), host(tmp_path, "second")
    require_unedited(first)

    def both(host: Path, act: Any) -> None:
        made, expected = act(host), act(local)
        assert (made.number, made.note) == (expected.number, expected.note)
        for reader in (first, second):
            assert_same(reader, local)

    both(first, lambda at: edit(CONFIG, at, documents=documents("Zork", "Quux"), write=write))
    both(
        second,
        lambda at: edit(
            CONFIG, at, documents=documents("Zork", word="lynx"), replace=True, write=write
        ),
    )
    assert found(first, "Zork")[0] == "Zork lynx" and found(second, "Zork", number=1)[0]
    both(first, lambda at: edit(CONFIG, at, delete=["Quux"], write=write))
    both(second, lambda at: rollback(at, 1))
    both(first, lambda at: refresh(at, "again", write=write_anew, note="anew"))
    assert verify(CONFIG, second) == []
    both(second, lambda at: compact(CONFIG, at, write=write_anew)[0])
    assert [name for name in Store(URL).names() if "versions/000001" in name] == []
    assert Store(f"{URL}/bank").names() == Store(f"{URL}/references").names() == []
    assert not (first / "references").exists() and not (first / "versions/000001").exists()
    with pytest.raises(VersionError, match="deleted by a compaction"):
        open_version(first, 1)
    both(first, lambda at: edit(CONFIG, at, documents=documents("New"), write=write_anew))
    with pytest.raises(VersionError, match="was edited"):
        require_unedited(host(tmp_path, "third"))


def write_anew(references: Any, folder: Any, base: Any) -> None:
    """Writes with other weights, so that nothing of an older bank can be copied."""
    write(references, folder, None, weights=1)


@pytest.mark.slow
def test_a_workdir_is_merged_with_one_of_a_bucket(server, tmp_path, local):
    edit(CONFIG, local, documents=documents("Zork"), write=write)
    edit(CONFIG, host(tmp_path, "first"), documents=documents("Quux"), write=write)
    merged = merge(CONFIG, host(tmp_path, "second"), local, write=write, replace=True)
    assert merged.number == 2
    merge(CONFIG, local, host(tmp_path, "third"), write=write, replace=True)
    assert {"Zork#0", "Quux#0"} <= {*opened(local)[0].live_keys()}


def write_again(folder: Path) -> Any:
    """Writes as `write`, but encodes references once: later banks are copied from `folder`."""

    def write_copy(references: Any, target: Any, base: Any) -> None:
        first = folder / references.fingerprint
        if not first.exists():
            write(references, first, base)
        write(references, target, Bank.open(first))

    return write_copy


def changes(line: str) -> bool:
    """Whether a request changes the workdir, apart from leases."""
    return line.startswith(("POST", "DELETE")) and not re.search(r"readers|wiki/lock", line)


def refuse_after(server: CloudStorage, count: int, patch: pytest.MonkeyPatch) -> None:
    """Lets `count` requests that change the workdir through, then none of any kind."""
    real, left = server.take_fault, count

    def take(line: str) -> Fault | None:
        nonlocal left
        with server.lock:
            left -= left < 0 or changes(line)
            return Fault("", 403) if left < 0 else real(line)

    patch.setattr(server, "take_fault", take)


def names_in(server: CloudStorage) -> set[str]:
    """Names of all objects, without leases and what editors are called."""
    names = {re.sub(r"/[0-9a-f]{16}/", "/TOKEN/", name) for name in server.buckets[BUCKET]}
    return {name for name in names if not re.search(r"/readers/|wiki/lock$", name)}


@pytest.mark.parametrize(
    ("also", "stride"),
    [
        ("other host", 17),
        *(
            pytest.param(also, stride, marks=pytest.mark.slow)
            for also, stride in (("other host", 1), ("same", 2), ("other edit", 2))
        ),
    ],
)
def test_an_edit_stopped_at_any_request_is_made_or_not(
    server, tmp_path, local, monkeypatch, also, stride
):
    write = write_again(tmp_path / "written")
    expected = edit(CONFIG, local, documents=documents("Zork"), write=write)
    before = dict(server.buckets[BUCKET])
    server.requests.clear()
    edit(CONFIG, host(tmp_path, "undisturbed"), documents=documents("Zork"), write=write)
    whole, outcomes = names_in(server), set[int]()
    total = sum(changes(line) for line, _ in server.requests)
    assert total > 25
    for step in range(total - 1, -1, -stride):
        server.buckets[BUCKET] = dict(before)
        folder, reader = host(tmp_path, f"first {step}"), host(tmp_path, f"reader {step}")
        with monkeypatch.context() as patch:
            refuse_after(server, step, patch)
            with pytest.raises((StoreError, BankError)) as caught:
                edit(CONFIG, folder, documents=documents("Zork"), write=write)
        assert "\n" not in str(caught.value)
        server.buckets[BUCKET].pop("runs/wiki/lock", None)  # as if it was seen dead
        number = open_version(reader).number
        outcomes.add(number)
        assert len(opened(reader)[0]) == len(opened(local, number)[0])
        again = reader if also == "other host" else folder
        if also == "other edit":
            complete = "runs/wiki/versions/000001/version.json" in server.buckets[BUCKET]
            made = edit(CONFIG, again, documents=documents("Quux"), write=write)
            assert made.number == 1 + complete
            assert {"Quux#0", "Zork#0"} & keys_of(reader) == {"Quux#0", *["Zork#0"][:complete]}
            continue
        made = edit(CONFIG, again, documents=documents("Zork"), write=write)
        assert made.number == expected.number and names_in(server) == whole
        assert_same(host(tmp_path, f"last {step}"), local)
    assert outcomes == {0, 1}


def test_an_edit_goes_on_with_the_memories_of_one_that_was_stopped(server, tmp_path, local):
    def dying(references: Any, folder: Any, base: Any) -> None:
        write(references, folder, base)
        raise StoreError("gone")

    with pytest.raises(StoreError, match="gone"):
        edit(CONFIG, host(tmp_path, "first"), documents=documents("Zork"), write=dying)
    encoded = []

    def counted(references: Any, folder: Any, base: Any) -> None:
        encoded.append(storage.missing_shards(folder, storage.read_manifest(folder)))
        write(references, folder, base)

    edit(CONFIG, host(tmp_path, "second"), documents=documents("Zork"), write=counted)
    edit(CONFIG, local, documents=documents("Zork"), write=write)
    assert encoded == [[]]
    assert_same(host(tmp_path, "third"), local)


@pytest.mark.parametrize("same", [True, False])
def test_an_editor_that_was_suspended_meets_nobody_when_it_goes_on(server, tmp_path, local, same):
    """Its lease is taken over; the check of its lease comes just before it is suspended."""
    name, second = "Zork" if same else "Quux", host(tmp_path, "second")
    seen: dict[str, Any] = {}

    def suspended(references: Any, folder: Any, base: Any) -> None:
        write(references, folder, base)
        server.buckets[BUCKET].pop("runs/wiki/lock")
        own = dict(mirrors._leases)  # of this process, which has those of both
        edit(CONFIG, second, documents=documents(name), write=write)
        mirrors._leases.update(own)
        there = server.buckets[BUCKET].items()
        seen.update(item for item in there if not re.search("lock|readers", item[0]))
        write(references, folder, None)  # goes on

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirrors.Mirror, "check", lambda self, part="": None)  # the worst moment
        with pytest.raises(StoreError, match="was suspended, or had no connection"):
            edit(CONFIG, host(tmp_path, "first"), documents=documents("Zork"), write=suspended)
    now = server.buckets[BUCKET]
    assert {name: now.get(name) for name in seen} == seen
    edit(CONFIG, local, documents=documents(name), write=write)
    assert_same(host(tmp_path, "third"), local)


def test_of_two_editors_at_once_one_wins_or_both_do_in_turn(server, tmp_path):
    names, barrier = ["Aa", "Bb", "Cc"], threading.Barrier(3)
    Store(f"{URL}/bank").delete_under("")  # models are made in the main thread only

    def add(name: str) -> int | str:
        folder = host(tmp_path, name)
        barrier.wait()
        try:
            return edit(CONFIG, folder, documents=documents(name)).number
        except UserError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        results = dict(zip(names, pool.map(add, names), strict=True))
    won = {name for name, result in results.items() if isinstance(result, int)}
    lost = [result for result in results.values() if isinstance(result, str)]
    assert won and all("\n" not in text and "another process" in text for text in lost)
    keys = keys_of(host(tmp_path, "reader"))
    assert {name for name in names if f"{name}#0" in keys} == won
    for name in {*names} - won:
        edit(CONFIG, host(tmp_path, name), documents=documents(name))
    keys = keys_of(host(tmp_path, "reader"))
    assert {f"{name}#0" for name in names} <= keys


def test_an_editor_that_lost_its_lease_changes_nothing(server, tmp_path):
    def slow_write(*given: Any) -> None:
        write(*given)
        Store(URL).write("lock", b"another 1")  # it took the dead lease over
        mirrors._leases[URL]._renewal.join(20)

    first = host(tmp_path, "first")
    with pytest.raises(StoreError, match="another one may be writing"):
        edit(CONFIG, first, documents=documents("Zork"), write=slow_write)
    assert open_version(host(tmp_path, "reader")).number == 0
    Store(URL).delete("lock")
    assert edit(CONFIG, first, documents=documents("Zork"), write=write).number == 1


def test_a_current_version_that_changed_meanwhile_is_not_overwritten(server, tmp_path, monkeypatch):
    first = host(tmp_path, "first")
    edit(CONFIG, first, documents=documents("Zork"), write=write)

    def other(*given: Any) -> None:
        write(*given)
        monkeypatch.setattr(mirrors.Mirror, "check", lambda self: None)
        data = Store(URL).read("versions/current.json") or b""
        Store(URL).write("versions/current.json", data + b"\n")

    with pytest.raises(VersionError, match="was edited meanwhile"):
        edit(CONFIG, first, documents=documents("Quux"), write=other)
    fetch_current(first)
    assert read_current(first)["version"] == 1


def test_what_another_host_reads_survives_a_compaction(server, tmp_path):
    first, second = host(tmp_path, "first"), host(tmp_path, "second")
    edit(CONFIG, first, documents=documents("Zork"), write=write)
    reading = open_version(second)
    bank = opened(second)[2]
    version, busy = compact(CONFIG, first, write=write)
    assert version.number == 2 and busy == [f"{URL}/versions/000001"]
    assert bank.read(np.array([0, bank.size - 1])).keys.any()
    reading.close()
    del bank
    Store(URL).write("versions/readers/000001-dead", b"dead 1")
    assert compact(CONFIG, first, write=write)[1] == []
    names = Store(URL).names("versions/")
    assert not any("000001" in name for name in names)


def test_damage_in_the_bucket_is_named_and_repaired(server, tmp_path, local):
    edit(CONFIG, local, documents=documents("Zork"), write=write)
    first, second = host(tmp_path, "first"), host(tmp_path, "second")
    edit(CONFIG, first, documents=documents("Zork"), write=write)
    there = Store(URL)
    shard = next(
        name for name in there.names("versions/000001/") if "/bank/memories.zarr/c/" in name
    )
    index = next(name for name in there.names("index/") if name.endswith(".npy"))
    for name in (shard, index):
        data = bytearray(there.read(name) or b"")
        data[len(data) // 2] ^= 1
        there.write(name, bytes(data))
    problems = verify(CONFIG, second)
    assert any(index in problem for problem in problems), problems
    done = repair(CONFIG, second, write=write)
    assert len(done) == 2 and verify(CONFIG, host(tmp_path, "third")) == []
    assert_same(host(tmp_path, "third"), local)
    there.write("references/manifest.json", b"{}")
    with pytest.raises(StoreError, match=r"references/manifest.json (is damaged|is shorter)"):
        repair(CONFIG, second, write=write)


def test_a_workdir_made_anew_at_its_place_is_not_mixed_with_older_copies(server, tmp_path):
    before = dict(server.buckets[BUCKET])
    reader = host(tmp_path, "reader")
    edit(CONFIG, host(tmp_path, "first"), documents=documents("Zork"), write=write)
    assert "Zork#0" in keys_of(reader)
    server.buckets[BUCKET] = before
    edit(CONFIG, host(tmp_path, "second"), documents=documents("Quux"), write=write)
    assert {"Zork#0", "Quux#0"} & keys_of(reader) == {"Quux#0"}


def test_edits_go_through_failing_requests(server, tmp_path, local):
    server.faults = [
        Fault(".", 503, times=1e9, share=0.1),
        Fault("POST", cut=20, times=1e9, share=0.05),
    ]
    for at in (local, host(tmp_path, "first")):
        edit(CONFIG, at, documents=documents("Zork"), write=write)
        edit(CONFIG, at, delete=["Zork"], write=write)
    assert_same(host(tmp_path, "second"), local)


def test_an_edit_goes_on_where_every_answer_is_lost_once(server, tmp_path, local, monkeypatch):
    lose_answers(server, monkeypatch)
    for at in (local, host(tmp_path, "first")):
        edit(CONFIG, at, documents=documents("Zork"), write=write)
        edit(CONFIG, at, delete=["Zork"], write=write)
    assert_same(host(tmp_path, "second"), local)
    assert "runs/wiki/lock" not in server.buckets[BUCKET]


def test_what_lasts_is_a_sentence_and_loses_nothing(server, tmp_path):
    first = host(tmp_path, "first")
    server.faults = [Fault("POST .*versions", 403, times=1e9)]
    with pytest.raises((StoreError, BankError)) as caught:
        edit(CONFIG, first, documents=documents("Zork"), write=write)
    assert "\n" not in str(caught.value)
    server.faults = []
    assert edit(CONFIG, first, documents=documents("Zork"), write=write).number == 1
    assert os.path.isdir(first)
