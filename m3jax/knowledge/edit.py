"""Edits of a workdir's knowledge: each makes a version, or nothing.

An edit is built in a folder, which a rename makes a version. Before it, readers and other versions
see nothing of the edit; after it, it is whole. A killed edit, repeated, goes on with what it had
built.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3jax.errors import VersionError
from m3jax.files import checksum, digest, sync_folder, write_array, write_sealed
from m3jax.knowledge.versions import (
    BANKS,
    CURRENT,
    TOMBSTONES,
    VERSION,
    VERSIONS,
    Version,
    editing,
    folder_of,
    only_writer,
    open_bank,
    open_index,
    open_references,
    open_version,
    read_current,
    recorded_oldest,
    versions,
    write_current,
)
from m3jax.memory.bank import Bank, require_alike
from m3jax.retrieval.build import build_index
from m3jax.text.documents import Document
from m3jax.text.references import References, copy_references, write_references
from m3jax.text.tokenizer import Tokenizer
from m3jax.workdir import BEGUN, begin_part

# Writes the memories of references: (references, folder, a bank whose codebooks and memories serve)
WriteMemories = Callable[[References, Path, Bank], Any]


def edit(
    config: ConfigDict,
    workdir: str | Path,
    *,
    documents: Iterable[Document] = (),
    replace: bool = False,
    delete: Sequence[str] = (),
    write: WriteMemories | None = None,
    note: str = "",
) -> Version:
    """Adds, replaces and deletes references, and makes the result the current version.

    Args:
      config, workdir: a validated config and a prepared workdir.
      documents: to add; cut into references like those of `launch/prepare.py`.
      replace: documents may be there; their references are then removed.
      delete: keys of references (`id#n`), or ids of documents, to remove.
      write: writes the memories of what is added; needed where the workdir has a bank.
      note: kept with the version; default: counts.

    Raises:
      VersionError: nothing to do, a document that is there or a key that is not, another editor.
      TextError, RetrievalError, BankError, OSError: as their makers raise them; the last version is
        untouched.
    """
    workdir, documents, delete = Path(workdir), list(documents), list(delete)
    with editing(workdir) as parent:
        tokenizer = Tokenizer.load(workdir / "tokenizer")
        references = open_references(config, parent, tokenizer)
        removed = [_ids_of(references, name) for name in delete]
        for document in documents:
            present = references.of_document(document.id)
            if present and not replace:
                raise VersionError(
                    f"document {document.id!r} is in {workdir} (version {parent.number}); replace"
                    " it (launch/edit_bank.py replace), or give another id"
                )
            removed.append(present)
        gone = sorted({i for part in removed for i in part})
        if not documents and not gone:
            raise VersionError("nothing to edit: give documents, or keys to delete")
        texts = [[d.id, d.title, d.source, d.text] for d in documents]
        building = building_folder(workdir, parent, json.dumps([texts, delete, replace]))
        if documents:
            length = config.memory.reference_length
            write_references(documents, tokenizer, building / "references", length)
            build_delta(config, parent, building, references, write)
        summary = f"{len(documents)} documents added or replaced, {len(gone)} references removed"
        return commit_version(workdir, parent, building, note or summary, gone)


def merge(
    config: ConfigDict,
    workdir: str | Path,
    other: str | Path,
    *,
    write: WriteMemories,
    replace: bool = False,
) -> Version:
    """Adds the current knowledge of another workdir; its memories are copied, not encoded.

    Raises:
      VersionError: a document is in both, and `replace` is not given.
      BankError: the other bank was written by other weights, or is stored differently.
    """
    workdir, other = Path(workdir), Path(other)
    with editing(workdir) as parent:
        theirs = open_version(other)
        tokenizer = Tokenizer.load(workdir / "tokenizer")
        references = open_references(config, parent, tokenizer)
        added = open_references(config, theirs, tokenizer)
        base = open_bank(theirs, added)
        require_alike(base, Bank.open(parent.banks[0]))
        ids = dict.fromkeys(key.rpartition("#")[0] for key in added.live_keys())
        common = {i: own for i in ids if (own := references.of_document(i))}
        if common and not replace:
            raise VersionError(
                f"{len(common)} documents are in both {workdir} and {other}, for example"
                f" {next(iter(common))!r}; --replace takes those of {other}"
            )
        gone = sorted(i for own in common.values() for i in own)
        building = building_folder(workdir, parent, json.dumps(["merge", added.fingerprint, gone]))
        copy_references(added, added.live, building / "references")
        build_delta(config, parent, building, references, write, base)
        return commit_version(workdir, parent, building, f"merged with {other}", gone)


def keep_only(config: ConfigDict, version: Version, ids: np.ndarray, *, note: str) -> Version:
    """Removes all references but those with `ids`, and makes the result the current version.

    `version` is the one that the ids are of, and must be current. Returns the new version; the same
    one where nothing is removed.

    Raises:
      VersionError: the knowledge was edited meanwhile, or another editor.
    """
    workdir = version.workdir
    with editing(workdir) as parent:
        if parent.number != version.number:
            raise VersionError(
                f"{workdir} was edited meanwhile (version {parent.number}, was {version.number});"
                " select again"
            )
        references = open_references(config, parent, Tokenizer.load(workdir / "tokenizer"))
        live = references.live
        gone = np.setdiff1d(live, ids)
        if not gone.size or gone.size == live.size:
            return parent
        building = building_folder(workdir, parent, json.dumps(["keep", gone.tolist()]))
        return commit_version(workdir, parent, building, note, gone)


def refresh(workdir: str | Path, what: str, *, write: WriteMemories, note: str) -> Version:
    """Writes the memories of the current version anew, as another version; ids and index stay.

    `what` tells this refresh from others: a killed one goes on when repeated. `write` writes the
    new bank of base or delta; its third argument is the old one.

    Raises:
      VersionError: there is no bank, or another editor.
    """
    workdir = Path(workdir)
    with editing(workdir) as parent:
        if not parent.has_bank:
            raise VersionError(
                f"{workdir} has no bank to refresh; write one with launch/write_bank.py"
            )
        building = building_folder(workdir, parent, json.dumps(["refresh", what]))
        for part, (folder, bank) in enumerate(zip(parent.folders, parent.banks, strict=True)):
            added = References(folder / "references")
            write(added, building / BANKS / str(part), Bank.open(bank))
        return commit_version(workdir, parent, building, note)


def rollback(workdir: str | Path, number: int) -> Version:
    """Makes the version `number` the current one."""
    workdir = Path(workdir)
    with only_writer(workdir):
        try:
            oldest = read_current(workdir)["oldest"]
        except VersionError:  # current.json is damaged
            oldest = recorded_oldest(workdir)
            (workdir / VERSIONS / CURRENT).unlink()
            write_current(workdir, max(versions(workdir)), oldest)
        version = open_version(workdir, number)
        write_current(workdir, version.number, oldest)
        return version


def _ids_of(references: References, name: str) -> list[int]:
    """Returns the ids of a key, or of all references of a document."""
    id_ = references.lookup(name)
    ids = references.of_document(name) if id_ is None else [id_]
    if not ids:
        raise VersionError(
            f"no reference in use has the key {name!r}, nor is it a document's id; keys are"
            " DOCUMENT#N"
        )
    return ids


def building_folder(workdir: Path, parent: Version, what: str) -> Path:
    """Makes the folder of the edit under way; what another edit left there is deleted."""
    folder = workdir / VERSIONS / "building"
    begin_part(folder, {"parent": parent.number, "edit": digest(what)})
    return folder


def build_delta(
    config: ConfigDict,
    parent: Version,
    building: Path,
    references: References,
    write: WriteMemories | None,
    base: Any = None,
) -> None:
    """Builds index and memories of the references in `building`."""
    added = References(building / "references")
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
    (building / BEGUN).unlink()
    os.replace(building, folder_of(workdir, number))
    sync_folder(workdir / VERSIONS)
    write_current(workdir, number, read_current(workdir)["oldest"])
    return open_version(workdir, number)
