"""A bank in a bucket: the same files and values as in a folder, read by ranges, through faults."""

from collections.abc import Iterator

import numpy as np
import pytest
from memory.memory_tiny import build
from store.cloud_storage import BUCKET, CloudStorage, Fault, serving

from m3jax.errors import BankError
from m3jax.memory import storage
from m3jax.memory.bank import Bank

IDS = np.random.default_rng(3).integers(-1, 37, (4, 9))
URL = f"gs://{BUCKET}/run/bank"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[CloudStorage]:
    pauses = {"max_retries": 5, "initial_delay": "5ms", "max_delay": "20ms"}
    monkeypatch.setattr(storage, "RETRIES", pauses)
    storage._context.cache_clear()
    with serving() as server:
        yield server
    storage._context.cache_clear()


def test_a_bank_in_a_bucket_is_that_of_a_folder_also_through_faults(server, tmp_path):
    build(tmp_path / "bank")
    server.faults = [
        Fault(".", 503, times=1e9, share=0.15),
        Fault("POST", cut=100, times=1e9, share=0.1),
    ]
    build(URL)
    files = {
        path.relative_to(tmp_path / "bank").as_posix(): path.read_bytes()
        for path in (tmp_path / "bank").rglob("*")
        if path.is_file()
    }
    there = {
        name.removeprefix("run/bank/"): stored.data
        for name, stored in server.buckets[BUCKET].items()
    }
    different = {name for name in files.keys() | there.keys() if files.get(name) != there.get(name)}
    assert different <= {storage.MANIFEST, storage.COMPLETE}  # the manifest has a time
    bank, local = Bank.open(URL), Bank.open(tmp_path / "bank")
    server.requests.clear()
    for values, expected in zip(bank.read(IDS), local.read(IDS), strict=True):
        np.testing.assert_array_equal(values, expected)
    shards = [span for line, span in server.requests if "/c/" in line]
    assert shards and all(span is not None for span in shards)  # never a whole shard


def test_a_bank_that_cannot_be_reached_is_one_sentence(server):
    build(URL)
    bank = Bank.open(URL)
    server.faults = [Fault(".", 503, times=1e9)]
    for call in (lambda: bank.read(IDS), lambda: Bank.open(URL), lambda: build(URL)):
        with pytest.raises(BankError) as caught:
            call()
        assert "\n" not in str(caught.value) and "source locations" not in str(caught.value)
    server.faults = []
    assert Bank.open(URL).read(IDS)
