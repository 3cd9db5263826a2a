"""Parts of a workdir that are published in a bucket: their manifests, files and objects.

gs://…/references/published.json    name, bytes and XXH3 checksum of each file of the part;
                                    written last and deleted first
gs://…/references/publishing.json   the same, while the part is being published
gs://…/references/FILE              a file; one above 128 MiB is FILE/00000, FILE/00001, …
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from m3jax.errors import StoreError
from m3jax.files import TEMPORARY, digest, fast_checksum, json_text
from m3jax.workdir import BEGUN, LOCK

PUBLISHED, PUBLISHING = "published.json", "publishing.json"
THREADS = 4  # files that are copied at a time


class File(NamedTuple):
    """File of a published part: path in it, size in bytes, XXH3 checksum."""

    name: str
    bytes: int
    checksum: str


class Manifest(NamedTuple):
    """Content of `published.json`: most bytes of an object, and the files of the part."""

    object_bytes: int
    files: list[File]

    @classmethod
    def read(cls, mark: bytes, place: str) -> Manifest:
        """Reads the bytes of `published.json` of the part at `place`; `StoreError` if damaged."""
        try:
            content = json.loads(mark)
            return cls(content["object_bytes"], [File(*file) for file in content["files"]])
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(
                f"{place}/{PUBLISHED} is damaged; delete it and run the command that has made this"
                " part again, which publishes it anew"
            ) from error

    def encode(self) -> bytes:
        return json_text(self._asdict(), indent=1).encode()

    def objects(self, file: File) -> list[tuple[str, int, int]]:
        """Returns the objects that hold a file: name, first byte and end."""
        if file.bytes <= self.object_bytes:
            return [(file.name, 0, file.bytes)]
        return [
            (f"{file.name}/{number:05d}", low, min(low + self.object_bytes, file.bytes))
            for number, low in enumerate(range(0, file.bytes, self.object_bytes))
        ]


class Copy(NamedTuple):
    """Part to be copied.

    Attributes:
      part: its path in the workdir.
      mark: its `published.json`.
      manifest: the same, of the files that are to be copied.
      folder: where these are collected.
      kept: names of files that stay where they are; None: the folder replaces an older copy.
    """

    part: str
    mark: bytes
    manifest: Manifest
    folder: Path
    kept: set[str] | None

    def missing(self) -> list[File]:
        files = self.manifest.files
        return [file for file in files if size_of(self.folder / file.name) != file.bytes]


def record(mark: bytes, folder: Path, files: list[File]) -> bytes:
    """Returns what a mirror keeps of a copied part, to know it again: what was published (its
    `published.json`), and size and time of change of each file that was copied to `folder`."""
    held = {file.name: _stat(folder / file.name) for file in files}
    return json_text({"published": digest(mark), "held": held}).encode()


def held(recorded: bytes | None, mark: bytes, folder: Path) -> set[str] | None:
    """Returns the files in `folder` that are as they were copied, by the result of `record`; None
    if that was not copied, but something else or nothing."""
    try:
        known = json.loads(recorded or b"{}")
        if known["published"] != digest(mark):
            return None
        stats = dict(known["held"])
    except (ValueError, TypeError, KeyError):  # damaged: copied again
        return None
    return {name for name, stat in stats.items() if _stat(folder / name) == stat}


def _stat(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [status.st_size, status.st_mtime_ns]


def files_in(folder: Path) -> list[File]:
    """Lists the files of a part that are published, sorted by name."""
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != TEMPORARY and path.name not in (LOCK, BEGUN)
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        sums = [*pool.map(fast_checksum, paths)]
    return [
        File(path.relative_to(folder).as_posix(), path.stat().st_size, total)
        for path, total in zip(paths, sums, strict=True)
    ]


def size_of(path: Path) -> int | None:
    """Returns the bytes of a file; None if it is missing."""
    return path.stat().st_size if path.is_file() else None


def size_text(size: int) -> str:
    """Returns a number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def progress(files: list[File]) -> tqdm:
    """Returns the bar of a copy of files, in bytes."""
    total = sum(file.bytes for file in files)
    return tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False)
