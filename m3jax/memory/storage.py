"""Names, reads, checks and writes the files of a bank.

A bank is a local folder, or the URL of a bucket or (read-only) of a folder on an HTTP server:

    manifest.json         binding, info, shapes, checksums; written before the first shard
    lengths.npy           number of used slots of each memory (R,)
    record_hashes.npy     hash of all tokens that each memory depends on (R,)
    codebook.npz          tables of the vector quantizer, if the bank is compressed with it
    memories.zarr/        zarr3 array (R, 2, L, K, P, width) of keys and values; width is H, or the
                          bytes of a code. One inner chunk is one memory. If only S heads are
                          stored: (R, 2, 1, S, P, width)
    crc32c/               CRC-32C of the memories of each shard, written before the shard; removed
                          when the bank is complete
    crc32c.bin            digest, then CRC-32C of all memories (R,): a memory of another place or
                          bank has another one
    COMPLETE              checksum of the manifest, digest of crc32c.bin; written last

TensorStore writes every file to a temporary name, syncs and renames it, so that an existing shard
file is always complete.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import json
import math
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import crc32c
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jaxtyping import Shaped, UInt32

from m3jax.errors import BankError
from m3jax.failures import raise_if_machine
from m3jax.files import checksum, digest, json_text
from m3jax.private_apis import reason_of
from m3jax.store import RETRIES, is_bucket, limit_silence, unreachable
from m3jax.workdir import VERSIONS

FORMAT = 2
MANIFEST, COMPLETE = "manifest.json", "COMPLETE"
LENGTHS, HASHES = "lengths.npy", "record_hashes.npy"
CODEBOOK = "codebook.npz"
ARRAY = "memories.zarr/"
CHECKSUMS, _OF_SHARDS = "crc32c.bin", "crc32c/"
WRITE_AGAIN = "launch/write_bank.py"
IO_THREADS = 32  # concurrent requests
SECONDS = 60  # time limit for one memory from a server
# For TensorStore, whose default of 32 attempts takes a quarter of an hour.
_RETRIES = {"max_retries": 4, "initial_delay": "200ms", "max_delay": "2s"}
_DIGEST = 32  # bytes of the digest at the start of crc32c.bin
# Probe of a server: attempts, seconds between two attempts, time limit of an answer in seconds.
_ATTEMPTS, _PAUSE, _TIMEOUT = 3, 0.5, 10


def is_url(folder: str | Path) -> bool:
    """Returns True if a bank is given by a URL, not as a local folder."""
    return "://" in str(folder)


def is_http(folder: str | Path) -> bool:
    """Returns True if a bank is on an HTTP server, which can be read but not listed or written."""
    return str(folder).startswith(("http://", "https://"))


def require_writable(folder: str | Path) -> None:
    """Raises `BankError` if the bank is on an HTTP server, which is read-only."""
    if is_http(folder):
        raise BankError(
            f"bank {folder} is read-only: an HTTP server takes no files. Write it with"
            f" {WRITE_AGAIN} to the folder that the server serves, or to a bucket"
        )


def write_again(folder: str | Path) -> str:
    """Returns, for messages, the script that writes missing files and the place to run it."""
    if is_http(folder):
        return f"{WRITE_AGAIN} on the server"
    return "launch/edit_bank.py repair" if VERSIONS in Path(folder).parts else WRITE_AGAIN


def file_url(folder: str | Path, name: str) -> str:
    """Returns the URL of a file of a bank, keeping the query (`?…`) of the bank's URL."""
    parts = urlsplit(str(folder))
    return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()


def store(folder: str | Path) -> ts.KvStore:
    """Opens the TensorStore key-value store of a bank's files, in a local folder or at a URL."""
    if is_url(folder):
        limit_silence()
        return ts.KvStore.open(file_url(folder, ""), context=_context()).result()
    path = str(Path(folder).resolve()) + "/"
    return ts.KvStore.open({"driver": "file", "path": path}).result()


