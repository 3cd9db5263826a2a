"""Local mirror of a workdir in a bucket: finished parts are fetched from it and published to it.

Code below launch/ reads and writes local folders. Of a workdir gs://… each host has a folder with
the same layout, `CACHE_DIR/<digest of the URL>/`, and a `Mirror` copies *parts* between the two: a
part is a folder or a file by its path in the workdir (`references`, `corpus/train`,
`versions/current.json`). A workdir on a disk is its own mirror, where nothing is copied.

What a part is in the bucket says `m3jax.published`. `CACHE_DIR/<digest>/.mirror/` has the URL of
the workdir, the lock of this host, unfinished copies, and what was copied: size and time of change
of each file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from m3jax.errors import LockError, StoreError, UserError
from m3jax.files import TEMPORARY, commit, digest, fast_checksum, write_atomically
from m3jax.printable import complain, show_as
from m3jax.published import (
    PUBLISHED,
    PUBLISHING,
    THREADS,
    Copy,
    File,
    Manifest,
    files_in,
    held,
    progress,
    record,
    size_of,
    size_text,
)
from m3jax.store import REQUESTS, Lease, Store, is_bucket, living
from m3jax.workdir import LOCK, only_writer

_OWN = ".mirror"  # folder of a mirror for its own files
_OBJECT = 128 << 20  # most bytes of an object
_PIECE = 32 << 20  # bytes of a request
_leases: dict[str, Lease] = {}  # that this process holds, by the URL of the workdir


def default_cache() -> Path:
    """Returns the folder of this user's mirrors: `m3jax` in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3jax"


