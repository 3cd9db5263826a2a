"""Google Cloud Storage in one process: buckets in memory, preconditions, ranges, and faults.

It answers the parts of the JSON API that TensorStore, gcsfs and Google's client use. `serving()`
starts it and points them at it. `tests/store/test_cloud_storage.py` pins what it promises.
"""

import base64
import contextlib
import dataclasses
import functools
import json
import random
import re
import secrets
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import crc32c
import pytest
from etils.epath import backend
from orbax.checkpoint._src.path import gcs_utils

_PATH = re.compile(
    r"(?:/upload|/download)?/?(?:/storage/v1)?/b/([^/]+)(?:/(o)(?:/([^/]+))?)?(?:/storageLayout)?"
)
BUCKET = "bucket1"  # names of buckets have three characters or more
_REASONS = {
    304: "notModified",
    403: "forbidden",
    404: "notFound",
    412: "conditionNotMet",
    416: "requestedRangeNotSatisfiable",
    429: "rateLimitExceeded",
    503: "backendError",
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object of a bucket: its bytes, and the generation that each write makes anew."""

    data: bytes
    generation: int

    @functools.cached_property
    def crc32c(self) -> str:
        return base64.b64encode(crc32c.crc32c(self.data).to_bytes(4, "big")).decode()


@dataclasses.dataclass
class Fault:
    """What to do to requests whose line `METHOD target` matches `pattern`.

    Attributes:
      pattern: regular expression.
      status: the answer; 0 drops the connection unanswered, −1 carries the request out and drops
        the connection, so that the answer is lost.
      cut: the body of the request or of its answer ends after so many bytes.
      delay: seconds of silence before.
      times: most requests that it meets.
      share: share of the matching requests that it meets.
    """

    pattern: str
    status: int = 503
    cut: int | None = None
    delay: float = 0.0
    times: float = 1
    share: float = 1.0


class CloudStorage(ThreadingHTTPServer):
    """The server.

    Attributes:
      buckets: objects by name, of each bucket.
      location: where the buckets are.
      faults: of which the first that matches a request is taken.
      requests: lines `METHOD target` of all requests, and their `Range`.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, buckets: tuple[str, ...] = (BUCKET,)) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets: dict[str, dict[str, Stored]] = {name: {} for name in buckets}
        self.uploads: dict[str, tuple[str, Mapping[str, str], bytearray]] = {}  # resumable ones
        self.faults: list[Fault] = []
        self.location = {"location": "US", "locationType": "multi-region"}
        self.requests: list[tuple[str, str | None]] = []
        self.lock = threading.RLock()
        self._random, self._generation = random.Random(0), 1_000_000

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is none of the test's business."""

    def take_fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                met = fault.times and re.search(fault.pattern, line)
                if met and self._random.random() < fault.share:
                    fault.times -= 1
                    return fault
        return None

    def put(self, bucket: str, name: str, data: bytes, query: Mapping[str, str]) -> Stored | int:
        """Writes an object if the preconditions hold; else returns the status."""
        with self.lock:
            if bucket not in self.buckets:
                return 404
            status = unmet(self.buckets[bucket].get(name), query)
            if status:
                return status
            self._generation += 1
            self.buckets[bucket][name] = Stored(data, self._generation)
            return self.buckets[bucket][name]


def lose_answers(server: CloudStorage, patch: pytest.MonkeyPatch) -> None:
    """Makes the server drop the first answer to each request that changes something, done."""
    real, seen = server.take_fault, set[str]()

    def take(line: str) -> Fault | None:
        request = re.sub("ifGenerationMatch=[0-9]+", "", line)
        with server.lock:
            if request in seen or not re.match("POST|PUT|DELETE", line):
                return real(line)
            seen.add(request)
            return Fault("", -1)

    patch.setattr(server, "take_fault", take)


