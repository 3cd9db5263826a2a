"""Folders of checkpoints, local or in a bucket, as Orbax reads and writes them.

A local checkpoint gets its name `…/<step>` by a rename when it is whole. Buckets have no renames:
there Orbax writes to the final name, and `commit_success.txt` last.

| environment | meaning |
|---|---|
| `STORAGE_EMULATOR_HOST` | another server than Google's, for gcsfs and Google's own client |
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from etils import epath

from m3jax.errors import StoreError
from m3jax.mirror import Mirror
from m3jax.private_apis import limit_checkpoint_retries
from m3jax.store import RETRIES, Store, is_bucket, limit_silence, unreachable

_DEPTH = 3  # folders from a checkpoint, STAGE/checkpoints/STEP, up to its workdir
_SILENCE = 15  # seconds without an answer after which gcsfs asks again, six times
COMMITTED = "commit_success.txt"  # of a whole checkpoint in a bucket
# Of buckets, `epath` names folders, and Orbax reads by it; nothing else does: it lists with a
# cache.
Folder: TypeAlias = Path | epath.Path
# Packages whose exceptions say that a bucket cannot be reached.
_CLIENTS = ("aiohttp", "gcsfs", "google", "requests")
# In the texts of TensorStore, whose exceptions are all `ValueError`.
_LASTING = ("ABORTED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE")


def to_folder(path: str | os.PathLike[str]) -> Folder:
    """Returns the absolute path of a local folder, or that of one in a bucket, gs://….

    A folder of a mirror (`m3jax.mirror`) becomes that of the bucket, where the checkpoints are.

    Raises `StoreError` for a bucket if gcsfs is not installed, without which Orbax reaches none.
    """
    url = os.fspath(path)
    if not is_bucket(url):
        local = Path(path).absolute()
        mirror = next((m for m in map(Mirror.of, local.parents[:_DEPTH]) if m.in_bucket), None)
        if mirror is None:
            return local
        url = str(mirror.url(local.relative_to(mirror.local).as_posix()))
    _reach_buckets()
    return epath.Path(url.rstrip("/"))


def named_checkpoint(
    checkpoint: str | os.PathLike[str] | None, workdir: str | os.PathLike[str], stage: str
) -> Folder:
    """Returns the folder that `--checkpoint` names; default that of a stage of the workdir."""
    named = checkpoint or Mirror.of(workdir).url(stage)
    return to_folder(named) if is_bucket(named) else Path(named)


@functools.cache
def _reach_buckets() -> None:
    """Sets up the libraries of Orbax, before the first request to a bucket."""
    if importlib.util.find_spec("gcsfs") is None:
        raise StoreError("checkpoints in a bucket (gs://…) need gcsfs: pip install -e '.[gcs]'")
    import aiohttp
    import fsspec

    limit_silence()
    limit_checkpoint_retries(RETRIES)
    # Else it asks a server of gRPC for the kind of a bucket.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    options = fsspec.config.conf.setdefault("gcs", {})
    options.setdefault("use_listings_cache", False)  # which hides what other processes write
    options.setdefault("requests_timeout", aiohttp.ClientTimeout(total=None, sock_read=_SILENCE))
    for name in ("gcsfs", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log what they raise


def steps_in(folder: Folder) -> list[int]:
    """Lists the steps of whole checkpoints in a folder, ascending."""
    if is_bucket(folder):
        names = (name.split("/") for name in Store(folder).names())
        steps = [path[0] for path in names if path[1:] == [COMMITTED]]
    else:
        steps = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(step) for step in steps if step.isdigit())


def delete_step(folder: Folder, step: int) -> None:
    """Deletes a checkpoint in a bucket, so that a kill leaves none that looks whole."""
    Store(folder).delete_under(f"{step}/", first=[f"{step}/{COMMITTED}"])


@contextlib.contextmanager
def reaching(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turns errors in the block that say that a bucket cannot be reached into a `StoreError`."""
    try:
        yield
    except Exception as error:
        if is_bucket(folder):
            for cause in _causes(error):
                if _is_of_client(cause):
                    raise unreachable(os.fspath(folder), cause) from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_of_client(error: BaseException) -> bool:
    package = type(error).__module__.partition(".")[0]
    if isinstance(error, ValueError):
        return any(word in str(error) for word in _LASTING)
    # gcsfs raises bare ones for 403, and `FileNotFoundError` for 404.
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return package in _CLIENTS or error.errno is None
    return package in _CLIENTS
