"""Edits of a workdir's knowledge: each makes a version, or nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3jax.errors import VersionError
from m3jax.knowledge.commit import WriteMemories, build_delta, building_folder, commit_version
from m3jax.knowledge.versions import (
    BANKS,
    CURRENT,
    VERSIONS,
    Version,
    editing,
    only_writer,
    open_bank,
    open_references,
    open_version,
    read_current,
    recorded_oldest,
    versions,
    write_current,
)
from m3jax.memory.bank import Bank
from m3jax.memory.codec import same
from m3jax.text.documents import Document
from m3jax.text.references import (
    ReferenceReader,
    References,
    copy_references,
    write_references,
)
from m3jax.text.tokenizer import Tokenizer


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
        said = f"{len(documents)} documents added or replaced, {len(gone)} references removed"
        return commit_version(workdir, parent, building, note or said, gone)


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
      BankError: the other bank was written by other weights.
    """
    workdir, other = Path(workdir), Path(other)
    with editing(workdir) as parent:
        theirs = open_version(other)
        tokenizer = Tokenizer.load(workdir / "tokenizer")
        references = open_references(config, parent, tokenizer)
        added = open_references(config, theirs, tokenizer)
        base = open_bank(theirs, added)
        _check_writer(parent, base)
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
            added = References.open(folder / "references")
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


def _ids_of(references: ReferenceReader, name: str) -> list[int]:
    """Returns the ids of a key, or of all references of a document."""
    id_ = references.lookup(name)
    ids = references.of_document(name) if id_ is None else [id_]
    if not ids:
        raise VersionError(
            f"no reference in use has the key {name!r}, nor is it a document's id; keys are"
            " DOCUMENT#N"
        )
    return ids


def _check_writer(parent: Version, base: Any) -> None:
    bank = Bank.open(parent.banks[0])
    first = bank.binding
    base.require(type(first)(first.writer, first.tokenizer, base.binding.references, first.layout))
    if not same(bank.codec, base.codec):
        raise VersionError(
            f"the banks {bank.folder} ({bank.codec.name}) and {base.folder} ({base.codec.name}) are"
            " stored differently; write the other one with --base of the first, then merge"
        )
