"""Folders of records: ArrayRecord shards, side files, and a manifest that is written last."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import crc32c
import msgpack
import numpy as np
from array_record.python import array_record_module

from m3jax.errors import TextError
from m3jax.failures import raise_if_machine
from m3jax.files import (
    SMALL,
    TEMPORARY,
    checksum,
    commit,
    digest,
    json_text,
    read_sealed,
    write_sealed,
)
from m3jax.workdir import remedy

MANIFEST = "manifest.json"
CHECKSUMS = "crc32c.bin"  # CRC-32C of every record, <u4; itself verified when it is opened
_WRITER = "group_size:1,zstd:3"  # one record per group: a random read decompresses only that record
_READER = "readahead_buffer_size:0,max_parallelism:0"
_FORMAT = 1
_SHARD = ".array_record"  # ending of a shard's name

_Writer = TypeVar("_Writer", bound="RecordWriter")


def dtype_of_tokens(vocabulary: int) -> np.dtype:
    """Returns the dtype of stored tokens: little-endian uint16 if all ids fit, else uint32."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


class RecordWriter:
    """Writes msgpack records round robin: record i is record i // S of shard i % S.

    S is `shards`, or the number of records if that is smaller. Each record may append raw bytes to
    side files; its own checksum is appended to one of them. Old records in `folder` are deleted;
    new records are valid once `finish` has written
    the manifest. As a context manager it removes temporary files after an error.
    """

    def __init__(
        self, folder: str | os.PathLike[str], shards: int, side_files: Sequence[str]
    ) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        for old in {*folder.glob("records-*"), *folder.glob("*" + TEMPORARY)}:
            old.unlink()
        self.folder, self.count = folder, 0
        self._shards = shards
        self._writers: list[Any] = []
        self._records = hashlib.blake2b(digest_size=16)
        names = (*side_files, CHECKSUMS)
        self._streams = {n: (folder / (n + TEMPORARY)).open("wb") for n in names}

    def __enter__(self: _Writer) -> _Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        with contextlib.suppress(Exception):
            self._close()
        for temporary in self.folder.glob("*" + TEMPORARY):
            temporary.unlink(missing_ok=True)

    def write(self, record: dict[str, Any], **side: bytes) -> None:
        """Appends a record; a keyword `name=data` appends bytes to the side file `name.bin`."""
        shard = self.count % self._shards
        if shard == len(self._writers):
            path = self.folder / (_name(shard) + TEMPORARY)
            self._writers.append(array_record_module.ArrayRecordWriter(str(path), _WRITER))
        payload = msgpack.packb(record)
        self._records.update(len(payload).to_bytes(8, "little"))
        self._records.update(payload)
        with self._reported(shard):
            self._writers[shard].write(payload)
        self._streams[CHECKSUMS].write(crc32c.crc32c(payload).to_bytes(4, "little"))
        for name, data in side.items():
            self._streams[name + ".bin"].write(data)
        self.count += 1

    def finish(self, kind: str, content: dict[str, Any]) -> None:
        """Commits every file, then writes the manifest, which includes `content`.

        The manifest's `fingerprint` covers `kind`, the records in order and `content`, but not the
        number of shards or the compression, so equal documents have equal fingerprints.
        """
        self._close()
        files = []
        for name in (*map(_name, range(len(self._writers))), *self._streams):
            path = self.folder / name
            commit(self.folder / (name + TEMPORARY), path)
            files.append({"name": name, "bytes": path.stat().st_size, "blake2b": checksum(path)})
        stable = json_text(content, sort_keys=True)
        manifest = {
            "kind": kind,
            "format": _FORMAT,
            "count": self.count,
            **content,
            "fingerprint": digest(kind, self._records.hexdigest(), stable),
            "files": files,
        }
        write_sealed(self.folder / MANIFEST, manifest)

    def _close(self) -> None:
        """Closes all files; raises `OSError` if buffered data cannot be written."""
        for shard, writer in enumerate(self._writers):
            if writer.is_open():
                with self._reported(shard):
                    writer.close()
        for stream in self._streams.values():
            stream.close()

    @contextlib.contextmanager
    def _reported(self, shard: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # from riegeli, for example if the disk is full
            path = self.folder / _name(shard)
            raise OSError(f"{path} could not be written: {error}") from error


def _name(shard: int) -> str:
    return f"records-{shard:05d}{_SHARD}"


def is_side_file(name: str) -> bool:
    """Returns whether a file of a folder of records is no shard."""
    return not name.endswith(_SHARD)


class Records:
    """Reads the records of a folder by index, in any order. Thread-safe; has the `manifest`.

    Every record is compared with its checksum when it is read. Folders without `crc32c.bin`, which
    older versions wrote, have only the checksums of ArrayRecord, which do not tell files apart.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        kind: str,
        fetch: Callable[[list[str]], None] | None = None,
    ) -> None:
        """Opens a finished folder of records.

        With `fetch`, which makes the files that it is given present, shards may be missing. They
        are fetched when they are read.

        Raises `TextError` if the manifest is missing, damaged, or of another kind or format, or a
        file is missing or has another size than the manifest says.
        """
        self.folder = Path(folder)
        self.manifest = self._read_manifest(kind)
        shards = [e for e in self.manifest["files"] if not is_side_file(e["name"])]
        self._paths = [self.folder / entry["name"] for entry in shards]
        self._sizes = [entry["bytes"] for entry in shards]
        self._readers: list[Any] = [None] * len(self._paths)
        self._lock, self._fetching = threading.Lock(), threading.Lock()
        self._fetch, self._absent = fetch, set[int]()  # numbers of shards
        if fetch is not None:
            self._absent = {i for i, path in enumerate(self._paths) if not path.is_file()}
        absent = {self._paths[i].name for i in self._absent}
        self._check_files({entry["name"] for entry in self.manifest["files"]} - absent)
        self._checksums = None
        if any(entry["name"] == CHECKSUMS for entry in self.manifest["files"]):
            self._checksums = self.side_file(CHECKSUMS, "<u4")

    def _check_files(self, names: Container[str]) -> None:
        for entry in self.manifest["files"]:
            path = self.folder / entry["name"]
            if path.name not in names:
                continue
            if not path.is_file():
                raise self.damaged(path, "is missing")
            if (size := path.stat().st_size) != entry["bytes"]:
                raise self.damaged(path, f"has {size} bytes; expected {entry['bytes']}")

    @property
    def shards(self) -> int:
        """Returns the number of shards; record i is in shard i % `shards`."""
        return len(self._paths)

    def fetch(self, shards: Sequence[int]) -> None:
        """Makes shards present that are missing, if the folder was opened with `fetch`."""
        if not self._absent.intersection(shards):
            return
        with self._fetching:
            missing = self._absent.intersection(shards)
            if missing and self._fetch is not None:
                names = sorted(self._paths[i].name for i in missing)
                self._fetch(names)
                self._check_files(names)
            self._absent -= missing

    def side_file(self, name: str, dtype: np.typing.DTypeLike) -> np.ndarray:
        """Reads a side file whole, one row per record; raises `TextError` if it is damaged."""
        path = self.folder / name
        values = np.fromfile(path, dtype)
        entry = next((entry for entry in self.manifest["files"] if entry["name"] == name), None)
        if entry is None or len(values) != len(self) or checksum(path) != entry["blake2b"]:
            raise self.damaged(path, "is damaged (its checksum differs)")
        return values

    def damaged(self, path: Path, what: str) -> TextError:
        """Returns the error for a damaged file; `what` says what is wrong with it."""
        return TextError(f"{path} {what}; {remedy(self.folder)}")

    def _read_manifest(self, kind: str) -> dict[str, Any]:
        path = self.folder / MANIFEST
        if not path.is_file():
            raise TextError(f"no finished {kind}: {path} is missing; run launch/prepare.py")
        manifest = read_sealed(path, "kind", "format", "count", "files")
        if manifest is None:
            raise self.damaged(path, "is damaged")
        if (manifest["kind"], manifest["format"]) != (kind, _FORMAT):
            raise TextError(
                f"{self.folder} holds a {manifest['kind']}, format {manifest['format']}; expected a"
                f" {kind}, format {_FORMAT}"
            )
        return manifest

    def verify(self) -> None:
        """Compares every file with its checksum; raises `TextError` naming the first mismatch."""
        for entry in self.manifest["files"]:
            path = self.folder / entry["name"]
            if checksum(path) != entry["blake2b"]:
                raise self.damaged(path, "is damaged (its checksum differs)")

    def __len__(self) -> int:
        return self.manifest["count"]

    def check(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the ids as int64; raises `IndexError` outside 0 … len − 1."""
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            wrong = ids[(ids < 0) | (ids >= len(self))][0]
            raise IndexError(f"{self.folder} has no record {wrong}; it has 0 … {len(self) - 1}")
        return ids

    def read(self, ids: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Reads records in the order of `ids`.

        Raises `IndexError` for an id outside 0 … len − 1, `TextError` for a damaged shard.
        """
        ids = self.check(ids)
        records: list[dict[str, Any]] = [{}] * len(ids)
        shards = ids % max(len(self._paths), 1)
        self.fetch(shards.tolist())
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            inside = (ids[places] // len(self._paths)).tolist()
            try:
                with self._reading(shard) as reader:
                    payloads = reader.read(inside)
                self._compare(payloads, ids[places])
                unpacked = [msgpack.unpackb(payload) for payload in payloads]
            except (RuntimeError, IndexError, ValueError, msgpack.UnpackException) as error:
                raise_if_machine(error)
                raise self.damaged(self._paths[shard], f"is damaged ({error})") from error
            for place, record in zip(places, unpacked, strict=True):
                records[place] = record
        return records

    def _compare(self, payloads: Sequence[bytes], ids: np.ndarray) -> None:
        """Raises `ValueError` if a record is not the one that was written with its id."""
        if self._checksums is None:
            return
        for payload, expected in zip(payloads, self._checksums[ids].tolist(), strict=True):
            if crc32c.crc32c(payload) != expected:
                raise ValueError("a record is not the one that was written")

    @contextlib.contextmanager
    def _reading(self, shard: int) -> Iterator[Any]:
        """Opens a shard; one that is not small stays open for later reads."""
        path = self._paths[shard]
        if self._sizes[shard] <= SMALL:
            reader = _open_shard(path)
            try:
                yield reader
            finally:
                reader.close()
            return
        with self._lock:
            if self._readers[shard] is None:
                self._readers[shard] = _open_shard(path)
        yield self._readers[shard]


def _open_shard(path: Path) -> Any:
    options = {"file_reader_buffer_size": 1 << 15}
    return array_record_module.ArrayRecordReader(str(path), _READER, **options)


def told_losses(manifest: Mapping[str, Any], what: str) -> str:
    """Formats how many texts (`what`) have characters with bytes that the tokenizer lacks."""
    lost = manifest.get("lost_characters", 0)
    if not lost:
        return ""
    texts = manifest[f"lossy_{what}"]
    return f"; {lost} characters in {texts} {what} do not come back from tokens"
