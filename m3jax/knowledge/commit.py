"""Folder in which an edit is built, and the rename that makes a version of it.

Before it, readers and other versions see nothing of the edit; after it, it is whole. A killed edit,
repeated, goes on with what it had built.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3jax.errors import VersionError
from m3jax.files import checksum, digest, sync_folder, write_array, write_atomically, write_sealed
from m3jax.knowledge.versions import (
    BANKS,
    TOMBSTONES,
    VERSION,
    VERSIONS,
    Version,
    folder_of,
    open_index,
    open_version,
    read_current,
    versions,
    write_current,
)
from m3jax.memory.bank import Bank
from m3jax.retrieval.build import build_index
from m3jax.text.references import ReferenceReader, References

# Writes the memories of references: (references, folder, a bank whose codebooks and memories serve)
WriteMemories = Callable[[References, Path, Bank], Any]


def building_folder(workdir: Path, parent: Version, what: str) -> Path:
    """Makes the folder of the edit under way; what another edit left there is deleted."""
    folder = workdir / VERSIONS / "building"
    identity = digest(str(parent.number), what)
    path = folder / "edit"
    if not path.exists() or path.read_text("utf-8") != identity:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(path, identity.encode())
    return folder


def build_delta(
    config: ConfigDict,
    parent: Version,
    building: Path,
    references: ReferenceReader,
    write: WriteMemories | None,
    base: Any = None,
) -> None:
    """Builds index and memories of the references in `building`."""
    added = References.open(building / "references")
    embedder = open_index(parent, references).embedder.extended(added.texts(range(len(added))))
    build_index(added, embedder, building / "index", in_one_part(config))
    if parent.has_bank:
        if write is None:
            raise VersionError("the workdir has a bank; an edit needs a writer of memories")
        write(added, building / "bank", base or Bank.open(parent.banks[0]))


def in_one_part(config: ConfigDict) -> ConfigDict:
    """Returns the config with one index part: a delta may have fewer references than parts."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.retrieval.index_parts = 1
    return config


def commit_version(
    workdir: Path,
    parent: Version,
    building: Path,
    note: str,
    gone: Sequence[int] | np.ndarray = (),
    *,
    alone: bool = False,
) -> Version:
    """Names the version in the folder `building`, made of `parent`, makes it current and opens it.

    The ids `gone` become tombstones. With `alone` it is a base of its own and has no other.
    """
    number = max([*versions(workdir), parent.number]) + 1
    own = folder_of(workdir, number).relative_to(workdir)
    parts = [] if alone else [0 if path == workdir else int(path.name) for path in parent.folders]
    banks = [] if alone else [str(path.relative_to(workdir)) for path in parent.banks]
    removed = np.asarray(gone, np.int64)
    tombstones = removed if alone else np.union1d(parent.tombstones, removed)
    if (building / "references").exists():
        parts, banks = [*parts, number], [*banks, str(own / "bank")]
    if (building / BANKS).exists():
        banks = [str(own / BANKS / str(part)) for part in range(len(parts))]
    write_array(building / TOMBSTONES, tombstones)
    content = {
        "version": number,
        "parent": parent.number,
        "base": parts[0],
        "deltas": parts[1:],
        "banks": banks,
        "tombstones": checksum(building / TOMBSTONES),
        "oldest": number if alone else read_current(workdir)["oldest"],
        "note": note,
    }
    write_sealed(building / VERSION, content)
    (building / "edit").unlink()
    os.replace(building, folder_of(workdir, number))
    sync_folder(workdir / VERSIONS)
    write_current(workdir, number, read_current(workdir)["oldest"])
    return open_version(workdir, number)
