"""An HTTP server of a folder, which counts what it sends and fails as it is told."""

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Server(ThreadingHTTPServer):
    """Gives the files of a folder, ranges of them too.

    Attributes:
      sent: path and bytes of every answer with a body.
      most: most requests of shards at a time.
      fault: of a path what to do instead of answering: `drop`, `flip`, `gather` or a status.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.sent: list[tuple[str, int]] = []
        self.fault: Callable[[str], str | int | None] = lambda path: None
        self.lock = threading.Condition()
        self.under_way = self.most = 0
        self._connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def server_close(self) -> None:
        """Ends as a killed server does: no connection lives on."""
        super().server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/bank"

    def bytes_of_shards(self) -> int:
        return sum(size for path, size in self.sent if "/c/" in path)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is none of the test's business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        with server.lock:
            server.under_way += "/c/" in path
            server.most = max(server.most, server.under_way)
            server.lock.notify_all()
            fault = server.fault(path)
            if fault == "gather":  # until others have come
                server.lock.wait_for(lambda: server.most >= 4, timeout=60)
        try:
            self._answer(path, fault)
        finally:
            with server.lock:
                server.under_way -= "/c/" in path

    def _answer(self, path: str, fault: str | int | None) -> None:
        file = self.server.folder / path.removeprefix("/bank/")
        if isinstance(fault, int) or not file.is_file():
            self.send_response(fault if isinstance(fault, int) else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, whole = file.read_bytes(), file.stat().st_size
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = asked.groups()
            start = int(first) if first else whole - int(last)
            end = min(int(last), whole - 1) + 1 if first and last else whole
            data = data[start:end]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{whole}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "flip":
            data = bytes([data[0] ^ 1]) + data[1:]
        if fault == "drop":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data)
        with self.server.lock:
            self.server.sent.append((path, len(data)))

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serves a folder as `server.url` while the block runs."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
