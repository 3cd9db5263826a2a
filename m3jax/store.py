"""Objects of a folder or of a bucket (gs://…), with one meaning for both.

An object is there whole or not at all, and is visible to all processes as soon as a write returns.
TensorStore's key-value stores do the work: of the libraries that reach buckets they alone can swap
an object only if nobody else has, and list without a cache. Names are paths with slashes; URLs stay
strings, since `pathlib` turns gs://bucket into a local path.

| environment | meaning |
|---|---|
| `GOOGLE_APPLICATION_CREDENTIALS` | key of a service account; default the machine's account |
| `TENSORSTORE_GCS_HTTP_URL` | another server that speaks Cloud Storage's JSON API |
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import tensorstore as ts

from m3jax.errors import StoreError
from m3jax.printable import complain

GCS = "gs://"
ABSENT = b"\x02"  # TensorStore's generation of an object that does not exist
# For TensorStore, whose default of 32 attempts takes a quarter of an hour.
RETRIES = {"max_retries": 6, "initial_delay": "250ms", "max_delay": "8s"}
REQUESTS = 32  # at a time
LEASE = 30.0  # seconds without a renewal after which a lease is dead
# For TensorStore's HTTP client, which by default waits forever for a silent server.
_SILENCE = {
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
_LOCK = "__lock"  # ending of what a killed write leaves behind in a local folder
_AHEAD = 4  # requests under way for the ranges of a large object


def is_bucket(place: str | os.PathLike[str]) -> bool:
    """Returns True if a place is in a bucket, given as gs://BUCKET/PATH."""
    return os.fspath(place).startswith(GCS)


def limit_silence() -> None:
    """Makes TensorStore give up a request after 10 silent seconds; before the first request."""
    for name, value in _SILENCE.items():
        os.environ.setdefault(name, value)


class Store:
    """Objects under a place: a local folder, or gs://BUCKET/PATH. Thread-safe.

    All methods raise `StoreError` if the bucket is missing or access is denied, and if a server
    gives no answer, or a passing error each time, in about a minute.

    Attributes:
      place: the folder or URL, as it was given.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = os.fspath(place).rstrip("/")
        self.in_bucket = is_bucket(self.place)
        if self.in_bucket:
            limit_silence()
            context = {
                "gcs_request_retries": RETRIES,
                "gcs_request_concurrency": {"limit": REQUESTS},
                "cache_pool": {"total_bytes_limit": 0},
            }
            spec: Any = f"{self.place}/"
        else:
            context, path = {}, f"{Path(self.place).resolve()}/"
            spec = {"driver": "file", "path": path}
        self._kv = self._done(ts.KvStore.open(spec, context=ts.Context(context)), "")

    def read(self, name: str) -> bytes | None:
        """Reads an object; None if it does not exist."""
        return self.read_with_generation(name)[0]

    def read_with_generation(self, name: str) -> tuple[bytes | None, bytes]:
        """Reads an object and its generation, for `swap`; None and `ABSENT` if it is not there."""
        result = self._done(self._kv.read(name), name)
        if result.state != "value":
            return None, ABSENT
        return bytes(result.value), result.stamp.generation

    def read_part(self, name: str, start: int, stop: int | None = None) -> bytes | None:
        """Reads bytes `start` to `stop` of an object, or to its end; None if it does not exist.

        A negative `start` counts from the end, without `stop`.
        """
        result = self._done(self._kv.read(name, byte_range=slice(start, stop)), name)
        return bytes(result.value) if result.state == "value" else None

    def names(self, prefix: str = "") -> list[str]:
        """Lists the names that begin with `prefix`, sorted."""
        keys = self._done(self._kv.list(_range(prefix)), prefix)
        names = sorted(key.decode() for key in keys)
        return [name for name in names if self.in_bucket or not name.endswith(_LOCK)]

    def write(self, name: str, data: bytes) -> None:
        """Writes an object, whatever was there."""
        self._done(self._kv.write(name, data), name)

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object if there is none; returns whether it did, as `swap`."""
        return self.swap(name, data, ABSENT)

    def swap(self, name: str, data: bytes, generation: bytes) -> bool:
        """Writes an object if it still has a generation; returns whether it did.

        `data` must differ from what others write, for example by a token: a server's answer can get
        lost, and the object is then read to learn who has won.
        """
        result = self._done(self._kv.write(name, data, if_equal=generation), name)
        return bool(result.generation) or self.read(name) == data

    def delete(self, name: str, generation: bytes | None = None) -> None:
        """Deletes an object, if it exists and, where it is given, still has a generation."""
        self._done(self._kv.write(name, None, if_equal=generation), name)

    def delete_under(self, prefix: str, first: Sequence[str] = ()) -> None:
        """Deletes all objects whose names begin with `prefix`; `first` names their markers."""
        for name in first:
            self.delete(name)
        self._done(self._kv.delete_range(_range(prefix)), prefix)

    def delete_all(self, names: Iterable[str]) -> None:
        """Deletes objects by their names, in no order."""
        for name, future in [(name, self._kv.write(name, None)) for name in names]:
            self._done(future, name)

    def read_spans(self, spans: Iterable[tuple[str, int, int]]) -> Iterator[bytes]:
        """Yields the bytes of ranges of objects (name, start, stop), some requests ahead.

        Raises `StoreError` also if an object is gone or shorter.
        """
        rest = iter(spans)

        def begin(count: int) -> list[tuple[str, Any]]:
            return [
                (name, self._kv.read(name, byte_range=slice(start, stop)))
                for name, start, stop in islice(rest, count)
            ]

        pending = deque(begin(_AHEAD))
        while pending:
            name, future = pending.popleft()
            result = self._done(future, name)
            if result.state != "value":
                raise StoreError(f"{self.place}/{name} is gone; publish it again")
            yield bytes(result.value)
            pending.extend(begin(1))

    def _done(self, future: Any, name: str) -> Any:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise unreachable(f"{self.place}/{name}", error) from error