class Mirror:
    """Workdir on this host, and the bucket that it mirrors, if any.

    All methods but `url` raise `StoreError` as `Store` does; those of a local workdir do nothing.

    Args:
      place: a workdir: a local folder, or gs://….
      cache_dir: folder of all mirrors on this host; default `default_cache()`.

    Attributes:
      place: the workdir, as it was given.
      in_bucket: True if it is in a bucket.
      local: the mirror; of a local workdir, the workdir.
    """

    def __init__(
        self, place: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self.in_bucket = is_bucket(place)
        self.place, self.local = os.fspath(place), Path(place)
        if self.in_bucket:
            self.place = self.place.rstrip("/")
            self.local = Path(cache_dir or default_cache()).absolute() / digest(self.place)
            self._store, self._own = Store(self.place), self.local / _OWN
            show_as(str(self.local), self.place)
            if not (self._own / "place").is_file():
                write_atomically(self._own / "place", self.place.encode(), shared=True)

    @classmethod
    def of(cls, local: str | os.PathLike[str]) -> Mirror:
        """Returns the mirror whose folder is `local`; of another folder, one of a local workdir."""
        own = Path(local) / _OWN / "place"
        return cls(own.read_text(), Path(local).parent) if own.is_file() else cls(local)

    def url(self, part: str) -> Path | str:
        """Returns where a part lies, for readers by range and for Orbax: a URL, or a local path."""
        return f"{self.place}/{part}" if self.in_bucket else self.local / part

    def has(self, part: str) -> bool:
        """Returns True if a part is published in the bucket; of a local workdir, if it exists."""
        if not self.in_bucket:
            return (self.local / part).exists()
        return any(self._store.read(name) is not None for name in (f"{part}/{PUBLISHED}", part))

    def read(self, name: str) -> bytes | None:
        """Reads a small file of the bucket; None if there is none, and of a local workdir."""
        return self._store.read(name) if self.in_bucket else None

    def names(self, prefix: str) -> list[str]:
        """Lists the objects of the bucket whose names begin with `prefix`, sorted."""
        return self._store.names(prefix) if self.in_bucket else []

    def published(self, *parts: str) -> list[str]:
        """Lists those of the parts that are in the bucket; none of a local workdir."""
        return [part for part in parts if self.in_bucket and self.has(part)]

    # -- from the bucket ---------------------------------------------------------------------------
    def fetch(
        self, *parts: str, anew: bool = False, only: Callable[[str], bool] | None = None
    ) -> None:
        """Copies parts from the bucket, checked, unless they are here as they are there.

        With `anew` they are copied, and so compared with their checksums, also if they are here.
        With `only`, a function of a file's name, other files that are not here stay there.

        A killed copy goes on where it ended. Of several processes of a host one copies, the others
        wait for it.

        Raises `StoreError` if a part is not published or damaged, or the disk has no room for all
        of them, before anything is copied.
        """
        if not self.in_bucket:
            return
        with self._locked():
            needed = [self._to_copy(part, anew, only) for part in dict.fromkeys(parts)]
            copies = [copy for copy in needed if copy is not None]
            missing = [(copy, file) for copy in copies for file in copy.missing()]
            self._require_space(copies, sum(file.bytes for _, file in missing))
            with (
                progress([file for _, file in missing]) as bar,
                ThreadPoolExecutor(THREADS) as pool,
            ):
                for file in pool.map(lambda pair: self._read_file(*pair), missing):
                    bar.update(file.bytes)
            for copy in copies:
                self._put_in_place(copy)
            for left in (*self._own.glob("old-*"), *self._own.glob("copy-*")):
                shutil.rmtree(left)  # also copies of what was published anew meanwhile

    def _to_copy(self, part: str, anew: bool, only: Callable[[str], bool] | None) -> Copy | None:
        """Returns what a part needs; None if it is here, or a file, which is copied at once."""
        mark = self._store.read(f"{part}/{PUBLISHED}")
        if mark is None:
            if not self.fetch_files([part]):
                raise StoreError(
                    f"nothing is finished at {self.place}/{part}; run the command that makes it"
                    " again, which goes on, or correct the URL"
                )
            return None
        manifest = Manifest.read(mark, f"{self.place}/{part}")
        kept = None if anew else held(self._recorded(part), mark, self.local / part)
        chosen = [file for file in manifest.files if only is None or only(file.name)]
        needed = [file for file in chosen if file.name not in (kept or ())]
        if kept is not None and not needed:
            return None
        folder = self._own / f"copy-{digest(part, mark)}"
        return Copy(part, mark, manifest._replace(files=needed), folder, kept)

    def fetch_files(self, names: Sequence[str]) -> list[str]:
        """Makes small files here what they are in the bucket, deleted ones deleted.

        Returns the names of those that are there.
        """
        with ThreadPoolExecutor(REQUESTS) as pool:
            read = dict(zip(names, pool.map(self._store.read, names), strict=True))
        for name, data in read.items():
            path = self.local / name
            if data is None:
                path.unlink(missing_ok=True)
            elif not path.is_file() or path.read_bytes() != data:
                write_atomically(path, data, shared=True)
        return [name for name, data in read.items() if data is not None]

    def drop_older(self, part: str) -> None:
        """Deletes a part here if something else is published in the bucket; nothing there: kept."""
        mark = self.read(f"{part}/{PUBLISHED}")
        if mark is None or not (self.local / part).exists():
            return
        files = {file.name for file in Manifest.read(mark, f"{self.place}/{part}").files}
        if held(self._recorded(part), mark, self.local / part) != files:
            shutil.rmtree(self.local / part, ignore_errors=True)

    def _require_space(self, copies: list[Copy], needed: int) -> None:
        if needed == 0:
            return
        free = shutil.disk_usage(self.local).free
        if needed > free:
            raise StoreError(
                f"{self.local.parent} has {size_text(free)} free, and {self.place} needs"
                f" {size_text(needed)}; choose a larger disk with --cache_dir"
            )
        parts = ", ".join(copy.part for copy in copies)
        complain(f"copying {size_text(needed)} from {self.place} to {self.local}: {parts}")

    def _read_file(self, copy: Copy, file: File) -> File:
        """Copies a file, from where a killed copy ended."""
        path = copy.folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + TEMPORARY)
        begin = min(size_of(temporary) or 0, file.bytes)
        spans = (
            (f"{copy.part}/{name}", start - low, min(start + _PIECE, high) - low)
            for name, low, high in copy.manifest.objects(file)
            for start in range(max(low, begin), high, _PIECE)
        )
        with temporary.open("ab") as content:
            for data in self._store.read_spans(spans):
                content.write(data)
        if size_of(temporary) != file.bytes or fast_checksum(temporary) != file.checksum:
            temporary.unlink()
            place = f"{self.place}/{copy.part}"
            raise StoreError(
                f"{place}/{file.name} is damaged (its checksum differs); delete"
                f" {place}/{PUBLISHED} and run the command that has made {copy.part} again, which"
                " publishes it anew"
            )
        commit(temporary, path)
        return file

    def _put_in_place(self, copy: Copy) -> None:
        """Makes a whole copy the part of this mirror, in place of an older one, or adds it."""
        part, old = self.local / copy.part, self._own / f"old-{secrets.token_hex(6)}"
        files = copy.manifest.files
        copy.folder.mkdir(parents=True, exist_ok=True)  # a part without files
        part.parent.mkdir(parents=True, exist_ok=True)
        if copy.kept is None:
            if part.exists():
                os.replace(part, old)
            os.replace(copy.folder, part)
        else:
            for file in files:
                (part / file.name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(copy.folder / file.name, part / file.name)
            whole = Manifest.read(copy.mark, f"{self.place}/{copy.part}").files
            files = [*files, *(file for file in whole if file.name in copy.kept)]
        self._write_record(copy.part, copy.mark, files)

    # -- to the bucket -----------------------------------------------------------------------------
    def publish(self, part: str, source: Path | None = None, anew: bool = False) -> None:
        """Copies a finished part to the bucket, so that readers see all of it or nothing.

        What is there with the same checksum is not copied again, so that a killed call goes on.
        Locks, temporary files and `begun.json` stay local. Without `source` the part is that of the
        mirror. With `anew` everything is copied again.

        Raises `StoreError` if another writer took the bucket over meanwhile.
        """
        if not self.in_bucket:
            return
        folder, store = source or self.local / part, self._store
        if folder.is_file():
            self.check()
            if store.read(part) != (data := folder.read_bytes()):
                store.write(part, data)
            return
        manifest = Manifest(_OBJECT, files_in(folder))
        mark = manifest.encode()
        if anew:
            self.check()
            for name in (PUBLISHED, PUBLISHING):
                store.delete(f"{part}/{name}")
        before = store.read(f"{part}/{PUBLISHED}")
        if before != mark:
            marks = (before, store.read(f"{part}/{PUBLISHING}"))
            known = next(
                (Manifest.read(data, f"{self.place}/{part}") for data in marks if data), None
            )
            there = {name.removeprefix(f"{part}/") for name in store.names(f"{part}/")}
            kept: set[str] = set()
            if known is not None and known.object_bytes == _OBJECT:
                same = {*known.files}.intersection(manifest.files)
                kept = {name for file in same for name, *_ in manifest.objects(file)} & there
            self.check()
            store.delete(f"{part}/{PUBLISHED}")
            for name in sorted(there - kept - {PUBLISHED, PUBLISHING}):
                store.delete(f"{part}/{name}")
            store.write(f"{part}/{PUBLISHING}", mark)
            self._write_files(part, folder, manifest, kept)
            self.check()
            store.write(f"{part}/{PUBLISHED}", mark)
        store.delete(f"{part}/{PUBLISHING}")
        if source is None:
            with self._locked():
                self._write_record(part, mark, manifest.files)

    def _write_files(self, part: str, folder: Path, manifest: Manifest, kept: set[str]) -> None:
        def write(file: File) -> File:
            with (folder / file.name).open("rb") as content:
                for name, low, high in manifest.objects(file):
                    if name not in kept:
                        content.seek(low)
                        self._store.write(f"{part}/{name}", content.read(high - low))
            return file

        with progress(manifest.files) as bar, ThreadPoolExecutor(THREADS) as pool:
            for file in pool.map(write, manifest.files):
                bar.update(file.bytes)

    def keep(self, path: Path) -> Path | str:
        """Publishes a file if it is in this mirror; returns where it is then."""
        if not (self.in_bucket and path.is_relative_to(self.local)):
            return path
        part = path.relative_to(self.local).as_posix()
        self.publish(part)
        return self.url(part)

    def swap(self, part: str, data: bytes) -> bool:
        """Writes a small file, here and there, if it is there as it is here; returns whether it
        did.

        `data` must differ from what others write, as in `Store.swap`. Of a local workdir the file
        is written.
        """
        path = self.local / part
        if self.in_bucket:
            self.check()
            there, generation = self._store.read_with_generation(part)
            if there != (path.read_bytes() if path.is_file() else None):
                return False
            if not self._store.swap(part, data, generation):
                return False
        write_atomically(path, data)
        return True

    def delete(self, part: str) -> None:
        """Deletes a part, here and there; in the bucket its manifest first.

        Objects there are listed before the lease is looked at: those of a later writer stay.
        """
        if self.in_bucket:
            there, generation = self._store.read_with_generation(part)
            names = self._store.names(f"{part}/")
            self.check()
            if there is not None:
                self._store.delete(part, generation)
            if (mark := f"{part}/{PUBLISHED}") in names:
                self._store.delete(mark)
            self._store.delete_all(names)
        path = self.local / part
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def folders(self, part: str) -> list[str]:
        """Lists the names of the folders in a folder of the bucket, sorted."""
        names = (name.removeprefix(f"{part}/").split("/") for name in self.names(f"{part}/"))
        return sorted({path[0] for path in names if len(path) > 1})

    def copy(self, part: str, target: str) -> None:
        """Copies what the bucket has of a part under another name."""
        names = [name.removeprefix(f"{part}/") for name in self._store.names(f"{part}/")]

        def copy(name: str) -> None:
            data = self._store.read(f"{part}/{name}")
            if data is not None:
                self._store.write(f"{target}/{name}", data)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(copy, names))

    def reading(self, name: str) -> Callable[[], None]:
        """Shows that this process reads something, until what it returns is called or it ends.

        The lease `name` is renewed meanwhile (`m3jax.store.living`). Where this process may not
        write to the bucket nothing is shown.
        """
        lease = Lease(self._store, f"{name}-{secrets.token_hex(8)}", "reading")
        try:
            lease.__enter__()
        except StoreError:
            return lambda: None
        return lambda: lease.__exit__(None, None, None)

    def read_by_others(self, name: str) -> bool:
        """Returns True if a process that lives has called `reading` with this name."""
        return bool(living(self._store, f"{name}-"))

    @contextlib.contextmanager
    def only_writer(self, part: str = "") -> Iterator[None]:
        """Keeps other writers out of the workdir, or of the folder `part` in it, while the block
        runs: a lock; there, a lease.

        Raises `LockError` or `StoreError` if another process writes.
        """
        if not self.in_bucket:
            with only_writer(self.local / part):
                yield
            return
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(only_writer(self.local / part))
            except LockError as error:
                raise LockError(str(error).replace(str(self.local), self.place)) from None
            place = str(self.url(part)).rstrip("/")
            _leases[place] = stack.enter_context(Lease(Store(place), LOCK, "writing"))
            stack.callback(_leases.pop, place)
            try:
                yield
            except UserError:  # perhaps the next writer has deleted what this one had begun
                _leases[place].check_now()
                raise

    @property
    def token(self) -> str:
        """Returns what names the holder of the lease of `only_writer`; "" for a local workdir."""
        return _leases[self.place].token if self.in_bucket else ""

    def check(self, part: str = "") -> None:
        """Raises `StoreError` if this process has lost its lease of `only_writer`."""
        lease = _leases.get(str(self.url(part)).rstrip("/"))
        if lease is not None:
            lease.check()

    # -- what is here ------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._own / "lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _record_path(self, part: str) -> Path:
        return self._own / f"{digest(part)}.json"

    def _recorded(self, part: str) -> bytes | None:
        path = self._record_path(part)
        return path.read_bytes() if path.is_file() else None

    def _write_record(self, part: str, mark: bytes, files: list[File]) -> None:
        write_atomically(self._record_path(part), record(mark, self.local / part, files))
