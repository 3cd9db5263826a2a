"""Folders and buckets mean the same: what is written is there whole, and one of two writers
wins."""

import concurrent.futures
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import processes
import pytest
from store.cloud_storage import BUCKET, CloudStorage, Fault, serving

from m3jax import store as stores
from m3jax.errors import StoreError
from m3jax.store import ABSENT, Lease, Store, require_bucket


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[CloudStorage]:
    pauses = {"max_retries": 4, "initial_delay": "5ms", "max_delay": "20ms"}
    monkeypatch.setattr(stores, "RETRIES", pauses)
    with serving() as server:
        yield server


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, server: CloudStorage) -> str:
    return str(tmp_path / "run") if request.param == "folder" else f"gs://{BUCKET}/some/run"


def test_objects_are_read_written_listed_and_deleted(place):
    store = Store(place)
    assert store.read("a/b") is None and store.names() == []
    store.write("a/b", b"0123456789")
    store.write("a/b c%ü", b"")
    store.write("b", b"x")
    assert store.read("a/b") == b"0123456789" and store.read("a/b c%ü") == b""
    assert store.read_part("a/b", 2, 5) == b"234" and store.read_part("a/b", -3) == b"789"
    assert store.read_part("a", 0, 1) is None
    assert store.names() == ["a/b", "a/b c%ü", "b"] and store.names("a/") == ["a/b", "a/b c%ü"]
    assert Store(f"{place}/a").names() == ["b", "b c%ü"]
    store.delete("b")
    store.delete("b")
    store.delete_under("a/", first=["a/b"])
    assert store.names() == []


def test_an_object_is_created_once_and_swapped_by_its_generation_alone(place):
    store = Store(place)
    assert store.create("x", b"mine") and not store.create("x", b"theirs")
    data, generation = store.read_with_generation("x")
    assert data == b"mine" and store.swap("x", b"second", generation)
    assert not store.swap("x", b"third", generation) and store.read("x") == b"second"
    assert store.read_with_generation("y") == (None, ABSENT)


def test_threads_that_swap_lose_no_count(place):
    def count(name: int) -> None:
        store = Store(place)
        for _ in range(10):
            while True:
                data, generation = store.read_with_generation("count")
                content = json.loads(data) if data else [0, ""]
                mine = json.dumps([content[0] + 1, f"{name} {os.urandom(4).hex()}"]).encode()
                if store.swap("count", mine, generation):
                    break

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    assert json.loads(Store(place).read("count") or b"")[0] == 40


def test_a_swap_whose_answer_is_lost_has_won(server):
    store = Store(f"gs://{BUCKET}/run")
    server.faults = [Fault("POST .*name=run/x", -1)]
    assert store.create("x", b"mine")
    server.faults = [Fault("POST .*name=run/x", -1)]
    assert not store.create("x", b"theirs") and store.read("x") == b"mine"


def test_passing_faults_change_nothing(server, tmp_path):
    store, random = Store(f"gs://{BUCKET}/run"), np.random.default_rng(0)
    server.faults = [
        Fault(".", 503, times=1e9, share=0.15),
        Fault(".", 429, times=1e9, share=0.05),
        Fault("POST|alt=media", cut=100, times=1e9, share=0.1),
    ]
    contents = {f"f{i}": random.bytes(int(random.integers(0, 2000))) for i in range(40)}
    for name, data in contents.items():
        store.write(name, data)
    assert store.names() == sorted(contents)
    assert {name: store.read(name) for name in contents} == contents
    assert len(server.requests) > 90  # some were sent again


@pytest.mark.parametrize(
    ("bucket", "fault", "message"),
    [
        ("missing", None, "there is no bucket gs://missing"),
        (BUCKET, Fault(".", 403, times=1e9), "access denied"),
        (BUCKET, Fault(".", 503, times=1e9), "Run the same command again"),
    ],
)
def test_what_lasts_is_said_in_a_sentence(server, bucket, fault, message):
    server.faults = [fault] if fault else []
    begin = time.monotonic()
    with pytest.raises(StoreError) as caught:
        require_bucket(f"gs://{bucket}/run")
    text = str(caught.value)
    assert message in text and "\n" not in text and "source locations" not in text
    assert time.monotonic() - begin < 60


def test_a_probe_leaves_nothing(server, tmp_path):
    require_bucket(f"gs://{BUCKET}/run")
    require_bucket(str(tmp_path / "run"))
    assert not server.buckets[BUCKET] and not list(tmp_path.iterdir())


def test_ranges_of_objects_come_in_order(place):
    store, data = Store(place), np.random.default_rng(0).bytes(5000)
    store.write("a", data)
    store.write("b", b"tail")
    spans = [("a", low, min(low + 700, 5000)) for low in range(0, 5000, 700)]
    assert b"".join(store.read_spans([*spans, ("b", 0, 4)])) == data + b"tail"
    assert list(store.read_spans([])) == []
    with pytest.raises(StoreError, match="a is shorter than it was"):
        list(store.read_spans([("a", 4000, 6000)]))
    with pytest.raises(StoreError, match="c is gone"):
        list(store.read_spans([("c", 0, 1)]))


def test_a_lease_keeps_others_out_while_its_holder_lives(place):
    store = Store(place)
    with Lease(store, "lease", "editing", seconds=8.0) as lease:  # renewed every 2 s
        with pytest.raises(StoreError, match="another process is editing"):
            Lease(Store(place), "lease", "editing", seconds=60.0).__enter__()
        lease.check()
    assert store.read("lease") is None
    with Lease(store, "lease", "editing", seconds=1.0):
        pass


def test_a_lease_of_a_dead_process_is_taken_over(place):
    code = (
        "import sys, os; from m3jax.store import Lease, Store\n"
        "Lease(Store(sys.argv[1]), 'lease', 'editing', seconds=1.0).__enter__(); os._exit(9)"
    )
    assert processes.call(["python", "-c", code, place]).returncode == 9
    assert Store(place).read("lease") is not None
    with Lease(Store(place), "lease", "editing", seconds=1.0) as lease:
        lease.check()


def test_a_lease_that_another_one_took_is_lost(place):
    store = Store(place)
    with Lease(store, "lease", "editing", seconds=0.4) as lease:
        store.write("lease", b"other 1")
        deadline = time.monotonic() + 10
        while not lease._lost and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(StoreError, match="another one may be editing"):
            lease.check()
    assert store.read("lease") == b"other 1"  # it is not the loser's to delete


def test_of_two_that_take_a_dead_lease_one_wins(place):
    Store(place).write("lease", b"dead 7")
    barrier, won = threading.Barrier(2), []

    def take(_: int) -> None:
        lease = Lease(Store(place), "lease", "editing", seconds=0.5)
        barrier.wait()
        try:
            lease.__enter__()
            won.append(lease)
        except StoreError:
            pass

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(take, range(2)))
    assert len(won) == 1
    won[0].__exit__(None, None, None)