@functools.cache
def _context() -> ts.Context:
    """Returns the TensorStore context of all banks: no cache, as `m3jax.memory.cache` is used."""
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "file_io_concurrency": {"limit": IO_THREADS},
            "http_request_concurrency": {"limit": IO_THREADS},
            "http_request_retries": _RETRIES,
            "gcs_request_concurrency": {"limit": IO_THREADS},
            "gcs_request_retries": RETRIES,
        }
    )


def require_served(folder: str | Path) -> None:
    """Requests one byte of a bank from its HTTP server; does nothing for banks elsewhere.

    Raises:
      BankError: three attempts got no answer within 10 s or an HTTP error, the server has no bank
        at this URL, or it does not support range requests.
    """
    if not is_http(folder):
        return
    request = urllib.request.Request(file_url(folder, MANIFEST), headers={"Range": "bytes=0-0"})
    for attempt in range(_ATTEMPTS):
        time.sleep(_PAUSE if attempt else 0)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                if answer.status == 206:
                    answer.read()  # raises if the body is truncated
                    return
                raise BankError(
                    f"the server of bank {folder} cannot give parts of files (it answers"
                    f" {answer.status} to a request for a range of bytes), so that each memory"
                    " would cost a whole shard. Serve the folder with one that can, such as nginx,"
                    " Caddy or `rclone serve http`"
                )
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                raise BankError(
                    f"{folder} holds no bank: its server has no {MANIFEST} there (404). Check the"
                    " URL; it is that of the folder that launch/write_bank.py wrote"
                ) from None
            problem = f"the server answers {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):  # TensorStore may know other certificates
                return
            problem = f"no answer from the server ({reason})"
    raise BankError(
        f"bank {folder} cannot be reached: {problem}, {_ATTEMPTS} times. Check host, port and path,"
        " and that the server runs; then run the same command again"
    )


def read_file(folder: str | Path, name: str) -> bytes | None:
    """Reads a file of the bank; None if it does not exist. Raises `BankError` if that fails."""
    try:
        result = store(folder).read(name).result()
    except ValueError as error:
        raise_if_machine(error)
        raise BankError(
            f"{folder}/{name} cannot be read: {reason_of(error)}. Check the drive, or server and"
            " network, and run the same command again"
        ) from error
    return bytes(result.value) if result.state == "value" else None


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """Reads the manifest; None if missing. Raises `BankError` if invalid or of another format."""
    data = read_file(folder, MANIFEST)
    if data is None:
        return None
    try:
        manifest = json.loads(data)
        version = manifest["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise BankError(
            f"{folder}/{MANIFEST} is no manifest of a bank ({error}); {replaced(folder)}"
        ) from error
    if version != FORMAT:
        writer = manifest.get("info", {}).get("m3jax")
        raise BankError(
            f"bank {folder} has format {version}, this version of m3jax reads {FORMAT}; write it"
            f" again with {write_again(folder)}, or read it with m3jax {writer}"
        )
    return manifest


def replaced(folder: str | Path) -> str:
    """Returns, for messages, how to replace a bank that is damaged outside its shards."""
    return f"restore it from a copy, or move {folder} elsewhere and run {write_again(folder)} again"


def npy_bytes(values: np.ndarray) -> bytes:
    """Serializes an array as a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def read_checked(folder: str | Path, manifest: dict[str, Any], name: str) -> bytes:
    """Reads a file whose checksum the manifest has; raises `BankError` if missing or damaged."""
    data = read_file(folder, name)
    if data is None or checksum(data) != manifest["checksums"][name]:
        what = "is missing" if data is None else "is damaged (its checksum differs)"
        again = write_again(folder)
        remedy = f"run {again} again, which makes it from the references"
        if name == CODEBOOK:
            remedy = replaced(folder)
        raise BankError(f"{folder}/{name} {what}; {remedy}")
    return data


def read_side_file(folder: str | Path, manifest: dict[str, Any], name: str) -> np.ndarray:
    """Reads a `.npy` side file of the bank; errors as in `read_checked`."""
    return np.load(io.BytesIO(read_checked(folder, manifest, name)), allow_pickle=False)


def complete_stamp(manifest: bytes, checksums: bytes | None = None) -> bytes:
    """Returns the content of COMPLETE: checksum of the manifest, digest of `crc32c.bin`."""
    lines = [checksum(manifest), *([] if checksums is None else [checksums[:_DIGEST].decode()])]
    return "".join(line + "\n" for line in lines).encode()


def is_sealed(stamp: bytes | None, manifest: bytes | None) -> bool:
    """Returns True if the content of COMPLETE fits a manifest; `None` stands for a missing file."""
    sums = (stamp or b"").split(b"\n")
    return manifest is not None and sums[0] == checksum(manifest).encode()


def identity(manifest: dict[str, Any]) -> str:
    """Returns a digest of a bank's binding, shapes and checksums; not of where they were made."""
    return digest(json_text({**manifest, "info": None}, sort_keys=True))