def unreachable(place: str, error: BaseException) -> StoreError:
    """Returns the error of a place that cannot be read or written, from that of a library."""
    text, bucket = " ".join(str(error).split()), place.removeprefix(GCS).partition("/")[0]
    text = text.partition(" [source locations")[0]
    if "OUT_OF_RANGE" in text:
        return StoreError(f"{place} is shorter than it was; publish it again")
    if not is_bucket(place):
        return StoreError(f"{place}: {text}")
    if "NOT_FOUND" in text or "404" in text:
        return StoreError(
            f"{place}: there is no bucket {GCS}{bucket}; make it, or correct its name"
        )
    if any(word in text for word in ("PERMISSION_DENIED", "UNAUTHENTICATED", "orbidden", "401")):
        return StoreError(
            f"{place}: access denied. Give this machine's account a role for {GCS}{bucket}, or"
            " name a key in GOOGLE_APPLICATION_CREDENTIALS"
        )
    return StoreError(f"{place}: {text[:300]}. Run the same command again when it is reachable")


def _range(prefix: str) -> ts.KvStore.KeyRange:
    """Returns the range of all names that begin with a prefix."""
    data = prefix.encode()
    return ts.KvStore.KeyRange(data, data[:-1] + bytes([data[-1] + 1]) if data else b"")


def require_bucket(place: str) -> None:
    """Writes, reads and deletes an object; does nothing for a local folder.

    A bucket that does not exist reads as an empty one: only a write tells.

    Raises:
      StoreError: the bucket is missing, or this machine may not write to it.
    """
    store, name = Store(place), f".probe-{secrets.token_hex(8)}"
    if store.in_bucket:
        store.write(name, name.encode())
        store.delete(name)


# -- leases ----------------------------------------------------------------------------------------
class Lease:
    """Keeps other writers out of a place while its holder lives: an object that is renewed.

    A lease that nobody renews while it is watched for `seconds` is dead and is taken over; clocks
    of hosts are not compared. As a context manager it is taken and given back.

    Args:
      store: where the lease is.
      name: its object.
      seconds: time without a renewal after which it is dead; default `LEASE`.
      what: names, for messages, what the holder does.

    Attributes:
      token: names this holder like no other.
    """

    def __init__(self, store: Store, name: str, what: str, seconds: float | None = None) -> None:
        self.store, self.name, self.what, self.seconds = store, name, what, seconds or LEASE
        self.token, self._count, self._generation = secrets.token_hex(8), 0, ABSENT
        self._lost, self._ended, self._renewed = False, threading.Event(), 0.0
        self._renewal = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Lease:
        held, self._generation = self.store.read_with_generation(self.name)
        end = time.monotonic() + self.seconds
        if held is not None:
            complain(
                f"{self.store.place}/{self.name} is held; {self.seconds:.0f} s show whether its"
                " holder lives"
            )
        while held is not None and time.monotonic() < end:
            time.sleep(min(self.seconds / 10, 1.0))
            held, generation = self.store.read_with_generation(self.name)
            if held is not None and generation != self._generation:
                self._refuse()
            self._generation = generation
        if not self._take():
            self._refuse()
        self._renewal.start()
        return self

    def check(self) -> None:
        """Raises `StoreError` if the lease was lost; to be called before what it protects."""
        if self._lost or time.monotonic() - self._renewed > self.seconds:
            raise StoreError(
                f"this process was suspended, or had no connection to {self.store.place}, and"
                f" another one may be {self.what} it; run the same command again"
            )

    def check_now(self) -> None:
        """Raises as `check` does, also if the loss has not been noticed."""
        with contextlib.suppress(StoreError):
            held = self.store.read(self.name)
            self._lost |= held is None or not held.startswith(self.token.encode())
        self.check()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._renewal.join()
        with contextlib.suppress(StoreError):
            held, generation = self.store.read_with_generation(self.name)
            if held is not None and held.startswith(self.token.encode()):
                self.store.delete(self.name, generation)

    def _take(self) -> bool:
        """Writes the lease with a count of its own, if nobody has since it was read."""
        self._count, begin = self._count + 1, time.monotonic()
        data = f"{self.token} {self._count}".encode()
        if not self.store.swap(self.name, data, self._generation):
            return False
        held, self._generation = self.store.read_with_generation(self.name)
        self._renewed = begin
        return held == data

    def _renew(self) -> None:
        while not self._ended.wait(self.seconds / 4):
            try:
                self._lost = not self._take()
            except StoreError:
                self._lost = time.monotonic() - self._renewed > self.seconds
            if self._lost:
                return

    def _refuse(self) -> None:
        raise StoreError(
            f"another process is {self.what} {self.store.place}; wait until it has ended, or stop"
            f" it"
        )


def living(store: Store, prefix: str) -> list[str]:
    """Lists the leases whose names begin with `prefix` and whose holders live; deletes the others.

    Takes `LEASE` seconds if there are leases of dead holders, else until each was renewed once.
    """
    before = {name: store.read(name) for name in store.names(prefix)}
    alive, end = set[str](), time.monotonic() + LEASE
    while before and time.monotonic() < end:
        time.sleep(min(LEASE / 10, 1.0))
        for name, data in [*before.items()]:
            now = store.read(name)
            if now != data:
                del before[name]
            if now not in (None, data):
                alive.add(name)
    for name in before:
        store.delete(name)
    return sorted(alive)
