"""Atomic file writes: a file is written under a temporary name, synced, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

TEMPORARY = ".tmp"  # ending of files that are not committed yet
# Bytes up to which a file is read whole: a map or a reader would hold a descriptor for ever, and
# a workdir has a few such files for each of its edits.
SMALL = 1 << 20
_BLOCK = 1 << 20  # bytes that are read at once
_THREADS = 4  # files that are read at once


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


def fast_checksum(path: str | os.PathLike[str], mapped: bool = False) -> str:
    """Returns the XXH3 hash (128 bits, 32 hex characters) of a file; 20 times as fast as
    `checksum`.

    Args:
      path: the file.
      mapped: maps the file into memory, which saves a copy, but a disk error kills the process:
        for files that were just written and are still in the page cache.
    """
    total = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        if mapped and os.fstat(file.fileno()).st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                total.update(content)
        else:
            block = bytearray(_BLOCK)
            while count := file.readinto(block):
                total.update(memoryview(block)[:count])
    return total.hexdigest()


def tree_checksums(folder: str | os.PathLike[str]) -> dict[str, tuple[int, str]]:
    """Returns size in bytes and checksum of every file below a folder, by its path.

    The files are mapped as `fast_checksum` says: they were just written.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda path: fast_checksum(path, mapped=True), paths)
        names = (path.relative_to(folder).as_posix() for path in paths)
        sizes = (path.stat().st_size for path in paths)
        return dict(zip(names, zip(sizes, sums, strict=True), strict=True))


def first_damaged(
    folder: str | os.PathLike[str], checksums: Mapping[str, Sequence[Any]]
) -> tuple[Path, str] | None:
    """Compares files with the result of `tree_checksums`; returns the first that differs, and how.

    Raises `OSError` if a file cannot be read.
    """

    def problem(item: tuple[str, Sequence[Any]]) -> str | None:
        path = Path(folder) / item[0]
        if not path.is_file():
            return "is missing"
        if (size := path.stat().st_size) != item[1][0]:
            return f"has {size} bytes; expected {item[1][0]}"
        return None if fast_checksum(path) == item[1][1] else "is damaged (its checksum differs)"

    with ThreadPoolExecutor(_THREADS) as pool:
        problems = zip(checksums, pool.map(problem, checksums.items()), strict=True)
        return next(((Path(folder) / name, what) for name, what in problems if what), None)


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


def sealed(content: dict[str, Any]) -> bytes:
    """Serializes a dictionary as JSON, with its own checksum under the key `checksum`."""
    whole = {**content, "checksum": digest(json_text(content, sort_keys=True))}
    return json_text(whole, indent=1).encode()


def write_sealed(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes a dictionary as `sealed` serializes it, atomically."""
    write_atomically(path, sealed(content))


def read_sealed(
    path: str | os.PathLike[str], *keys: str, unsealed: bool = False
) -> dict[str, Any] | None:
    """Reads the dictionary that `write_sealed` wrote; None if the file is damaged.

    Args:
      path: the file.
      *keys: keys of the dictionary; without one of them it is another file, and so damaged.
      unsealed: accept a dictionary without a checksum, as older versions wrote it.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        sealed = "checksum" in content or not unsealed
        expected = content.pop("checksum", None)
        intact = not sealed or expected == digest(json_text(content, sort_keys=True))
    except (ValueError, TypeError, AttributeError):
        return None
    return content if intact and content.keys() >= {*keys} else None


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
        try:
            return np.load(path, mmap_mode=None if small else "r", allow_pickle=False)
        except (OSError, ValueError):
            raise
        except Exception as error:  # a damaged header makes NumPy raise errors of all kinds
            raise ValueError(f"{path} holds no array ({error!r})") from error
    return np.fromfile(path, dtype) if small else np.memmap(path, dtype, "r")