def checksums_of(memories: Shaped[np.ndarray, "n ..."]) -> UInt32[np.ndarray, " n"]:
    """Returns the CRC-32C of memories in stored form, as TensorStore stores it behind each."""
    rows = np.ascontiguousarray(memories).view(np.uint8).reshape(len(memories), -1)
    return np.array([crc32c.crc32c(row.data) for row in rows], "<u4")


def write_shard_checksums(
    folder: str | Path, shard: int, memories: Shaped[np.ndarray, "n ..."]
) -> None:
    """Writes the checksums of a shard's memories, before the shard; `BankError` if that fails."""
    write_file(folder, f"{_OF_SHARDS}{shard}", checksums_of(memories).tobytes())


def read_checksums(
    folder: str | Path, manifest: dict[str, Any]
) -> tuple[UInt32[np.ndarray, " R"], bytes] | None:
    """Reads `crc32c.bin`: the checksums and the whole file; None if missing or damaged."""
    data = read_file(folder, CHECKSUMS)
    if data is None or data[:_DIGEST] != digest(identity(manifest), data[_DIGEST:]).encode():
        return None
    return np.frombuffer(data[_DIGEST:], "<u4"), data


def join_checksums(folder: str | Path, manifest: dict[str, Any]) -> bytes:
    """Joins the checksums of all shards to `crc32c.bin`; returns its bytes.

    Those of shards that an older version wrote are computed from the shards as they are. The
    folder `crc32c/` is deleted by `remove_shard_checksums`, once the bank is complete.
    """
    read = read_checksums(folder, manifest)
    whole = np.zeros(manifest["shape"][0], "<u4") if read is None else read[0].copy()
    array = None
    for shard in range(shards_of(manifest)):
        low, high = shard_span(manifest, shard)
        data = read_file(folder, f"{_OF_SHARDS}{shard}")
        if data is not None and len(data) == 4 * (high - low):
            whole[low:high] = np.frombuffer(data, "<u4")
        elif read is None:
            array = array or open_array(folder, manifest)
            try:
                whole[low:high] = checksums_of(array[low:high].read().result())
            except ValueError as error:
                raise BankError(
                    f"shard file {folder}/{shard_key(shard)} cannot be read ({reason_of(error)});"
                    f" move it elsewhere and run {write_again(folder)} again, which writes it anew"
                ) from error
    joined = digest(identity(manifest), whole.tobytes()).encode() + whole.tobytes()
    if read is None or joined != read[1]:
        write_file(folder, CHECKSUMS, joined)
    return joined


def remove_shard_checksums(folder: str | Path) -> None:
    """Deletes `crc32c/`."""
    sums = ts.KvStore.KeyRange(_OF_SHARDS, _OF_SHARDS[:-1] + "0")
    with _changing(folder, _OF_SHARDS, "deleted"):
        store(folder).delete_range(sums).result()
    if not is_url(folder):
        shutil.rmtree(Path(folder) / _OF_SHARDS, ignore_errors=True)


