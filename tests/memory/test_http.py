"""Banks on an HTTP server: the same values, few bytes, and one clear error when it fails."""

import contextlib
import functools
import http.server
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from memory.memory_tiny import build, flip, tiny_config
from memory.served import Server, serving

from m3jax.errors import BankError
from m3jax.memory import shard_reader, storage
from m3jax.memory.bank import Bank

SHARD, ITEM = 10, 2 * 2 * 2 * 4 * 8 * 4
IDS = np.random.default_rng(3).integers(-1, 37, (4, 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank") / "bank"
    build(folder)
    return folder


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_PAUSE", 0.01)
    pauses = {"initial_delay": "5ms", "max_delay": "10ms"}
    monkeypatch.setattr(storage, "_RETRIES", {**storage._RETRIES, **pauses})


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as server:
        yield server


def _assert_same(url: str, folder: Path) -> None:
    for found, expected in zip(Bank.open(url).read(IDS), Bank.open(folder).read(IDS), strict=True):
        np.testing.assert_array_equal(found, expected)


@contextlib.contextmanager
def _refused(url: str, *words: str) -> Iterator[None]:
    begin = time.monotonic()
    with pytest.raises(BankError) as caught:
        yield
    assert time.monotonic() - begin < 600  # tries are bounded
    for part in (url, *words):
        assert part in str(caught.value)
    assert "source locations" not in str(caught.value)


def test_a_served_bank_reads_as_the_local_one(server: Server, folder: Path) -> None:
    _assert_same(server.url, folder)
    _assert_same(server.url + "/", folder)
    _assert_same(server.url + "?key=1", folder)
    bank = Bank.open(server.url)
    assert bank.verify() == [] and len(bank.record_hashes) == 37


def test_codes_are_served(tmp_path: Path) -> None:
    build(tmp_path, tiny_config(writer__compression="int8"))
    with serving(tmp_path) as server:
        _assert_same(server.url, tmp_path)


def test_a_memory_costs_its_own_bytes(server: Server) -> None:
    bank = Bank.open(server.url)
    assert server.bytes_of_shards() == 0
    bank.read(np.array([13, -1, 13]))
    assert server.bytes_of_shards() == ITEM + 4
    bank.read(np.array([14, 25]))
    assert server.bytes_of_shards() == 3 * (ITEM + 4)
    assert not any(path.endswith("/") for path, _ in server.sent)


def test_without_checksums_of_the_bank_it_costs_its_shards_index_too(server: Server) -> None:
    bank = Bank.open(server.url)
    bank.parts[0].checksums = None
    index = 16 * SHARD + 4
    bank.read(np.array([13, -1, 13]))
    assert server.bytes_of_shards() == index + ITEM + 4
    bank.read(np.array([14, 25]))  # the index of one shard is known
    assert server.bytes_of_shards() == 2 * index + 3 * (ITEM + 4)
    assert not any(path.endswith("/") for path, _ in server.sent)


def test_a_cached_memory_is_not_fetched_again(server: Server, folder: Path) -> None:
    bank = Bank.open(server.url, cache_bytes=1 << 20)
    bank.read(IDS)
    before = len(server.sent)
    found = bank.read(IDS)
    assert len(server.sent) == before
    np.testing.assert_array_equal(found.keys, Bank.open(folder).read(IDS).keys)
    unique = len(np.unique(IDS[IDS >= 0]))
    assert bank.report() == {
        "cache_hits": unique,
        "cache_misses": unique,
        "cache_bytes": unique * ITEM,
    }


def test_memories_are_fetched_at_the_same_time(server: Server) -> None:
    server.fault = lambda path: "gather" if "/c/" in path else None
    Bank.open(server.url).read(np.arange(37))
    assert server.most >= 4


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("fault", ["drop", "flip", 503])
def test_a_passing_fault_is_no_fault(
    server: Server, folder: Path, fault: str | int, times: int
) -> None:
    asked: Counter[str] = Counter()

    def at_first(path: str) -> str | int | None:
        asked[path] += "/c/" in path
        return fault if 0 < asked[path] <= times else None

    server.fault = at_first
    _assert_same(server.url, folder)
    assert sum(count > times for count in asked.values()) == 4


def test_a_fault_that_the_slow_way_meets_and_that_passes_is_no_fault(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, asked = Bank.open(server.url), Counter[str]()

    def at_first(path: str) -> str | None:
        asked[path] += "/c/" in path
        return "flip" if asked[path] == 1 else None

    expected = Bank.open(folder).read(IDS).keys
    monkeypatch.setattr(shard_reader.ShardReader, "_try_shards", lambda *_: False)
    server.fault = at_first
    np.testing.assert_array_equal(bank.read(IDS).keys, expected)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("drop", ["c/1/0/0/0/0/0", "cannot be read"]),
        ("flip", ["c/1/0/0/0/0/0", "checksum differs", "launch/write_bank.py on the server"]),
        (500, ["c/1/0/0/0/0/0", "cannot be read"]),
        (404, ["c/1/0/0/0/0/0", "is missing", "launch/write_bank.py on the server"]),
    ],
)
def test_a_shard_that_cannot_be_had_is_named(
    server: Server, fault: str | int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    retries = {"max_retries": 2, "initial_delay": "10ms", "max_delay": "10ms"}
    monkeypatch.setattr(storage, "_RETRIES", retries)
    monkeypatch.setattr(storage, "_context", functools.cache(storage._context.__wrapped__))
    bank = Bank.open(server.url)
    server.fault = lambda path: fault if "/c/1/" in path else None
    with _refused(server.url, *words):
        bank.read(np.array([3, 13]))
    bank.read(np.array([3, 25]))


def test_a_flipped_byte_on_the_server_is_named(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "bank"))
    flip(own / "memories.zarr" / "c" / "2" / "0/0/0/0/0", 40)
    with serving(own) as server:
        bank = Bank.open(server.url)
        (problem,) = bank.verify()
        assert "c/2/0/0/0/0/0 (memories 20 … 29) is damaged" in problem
        with _refused(server.url, "c/2/0/0/0/0/0", "checksum differs"):
            bank.read(np.arange(37))
        flip(own / "lengths.npy", -1)
        with _refused(server.url, "lengths.npy is damaged", "write_bank.py on the server"):
            Bank.open(server.url)


def test_exchanged_shards_on_the_server_are_refused(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "bank"))
    first, second = (own / "memories.zarr" / "c" / str(i) / "0/0/0/0/0" for i in range(2))
    first.write_bytes(second.read_bytes())
    with serving(own) as server:
        bank = Bank.open(server.url)
        with _refused(server.url, "c/0/0/0/0/0/0", "of another place or bank"):
            bank.read(np.array([3]))
        bank.read(np.array([13]))


