"""A bank in a bucket: the same files and values as in a folder, read by ranges, through faults."""

import json
from collections import Counter
from collections.abc import Iterator

import crc32c
import numpy as np
import pytest
from memory.memory_tiny import build
from store.bucket_commands import command
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


def test_the_benchmark_measures_the_reader_of_a_bank_in_a_bucket(server, tmp_path):
    build(URL)
    server.faults = [Fault(".", 200, delay=0.02, times=1e9)]
    report = tmp_path / "bank.json"
    options = f"--bank={URL}", "--size=smallest", "--rounds=1", f"--json={report}"
    server.requests.clear()
    command("bench bank", *options)
    result = json.loads(report.read_text())
    assert result["ratios"]["bank_over_ranges"] > 0.1  # both take 20 ms a request and more
    assert {"bank", "bank_p99", "ranges", "ranges_p99"} == result["seconds"].keys()
    assert all(value >= 0.02 for value in result["seconds"].values())
    assert result["rates"]["bank_MB"] > 0 and result["requests"]["memories"] == 16
    kinds = Counter(span is not None for line, span in server.requests if "/c/" in line)
    assert kinds == {True: 2 * 2 * 2 * 16 + 4}  # rounds, reads, kinds; the indexes of four shards


def test_a_memory_in_another_place_than_the_usual_one_is_looked_up(server, tmp_path):
    build(URL)
    bank, expected = Bank.open(URL), Bank.open(URL).read(IDS)
    size = storage.memory_bytes(bank.manifest) + 4
    for shard in range(storage.shards_of(bank.manifest)):
        name = f"run/bank/{storage.shard_key(shard)}"
        data, there = server.buckets[BUCKET][name].data, bank.manifest["shard_memories"]
        index = np.frombuffer(data[-16 * there - 4 : -4], "<u8").reshape(-1, 2).copy()
        index[index[:, 1] == size, 0] += size
        end = index.tobytes()
        end += crc32c.crc32c(end).to_bytes(4, "little")
        server.put(BUCKET, name, bytes(size) + data[: -16 * there - 4] + end, {})
    server.requests.clear()
    for values, there in zip(bank.read(IDS), expected, strict=True):
        np.testing.assert_array_equal(values, there)
    assert not any("zarr.json" in line for line, _ in server.requests)  # TensorStore's own way