def unmet(there: Stored | None, query: Mapping[str, str]) -> int:
    """Returns the status of a precondition that does not hold, or 0; generation 0 = absent."""
    generation = 0 if there is None else there.generation
    if int(query.get("ifGenerationMatch", generation)) != generation:
        return 412
    if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
        return 412 if there is None else 304
    return 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: CloudStorage

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def _request(self) -> None:
        target, length = urllib.parse.urlsplit(self.path), int(self.headers["Content-Length"] or 0)
        self.query = {k: v[0] for k, v in urllib.parse.parse_qs(target.query).items()}
        line = f"{self.command} {urllib.parse.unquote(self.path)}"
        with self.server.lock:
            self.server.requests.append((line, self.headers["Range"]))
        self.fault = self.server.take_fault(line) or Fault("", status=200)
        if self.fault.cut is not None and length:
            self.rfile.read(min(self.fault.cut, length))
            return self._hang_up()
        body = self.rfile.read(length)
        time.sleep(self.fault.delay)
        if self.fault.status == 0:
            return self._hang_up()
        if self.fault.status not in (-1, 200) and self.fault.cut is None:
            return self._error(self.fault.status)
        path = _PATH.fullmatch(target.path)
        if path is None:
            return self._error(404)
        bucket, name = path[1], urllib.parse.unquote(path[3] or self.query.get("name", ""))
        if not path[2]:
            there = bucket in self.server.buckets
            return self._answer(200, self._bucket(bucket)) if there else self._error(404)
        if self.command in ("POST", "PUT"):
            return self._upload(bucket, name, body)
        if not path[3]:
            return self._list(bucket)
        with self.server.lock:
            there = self.server.buckets.get(bucket, {}).get(name)
            status = unmet(there, self.query) or (0 if there else 404)
            if self.command == "DELETE" and not status:
                del self.server.buckets[bucket][name]
        if status or there is None:
            return self._error(status)
        if self.command == "DELETE":
            return self._answer(204, b"")
        if self.query.get("alt") == "media":
            return self._media(there)
        return self._written(name, there)

    do_GET = do_POST = do_PUT = do_DELETE = _request

    def _upload(self, bucket: str, name: str, body: bytes) -> None:
        """Writes an object from one request, or from the parts of a resumable upload."""
        kind, query = self.query.get("uploadType", "media"), self.query
        if kind == "multipart":
            content, body = _parts(self.headers["Content-Type"], body)
            name = name or content["name"]
        elif kind == "resumable" and "upload_id" not in query:
            name = name or json.loads(body)["name"]
            if bucket not in self.server.buckets:
                return self._error(404)
            upload = secrets.token_hex(8)
            self.server.uploads[upload] = name, query, bytearray()
            place = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable"
            return self._answer(200, b"{}", {"Location": f"{place}&upload_id={upload}"})
        elif kind == "resumable":
            name, query, whole = self.server.uploads[query["upload_id"]]
            span = re.fullmatch(
                r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"] or ""
            )
            if span is None or span[1]:
                whole[int(span[1]) if span else 0 :] = body
            if span and (span[2] == "*" or len(whole) < int(span[2])):
                there = {"Range": f"bytes=0-{len(whole) - 1}"} if whole else {}
                return self._answer(308, b"", there)
            body = bytes(whole)
        return self._written(name, self.server.put(bucket, name, body, query))

    def _media(self, there: Stored) -> None:
        size = len(there.data)
        headers = {
            "x-goog-generation": str(there.generation),
            "x-goog-hash": f"crc32c={there.crc32c}",
            "x-goog-stored-content-length": str(size),
        }
        part = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"] or "")
        if part is None or part[0] == "bytes=-":
            return self._answer(200, there.data, headers)
        low, high = (int(part[1]), part[2]) if part[1] else (max(0, size - int(part[2])), "")
        if low >= size:
            return self._error(416)
        stop = min(size, int(high) + 1) if high else size
        headers["Content-Range"] = f"bytes {low}-{stop - 1}/{size}"
        return self._answer(206, there.data[low:stop], headers)

    def _list(self, bucket: str) -> None:
        query, most = self.query, int(self.query.get("maxResults", 1000))
        if bucket not in self.server.buckets:
            return self._error(404)
        with self.server.lock:
            there = dict(self.server.buckets[bucket])
        low, high = query.get("startOffset", ""), query.get("endOffset")
        names = sorted(
            name
            for name in there
            if name.startswith(query.get("prefix", ""))
            and name >= low
            and (not high or name < high)
            and name > query.get("pageToken", "")
        )
        delimiter, folders = query.get("delimiter"), list[str]()
        if delimiter:
            begin = len(query.get("prefix", ""))
            inside = [name for name in names if delimiter in name[begin:]]
            ends = (name.index(delimiter, begin) + len(delimiter) for name in inside)
            folders = sorted({name[:end] for name, end in zip(inside, ends, strict=True)})
            names = sorted({*names} - {*inside})
        content: dict[str, Any] = {"items": [_resource(n, there[n]) for n in names[:most]]}
        if folders:
            content["prefixes"] = folders
        if len(names) > most:
            content["nextPageToken"] = names[most - 1]
        return self._answer(200, json.dumps(content).encode())

    def _written(self, name: str, there: Stored | int) -> None:
        if isinstance(there, int):
            return self._error(there)
        return self._answer(200, json.dumps(_resource(name, there)).encode())

    def _bucket(self, name: str) -> bytes:
        content = {"kind": "storage#bucket", "id": name, "name": name, **self.server.location}
        return json.dumps(content).encode()

    def _error(self, status: int) -> None:
        reason = _REASONS.get(status, "error")
        content = {"code": status, "message": reason, "errors": [{"reason": reason}]}
        self._answer(status, b"" if status == 304 else json.dumps({"error": content}).encode())

    def _answer(self, status: int, data: bytes, headers: Mapping[str, str] = {}) -> None:
        if self.fault.status == -1:
            return self._hang_up()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        cut = self.fault.cut
        self.wfile.write(data if cut is None else data[:cut])
        self.wfile.flush()
        if cut is not None and len(data) > cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()


def _parts(kind: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    """Splits the body of a multipart upload into the object's metadata and its bytes."""
    boundary = b"--" + kind.partition("boundary=")[2].strip("'\"").encode()
    _, content, data = body[: body.rindex(boundary)].split(boundary, 2)
    content, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (content, data))
    return json.loads(content), re.sub(rb"\r?\n\Z", b"", data)


def _resource(name: str, there: Stored) -> dict[str, str]:
    return {
        "name": name,
        "generation": str(there.generation),
        "size": str(len(there.data)),
        "crc32c": there.crc32c,
        "updated": "2026-01-01T00:00:00.000Z",
    }


def _forget_servers() -> None:
    """Makes gcsfs and Google's client, which Orbax uses, read the address of the server anew."""
    if "gcsfs" in sys.modules:
        gcs_utils.get_bucket.cache_clear()
        backend.fsspec_backend._get_filesystem.cache_clear()
        sys.modules["gcsfs"].GCSFileSystem.clear_instance_cache()


@contextlib.contextmanager
def talking_to(url: str) -> Iterator[None]:
    """Makes all libraries take a server for Google's while the block lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("NO_GCE_CHECK", "true")  # no account of this machine
        _forget_servers()
        yield


@contextlib.contextmanager
def serving(*buckets: str) -> Iterator[CloudStorage]:
    """Runs a server, which TensorStore takes for Google's while the block lasts."""
    with CloudStorage(buckets or (BUCKET,)) as server, talking_to(server.url):
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