def test_a_server_that_goes_away(folder: Path) -> None:
    with serving(folder) as server:
        url, bank = server.url, Bank.open(server.url)
        bank.read(np.array([3]))
    with _refused(url, "cannot be reached", "refused", "server runs"):
        bank.read(np.array([3, 13]))
    with _refused(url, "cannot be reached", "refused", "server runs"):
        Bank.open(url)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(404, "holds no bank"), (403, "answers 403"), (500, "answers 500"), ("drop", "no answer")],
)
def test_a_server_that_refuses(server: Server, fault: str | int, words: str) -> None:
    server.fault = lambda path: fault
    with _refused(server.url, words):
        Bank.open(server.url)


def test_a_server_that_stays_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/bank"
        with _refused(url, "no answer", "timed out"):
            Bank.open(url)


def test_an_unfinished_bank_is_refused(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "bank"))
    (own / "COMPLETE").unlink()
    with (
        serving(own) as server,
        _refused(server.url, "COMPLETE is missing", "write_bank.py on the server"),
    ):
        Bank.open(server.url)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    log_message: Callable[..., None] = staticmethod(lambda *_: None)  # type: ignore[assignment]


def test_a_server_without_ranges_is_refused(folder: Path) -> None:
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as plain:
        threading.Thread(target=plain.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{plain.server_port}"
        with _refused(url, "cannot give parts of files", "nginx"):
            Bank.open(url)
        plain.shutdown()


def test_nothing_is_written_to_a_server(server: Server) -> None:
    with _refused(server.url, "is read-only", "launch/write_bank.py"):
        build(server.url)  # type: ignore[arg-type]
    assert not server.sent
