"""Parts of a workdir: folders that record their inputs and whether they are finished; their lock.

Every writer of a folder holds its lock (`only_writer`), so that there is one at a time. Readers
need none: a marker that is written last tells them that a folder is whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from m3jax.errors import LockError, TextError
from m3jax.files import digest, json_text, read_sealed, write_atomically, write_sealed

BEGUN = "begun.json"  # inputs of an unfinished part
INPUTS = "inputs.json"  # inputs of a finished part; written last, so it marks the part as finished
LOCK = "lock"  # in a folder while a process writes there; its content names the process
VERSIONS = "versions"  # folder of the versions of a workdir's knowledge
_MANIFEST = "manifest.json"
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike[str], patience: float = 0.0) -> Iterator[int | None]:
    """Locks a folder for writing while the block runs; the lock ends with the process at the
    latest.

    The folder is made, and removed again if nothing was written. On a file system without locks,
    and in a folder that cannot be written to, nothing is locked.

    Args:
      folder: local folder; a process that locks it twice is refused, too.
      patience: seconds to wait for another process to end.

    Yields:
      The descriptor that holds the lock; child processes that inherit it hold the lock, too.

    Raises:
      LockError: another process writes there.
      OSError: the folder cannot be made.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = _take_lock(folder, time.monotonic() + patience)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            if _is_open_at(descriptor, folder / LOCK):
                (folder / LOCK).unlink()
            os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def _take_lock(folder: Path, end: float) -> int | None:
    """Returns a descriptor of the locked lock file; None where nothing can be locked."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:  # the folder was removed meanwhile
            continue
        except OSError as error:
            if error.errno in _READ_ONLY:
                return None
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode("utf-8", "replace") or "no name yet"
            os.close(descriptor)
            if time.monotonic() < end:
                time.sleep(0.2)
                continue
            raise LockError(
                f"another process ({owner}) is writing {folder}; wait until it has ended, or stop"
                " it, then run the same command again: what is finished is kept"
            ) from None
        except OSError:  # the file system has no locks
            return descriptor
        if _is_open_at(descriptor, folder / LOCK):
            with contextlib.suppress(OSError):  # the disk is full; what is written next says it
                os.ftruncate(descriptor, 0)
                name = f"process {os.getpid()} on {socket.gethostname()}"
                os.pwrite(descriptor, name.encode(), 0)
            return descriptor
        os.close(descriptor)  # its owner has removed it; lock the new one


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Tests whether a path still is the file of a descriptor."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def content_id(folder: str | Path) -> str | None:
    """Reads the identity of a finished folder's content from its `manifest.json`.

    It is the manifest's `fingerprint` if it has one, as corpora and references do; else a digest of
    the sealed manifest, which lists the checksums of the folder's files. None if the manifest is
    missing or damaged.
    """
    path = Path(folder) / _MANIFEST
    manifest = read_sealed(path, unsealed=True) if path.is_file() else None
    if manifest is None:
        return None
    return manifest.get("fingerprint") or digest(json_text(manifest, sort_keys=True))


def remedy(folder: str | os.PathLike[str], script: str = "launch/prepare.py") -> str:
    """Returns, for messages, how to replace a damaged folder of a workdir without losing anything.

    `script` makes the folder anew; a folder of a version is made by an edit instead.
    """
    folder = Path(folder)
    for place in (folder, *folder.parents):
        if place.parent.name == VERSIONS:
            return (
                f"restore it from a copy, or go back to a version before {place.name} with"
                " launch/edit_bank.py rollback and edit again"
            )
    return (
        f"restore it from a copy, or move {folder} elsewhere and run {script} again, which makes it"
        " from the same inputs"
    )


def read_inputs(folder: Path) -> dict[str, Any] | None:
    """Reads the inputs of a finished part; None if it is unfinished.

    Raises `TextError` if `inputs.json` is damaged.
    """
    marker = folder / INPUTS
    if not marker.is_file():
        return None
    inputs = read_sealed(marker, unsealed=True)
    if inputs is None:
        raise TextError(
            f"{marker} is damaged; restore it from a copy, or move it elsewhere and run the same"
            f" command again, which makes {folder} from the same inputs"
        )
    return inputs


def clear_folder(folder: Path) -> None:
    """Deletes everything in a folder but its lock; the folder may be missing."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def begin_part(folder: Path, inputs: dict[str, Any]) -> None:
    """Prepares a part to be made or resumed; deletes its files if their inputs were different."""
    if not is_begun(folder, inputs):
        (folder / BEGUN).unlink(missing_ok=True)  # first: a half deleted part is not resumed
        clear_folder(folder)
        write_atomically(folder / BEGUN, _begun(inputs))


def is_begun(folder: Path, inputs: dict[str, Any]) -> bool:
    """Returns True if `begin_part` has prepared the part with these inputs."""
    marker = folder / BEGUN
    return marker.is_file() and marker.read_bytes() == _begun(inputs)


def _begun(inputs: dict[str, Any]) -> bytes:
    return json_text(inputs, indent=1, sort_keys=True).encode()


def make_part(folder: Path, inputs: dict[str, Any], make: Callable[[Path], Any]) -> bool:
    """Makes a part with `make(folder)` and marks it as finished, unless it is finished already.

    Returns True if a finished part was kept.

    Raises:
      TextError: the finished part was made from inputs other than `inputs` (a JSON object), or its
        `inputs.json` is damaged.
      LockError: another process makes it.
    """
    if _is_finished(folder, inputs):
        if (folder / LOCK).exists():  # left by a process that was killed after its last file
            with contextlib.suppress(LockError), only_writer(folder):
                pass
        return True
    with only_writer(folder):
        if _is_finished(folder, inputs):  # by a process that has just ended
            return True
        make(folder)
        write_sealed(folder / INPUTS, inputs)
    return False


def _is_finished(folder: Path, inputs: dict[str, Any]) -> bool:
    """Tests whether a part is finished; raises `TextError` if it was made from other inputs."""
    before = read_inputs(folder)
    if before is None:
        return False
    other = [key for key in sorted({*inputs, *before}) if inputs.get(key) != before.get(key)]
    if other:
        key = other[0]
        raise TextError(
            f"{folder} was made from other inputs: {', '.join(other)} ({key} was"
            f" {str(before.get(key))[:200]}, is now {str(inputs.get(key))[:200]});"
            " use another workdir"
        )
    return True
