"""Probe of the HTTP server of a bank, which names what the server lacks."""

from __future__ import annotations

import http.client
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

from m3jax.errors import BankError
from m3jax.memory.storage import MANIFEST, file_url, is_http

_ATTEMPTS = 3
_PAUSE = 0.5  # seconds between two of them
_TIMEOUT = 10  # seconds


def require_served(folder: str | Path) -> None:
    """Asks the server of a bank for one byte; does nothing for a bank that is elsewhere.

    Raises:
      BankError: the server is not there, stays silent for 10 s, refuses, has no bank there, or
        gives no parts of files.
    """
    if not is_http(folder):
        return
    try:
        status = _ask(str(folder))
    except ssl.SSLError:  # TensorStore has certificates of its own
        return
    if status == 404:
        raise BankError(
            f"{folder} holds no bank: its server has no {MANIFEST} there (404). Check the URL; it"
            " is that of the folder that launch/write_bank.py wrote"
        )
    if status != 206:
        raise BankError(
            f"the server of bank {folder} cannot give parts of files (it answers {status} to a"
            " request for a range of bytes), so that each memory would cost a whole shard. Serve"
            " the folder with one that can, such as nginx, Caddy or `rclone serve http`"
        )


def _ask(folder: str) -> int:
    """Status of the answer to a request for the manifest's first byte.

    Raises:
      BankError: none came, or an error of the server.
      ssl.SSLError: the certificate is not known here.
    """
    request = urllib.request.Request(file_url(folder, MANIFEST), headers={"Range": "bytes=0-0"})
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                if answer.status == 206:
                    answer.read()  # raises where it ends too soon
                return int(answer.status)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return 404
            problem = f"the server answers {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):
                raise reason from error
            problem = f"no answer from the server ({reason})"
    raise BankError(
        f"bank {folder} cannot be reached: {problem}, {_ATTEMPTS} times. Check host, port and path,"
        " and that the server runs; then run the same command again"
    )