def open_array(
    folder: str | Path, manifest: dict[str, Any], *, create: bool = False
) -> ts.TensorStore:
    """Opens the array of memories, `(R, 2, L, K, P, width)`; of S heads, `(R, 2, 1, S, P, width)`.

    `create` replaces any existing array by an empty one. Raises `BankError` if the array is
    missing, does not fit the manifest, or cannot be created.
    """
    shape = list(manifest["shape"])
    item, shard = [1, *shape[1:]], [manifest["shard_memories"], *shape[1:]]
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": item, "codecs": codecs, "index_codecs": codecs}
    spec = {
        "driver": "zarr3",
        "kvstore": (store(folder) / ARRAY).spec().to_json(),
        "metadata": {
            "shape": shape,
            "data_type": manifest["dtype"],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
        "fill_missing_data_reads": False,  # otherwise a missing shard would silently read as zeros
        "store_data_equal_to_fill_value": True,  # otherwise a memory of zeros would not be stored
        "recheck_cached_data": False,  # a finished bank does not change
    }
    try:
        return ts.open(
            spec, open=not create, create=create, delete_existing=create, context=_context()
        ).result()
    except ValueError as error:
        if create and "ALREADY_EXISTS" in str(error):  # its own: a bucket's answer was lost
            return open_array(folder, manifest)
        if create and is_bucket(folder):
            raise unreachable(f"{folder}/{ARRAY}zarr.json", error) from error
        if create:
            raise BankError(f"{folder}/{ARRAY}zarr.json could not be written: {error}") from error
        raise_if_machine(error)
        raise BankError(
            f"{folder}/{ARRAY}zarr.json is missing or does not fit {MANIFEST}"
            f" ({reason_of(error)}); {replaced(folder)}"
        ) from error


def shards_of(manifest: dict[str, Any]) -> int:
    """Returns the number of shards."""
    return -(-manifest["shape"][0] // manifest["shard_memories"])


def shard_span(manifest: dict[str, Any], shard: int) -> tuple[int, int]:
    """Returns the range low, high of a shard's memories; high is exclusive."""
    low = shard * manifest["shard_memories"]
    return low, min(low + manifest["shard_memories"], manifest["shape"][0])


def memory_bytes(manifest: dict[str, Any]) -> int:
    """Returns the size of one memory's stored keys and values in bytes."""
    return math.prod(manifest["shape"][1:]) * jnp.dtype(manifest["dtype"]).itemsize


def shard_key(shard: int) -> str:
    """Returns the path of a shard file, relative to the bank."""
    return f"{ARRAY}c/{shard}/0/0/0/0/0"


def write_file(folder: str | Path, name: str, data: bytes) -> None:
    """Writes a file of the bank atomically; raises `BankError` or `StoreError` if that fails."""
    with _changing(folder, name, "written"):
        store(folder).write(name, data).result()


def delete_file(folder: str | Path, name: str) -> None:
    """Deletes a file of the bank, if it exists; raises as `write_file`."""
    with _changing(folder, name, "deleted"):
        store(folder).write(name, None).result()


@contextlib.contextmanager
def _changing(folder: str | Path, name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if is_bucket(folder):
            raise unreachable(f"{folder}/{name}", error) from error
        raise BankError(f"{folder}/{name} could not be {what}: {error}") from error


def link_file(source: str | Path, folder: str | Path, name: str) -> None:
    """Gives a file of the bank `source` a second name in `folder`, where the file system can."""
    target = Path(folder) / name
    if is_url(source) or is_url(folder) or target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        os.link(Path(source) / name, target)


def missing_shards(folder: str | Path, manifest: dict[str, Any]) -> list[int]:
    """Lists the numbers of shards that have no file."""
    with _changing(folder, ARRAY, "listed"):
        there = {bytes(key).decode() for key in store(folder).list().result()}
    shards = range(shards_of(manifest))
    return [shard for shard in shards if shard_key(shard) not in there]


def remove_locks(folder: str | Path) -> None:
    """Deletes the temporary files of killed or failed writes from a local bank."""
    if not is_url(folder):
        for leftover in Path(folder).rglob("*__lock"):
            leftover.unlink(missing_ok=True)


def free_bytes(folder: str | Path) -> int | None:
    """Returns the free bytes of the bank's disk; None for a URL."""
    return None if is_url(folder) else shutil.disk_usage(folder).free
