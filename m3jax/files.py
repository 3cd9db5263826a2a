"""Atomic file writes: a file is written under a temporary name, synced, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TEMPORARY = ".tmp"  # ending of files that are not committed yet
# Bytes up to which a file is read whole: a map or a reader would hold a descriptor for ever, and
# a workdir has a few such files for each of its edits.
SMALL = 1 << 20


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Syncs a folder's entries, so that renames and deletions (not file contents) are durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Syncs the closed file `temporary` and renames it to `path`, in the same folder."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    sync_folder(Path(path).parent)


@contextlib.contextmanager
def committing(path: str | os.PathLike[str], shared: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; commits it on success, removes it on an error.

    The block must close what it writes. Folders above `path` are made.

    Args:
      path: the final path.
      shared: True if several processes may write the same bytes to `path` at the same time. Each
        then has its own temporary file, which a killed process leaves behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{secrets.token_hex(6)}" if shared else ""
    temporary = path.with_name(path.name + own + TEMPORARY)
    try:
        yield temporary
        commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], data: bytes, shared: bool = False) -> None:
    """Writes `data` to `path`; a reader sees either the old or the new file, never a partial one.

    `shared`: see `committing`.

    Raises:
      OSError: from the file system, for example when the disk is full; `path` is then untouched.
    """
    with committing(path, shared) as temporary:
        temporary.write_bytes(data)


def digest(*parts: bytes | str) -> str:
    """Returns the BLAKE2b hash (32 hex characters) of parts; ("a", "b") differs from ("ab",)."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def hash64(data: bytes) -> int:
    """Returns the BLAKE2b hash of bytes as an integer of 64 bits."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def checksum(source: bytes | str | os.PathLike[str]) -> str:
    """Returns the BLAKE2b hash (32 hex characters) of bytes, or of the file at a path."""
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=16).hexdigest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def json_text(content: Any, **options: Any) -> str:
    """Serializes content as JSON; a number that is NaN or infinite, which JSON lacks, becomes null.

    Args:
      content: what `json.dumps` accepts.
      **options: options of `json.dumps`.
    """
    try:
        return json.dumps(content, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(content), allow_nan=False, **options)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_sealed(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes a dictionary as JSON, atomically, with its own checksum under the key `checksum`."""
    sealed = {**content, "checksum": digest(json_text(content, sort_keys=True))}
    write_atomically(path, json_text(sealed, indent=1, sort_keys=True).encode())


def read_sealed(path: str | os.PathLike[str], *, unsealed: bool = False) -> dict[str, Any] | None:
    """Reads the dictionary that `write_sealed` wrote; None if the file is damaged.

    With `unsealed`, a dictionary without a checksum is accepted, as older versions wrote it.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        if unsealed and "checksum" not in content:
            return content if isinstance(content, dict) else None
        expected = content.pop("checksum")
        intact = expected == digest(json_text(content, sort_keys=True))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return content if intact else None


def write_array(path: str | os.PathLike[str], array: np.ndarray, shared: bool = False) -> None:
    """Writes an array as `.npy`, atomically; `shared`: see `committing`."""
    with committing(path, shared) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def open_array(path: str | os.PathLike[str], dtype: np.dtype | None = None) -> np.ndarray:
    """Opens a `.npy` file, or one of bare numbers of `dtype`: a small file is read, others mapped.

    Raises:
      OSError, ValueError: from the file system, or the file holds no array.
    """
    small = os.path.getsize(path) <= SMALL
    if dtype is None:
        return np.load(path, mmap_mode=None if small else "r", allow_pickle=False)
    return np.fromfile(path, dtype) if small else np.memmap(path, dtype, "r")
