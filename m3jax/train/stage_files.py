"""Small files of a stage: written on this host, and copied to the bucket of its workdir, if any.

Metrics, TensorBoard events, config, rollbacks and pictures are local files also where the workdir
is a mirror (`m3jax.mirror`). They are copied to the bucket before a checkpoint is written, so that
none is ahead of its metrics, and at most once a minute in between; a run that goes on takes those
of the bucket first. Of a local workdir nothing is copied.

Of a long file of lines (`.jsonl`) only the end is copied each time. Its MiB before that are objects
beside it, `metrics.jsonl.NUMBER-DIGEST`, that never change; the first line of `metrics.jsonl` in
the bucket, which is written last, names them: `{"parts": [NAME, …]}`. So parts of a file that was
cut back never mix with those of the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from m3jax.errors import StoreError
from m3jax.files import digest, json_text, write_atomically
from m3jax.mirror import Mirror
from m3jax.store import Store

_EVERY = 60.0  # seconds
_PART = 1 << 20  # bytes of a part of a file of lines
_LINES = ".jsonl"
_PARTS = "parts"  # key of the line that names the parts


def joined(data: bytes, read: Callable[[str], bytes | None]) -> bytes:
    """Returns a file of lines from its end, which may begin with a line that names its parts.

    Args:
      data: the end, or a whole file.
      read: reads a part by its name; None if it is missing.

    Raises:
      StoreError: a part is missing.
    """
    first, _, rest = data.partition(b"\n")
    if not first.startswith(json_text({_PARTS: []})[:-2].encode()):
        return data
    parts = []
    for name in json.loads(first)[_PARTS]:
        part = read(name)
        if part is None:
            raise StoreError(f"{name} is missing; copy it from the stage in the bucket, too")
        parts.append(part)
    return b"".join([*parts, rest])


class StageFiles:
    """Files of one stage. All methods raise `StoreError` if its bucket cannot be reached.

    Args:
      folder: folder of the stage, in a workdir or its mirror.

    Attributes:
      place: folder or URL of the stage, for messages.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._mirror = folder, Mirror.of(folder.parent)
        self.place = self._mirror.url(folder.name)
        self._store = Store(self.place) if self._mirror.in_bucket else None
        self._copied: dict[str, tuple[int, int]] = {}  # size and time of change, by name
        self._parts: dict[str, set[str]] = {}  # of files of lines, those that are there
        self._last = time.monotonic()

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[None]:
        """Keeps other runs out of the stage while the block runs; of several processes, in one."""
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                stack.enter_context(self._mirror.only_writer(self.folder.name))
            yield

    def take(self, *names: str) -> None:
        """Makes files of this host what they are in the bucket; what is not there is deleted."""
        if self._store is None:
            return
        for name in names:
            data, path = self._store.read(name), self.folder / name
            if data is not None and name.endswith(_LINES):
                data = joined(data, self._store.read)
            if data is None:
                path.unlink(missing_ok=True)
            elif not path.is_file() or path.read_bytes() != data:
                write_atomically(path, data, shared=True)
        for path in self._paths("."):
            self._copied[self._name(path)] = _change(path)

    def put(self, *names: str) -> None:
        """Copies files, or all files of folders, to the bucket, unless they were copied as they
        are."""
        if self._store is None:
            return
        for path in [path for name in names for path in self._paths(name)]:
            name, change = self._name(path), _change(path)
            if self._copied.get(name) != change:
                self._mirror.check(self.folder.name)
                data = path.read_bytes()
                if name.endswith(_LINES):
                    self._put_lines(name, data)
                else:
                    self._store.write(name, data)
                self._copied[name] = change
        self._last = time.monotonic()

    def put_at_times(self, *names: str) -> None:
        """Copies files as `put`, once a minute; if the bucket cannot be reached, the next time."""
        if self._store is not None and time.monotonic() - self._last > _EVERY:
            self._last = time.monotonic()
            with contextlib.suppress(StoreError):
                self.put(*names)

    def delete(self, name: str) -> None:
        """Deletes a file, here and there."""
        (self.folder / name).unlink(missing_ok=True)
        if self._store is not None:
            self._store.delete(name)
            if name.endswith(_LINES):
                self._store.delete_under(f"{name}.")
            self._copied.pop(name, None)
            self._parts.pop(name, None)

    def _put_lines(self, name: str, data: bytes) -> None:
        """Copies a file of lines: parts that are not there, its end, and deletes other parts."""
        assert self._store is not None
        closed = range(0, max(0, len(data) - 1) // _PART * _PART, _PART)
        parts = [data[low : low + _PART] for low in closed]
        named = {f"{name}.{i:05d}-{digest(part)}": part for i, part in enumerate(parts)}
        if name not in self._parts:
            self._parts[name] = {*self._store.names(f"{name}.")}
        there = self._parts[name]
        for part in named.keys() - there:
            self._store.write(part, named[part])
            there.add(part)
        first = f"{json_text({_PARTS: [*named]})}\n".encode() if named else b""
        self._store.write(name, first + data[len(parts) * _PART :])
        for part in there - named.keys():
            self._store.delete(part)
            there.remove(part)

    def _paths(self, name: str) -> list[Path]:
        path = self.folder / name
        return sorted(p for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def _change(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
