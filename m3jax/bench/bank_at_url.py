"""Benchmark `bank --bank=URL`: random reads of a bank in a bucket or on a server, compared with
plain requests for the same ranges of bytes."""

from __future__ import annotations

import contextlib
import http.client
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np

from m3jax.bench.rounds import Rounds, import_peer
from m3jax.errors import BankError
from m3jax.memory import storage
from m3jax.memory.bank import Bank
from m3jax.store import GCS

_SHARDS = 64  # most shards that are read, whose indexes the plain requests must know
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
_SECONDS = 60  # time limit of a plain request


def bank(bank: str | Path, reads: int = 20, memories: int = 160) -> Rounds:
    """Measures `Bank.read_stored` relative to HTTP requests for ranges in as many threads.

    Every read fetches `memories` random memories, five for a prompt chunk of each of 32 rows, or as
    many as the bank has. A round has `reads` reads of each kind, in turn. Each thread of the plain
    requests keeps its connection; it knows where a memory lies, and verifies nothing.

    Yields:
      `ratios`: `bank_over_ranges`, of throughput, medians over the reads of a round (above 1: the
      bank is faster). `rates` in `MB` per second, and `seconds` of a read: the median, and with
      `_p99` the time that 99 % of the reads of the round took at most. `requests`: `memories` of a
      read, and `KB` of one.

    Raises:
      BankError: `bank` is a folder, or no bank is there.
    """
    if "://" not in str(bank):
        raise BankError(
            f"--bank={bank}: takes the URL of a bank, gs://… or http(s)://…; without --bank this"
            " disk is measured, with made banks"
        )
    opened, random = Bank.open(bank), np.random.default_rng(0)
    shard, item = opened.manifest["shard_memories"], storage.memory_bytes(opened.manifest)
    shards = random.permutation(storage.shards_of(opened.manifest))[:_SHARDS]
    ids = (shards[:, None] * shard + np.arange(shard)).reshape(-1)
    ids = ids[ids < opened.size]
    count = min(memories, len(ids))
    with _ranges(opened, shards.tolist()) as ranges:
        calls: dict[str, Callable[[np.ndarray], object]] = {"bank": opened.read_stored}
        if ranges is not None:
            calls["ranges"] = ranges
        while True:
            taken: dict[str, list[float]] = {name: [] for name in calls}
            for turn in range(reads):
                for name in [*calls][:: -1 if turn % 2 else 1]:
                    drawn = random.choice(ids, count, replace=False)
                    begin = time.perf_counter()
                    calls[name](drawn)
                    taken[name].append(time.perf_counter() - begin)
            seconds = {name: statistics.median(values) for name, values in taken.items()}
            p99 = {f"{name}_p99": np.quantile(values, 0.99) for name, values in taken.items()}
            rates = {f"{name}_MB": count * item / 1e6 / of for name, of in seconds.items()}
            both = "ranges" in seconds
            ratios = {"bank_over_ranges": seconds["ranges"] / seconds["bank"]} if both else {}
            size = {"memories": float(count), "KB": item / 1e3}
            yield {
                "ratios": ratios,
                "rates": rates,
                "seconds": {**seconds, **p99},
                "requests": size,
            }


@contextlib.contextmanager
def _ranges(bank: Bank, shards: list[int]) -> Iterator[Callable[[np.ndarray], None] | None]:
    """Yields a function that requests memories of `shards`; None without the means to sign in."""
    server, of_object, headers = _server(str(bank.folder))
    if headers is None:
        yield None
        return
    shard, item = bank.manifest["shard_memories"], storage.memory_bytes(bank.manifest)
    own, connections, signed = threading.local(), [], headers

    def request(number: int, span: str) -> bytes:
        if not hasattr(own, "connection"):
            parts = urlsplit(server)
            kind = http.client.HTTPSConnection if parts.scheme == "https" else None
            own.connection = (kind or http.client.HTTPConnection)(parts.netloc, timeout=_SECONDS)
            connections.append(own.connection)
        place = of_object(storage.shard_key(number))
        own.connection.request("GET", place, headers={**signed, "Range": f"bytes={span}"})
        answer = own.connection.getresponse()
        data = answer.read()
        if answer.status != 206:
            raise OSError(f"{server}{place}: {answer.status} {answer.reason}")
        return data

    def offsets(number: int) -> np.ndarray:
        index = request(number, f"-{16 * shard + 4}")[:-4]
        return np.frombuffer(index, "<u8").reshape(shard, 2)[:, 0]

    with ThreadPoolExecutor(storage.IO_THREADS) as pool, contextlib.ExitStack() as stack:
        places = dict(zip(shards, pool.map(offsets, shards), strict=True))

        def read(i: int) -> int:
            begin = int(places[i // shard][i % shard])
            return len(request(i // shard, f"{begin}-{begin + item - 1}"))

        def ranges(ids: np.ndarray) -> None:
            if {*pool.map(read, ids.tolist())} != {item}:
                raise OSError(f"{server} gives other ranges than were asked for")

        stack.callback(lambda: [connection.close() for connection in connections])
        yield ranges


def _server(url: str) -> tuple[str, Callable[[str], str], Mapping[str, str] | None]:
    """Returns the server of a bank, what its path of a file is, and headers that sign a request.

    The headers are None if the library that finds the machine's account is missing.
    """
    if not url.startswith(GCS):
        parts = urlsplit(url)

        def at(name: str) -> str:
            return urlsplit(storage.file_url(url, name))._replace(scheme="", netloc="").geturl()

        return f"{parts.scheme}://{parts.netloc}", at, {}
    bucket, _, folder = url.removeprefix(GCS).strip("/").partition("/")
    server = os.environ.get("TENSORSTORE_GCS_HTTP_URL", "https://storage.googleapis.com")

    def of_object(name: str) -> str:
        path = quote(f"{folder}/{name}".lstrip("/"), safe="")
        return f"/storage/v1/b/{bucket}/o/{path}?alt=media"

    token = os.environ.get("GOOGLE_AUTH_TOKEN_FOR_TESTING")
    if token is None:
        peer = import_peer(
            "bank_over_ranges", "google.auth", "google.auth.transport.requests", extra="gcs"
        )
        if peer is None:
            return server, of_object, None
        account, _ = peer[0].default(scopes=[_SCOPE])
        account.refresh(peer[1].Request())
        token = account.token
    return server, of_object, {"Authorization": f"Bearer {token}"}
