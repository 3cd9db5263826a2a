"""Edits of a workdir's knowledge: each makes a version, or nothing.

An edit is built in `versions/building/` and gets its name by one rename; before that, readers and
other versions do not see it, and after it, it is whole. A killed edit, repeated, goes on with what
it had built.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3jax.data.embedders import load_embedder, make_embedder
from m3jax.data.knowledge import (
    REMOVED,
    VERSION,
    VERSIONS,
    Version,
    VersionError,
    folder_of,
    in_use,
    only_writer,
    open_bank,
    open_index,
    open_references,
    open_version,
    read_current,
    versions,
    write_current,
)
from m3jax.layers import Numbering
from m3jax.memory.bank import Bank
from m3jax.memory.codec import same
from m3jax.retrieval.embed import Embedder
from m3jax.retrieval.index import build_index
from m3jax.text.documents import Document
from m3jax.text.files import checksum, digest, sync_folder, write_atomically, write_sealed
from m3jax.text.layers import AnyReferences, LayeredReferences
from m3jax.text.references import References, copy_references, write_references
from m3jax.text.tokenizer import Tokenizer

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
      config: a validated config.
      workdir: a prepared workdir.
      documents: to add; cut into references like those of `launch/prepare.py`.
      replace: documents may be there; their references are then removed.
      delete: keys of references (`id#n`), or ids of documents, to remove.
      write: writes the memories of what is added; needed where the workdir has a bank.
      note: kept with the version; default: counts.

    Returns:
      The new version.

    Raises:
      VersionError: nothing to do, a document that is there or a key that is not, another editor.
      TextError, RetrievalError, BankError, OSError: as their makers raise them; the last version
        is untouched.
    """
    workdir, documents, delete = Path(workdir), list(documents), list(delete)
    with only_writer(workdir):
        parent = open_version(workdir)
        tokenizer = Tokenizer.load(workdir / "tokenizer")
        references = open_references(config, parent, tokenizer)
        removed = [_found(references, name) for name in delete]
        for document in documents:
            there = _of_document(references, document.id)
            if there and not replace:
                raise VersionError(
                    f"document {document.id!r} is in {workdir} (version {parent.number}); replace"
                    " it (launch/edit_bank.py replace), or give another id"
                )
            removed.append(there)
        gone = np.array(sorted({i for part in removed for i in part}), np.int64)
        if not documents and not gone.size:
            raise VersionError("nothing to edit: give documents, or keys to delete")
        texts = [[d.id, d.title, d.source, d.text] for d in documents]
        building = _building(workdir, parent, json.dumps([texts, delete, replace]))
        if documents:
            length = config.memory.reference_length
            write_references(documents, tokenizer, building / "references", length)
            _add_layer(config, parent, building, references, write)
        said = f"{len(documents)} documents added or replaced, {gone.size} references removed"
        return _commit(workdir, parent, building, gone, bool(documents), note or said)


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
    with only_writer(workdir):
        parent, theirs = open_version(workdir), open_version(other)
        tokenizer = Tokenizer.load(workdir / "tokenizer")
        references = open_references(config, parent, tokenizer)
        added = open_references(config, theirs, tokenizer)
        base = open_bank(theirs, added)
        _check_writer(parent, base)
        keys = added.keys
        ids = list(dict.fromkeys(_document(key) for key in keys))
        there = {i: found for i in ids if (found := _of_document(references, i))}
        if there and not replace:
            raise VersionError(
                f"{len(there)} documents are in both {workdir} and {other}, for example"
                f" {next(iter(there))!r}; --replace takes those of {other}"
            )
        gone = np.array(sorted(i for found in there.values() for i in found), np.int64)
        what = json.dumps(["merge", added.fingerprint, gone.tolist()])
        building = _building(workdir, parent, what)
        copy_references(added, _live(added), building / "references")
        _add_layer(config, parent, building, references, write, base)
        return _commit(workdir, parent, building, gone, True, f"merged with {other}")


def rollback(workdir: str | Path, number: int) -> Version:
    """Makes an older (or newer) version the current one."""
    workdir = Path(workdir)
    with only_writer(workdir):
        try:
            oldest = read_current(workdir)["oldest"]
        except VersionError:  # current.json is damaged: what can be opened decides
            oldest = 0
            (workdir / VERSIONS / "current.json").unlink()
        version = open_version(workdir, number)
        write_current(workdir, version.number, oldest)
        return version


def collect(
    config: ConfigDict, workdir: str | Path, *, write: WriteMemories, note: str = ""
) -> tuple[Version, list[str]]:
    """Writes the current version as one layer, without what was removed, and deletes all others.

    Returns:
      The new version, in which ids are new, and folders that stay until the next collection because
      another process reads them.

    Raises:
      As `edit`; older versions are deleted only when the new one is current.
    """
    workdir = Path(workdir)
    with only_writer(workdir):
        parent = open_version(workdir)
        single = len(parent.layers) == 1 and not parent.removed.size
        if not single:
            tokenizer = Tokenizer.load(workdir / "tokenizer")
            references = open_references(config, parent, tokenizer)
            if not len(_live(references)):
                raise VersionError(f"nothing is left in version {parent.number} of {workdir}")
            building = _building(workdir, parent, json.dumps(["collect", references.fingerprint]))
            copy_references(references, _live(references), building / "references")
            whole = References.open(building / "references")
            build_index(whole, make_embedder(config, workdir), building / "index", config)
            if _has_bank(parent):
                write(whole, building / "bank", open_bank(parent, references))
            said = f"collected {len(whole)} references of {len(parent.layers)} layers"
            parent.close()
            parent = _commit(workdir, parent, building, None, True, note or said)
        write_current(workdir, parent.number, parent.number)
        parent.close()
        return parent, _delete_older(workdir, parent)


def verify(config: ConfigDict, workdir: str | Path, number: int | None = None) -> list[str]:
    """Reads everything of a version; returns what is damaged or missing, each with its file."""
    version = open_version(workdir, number)
    tokenizer = Tokenizer.load(Path(workdir) / "tokenizer")
    problems = []
    references: AnyReferences | None = None
    try:
        references = open_references(config, version, tokenizer)
        for layer in getattr(references, "layers", [references]):
            layer.verify()
    except ValueError as error:
        problems.append(str(error))
    if references is None:
        return problems
    for opened in (open_index, open_bank):
        if opened is open_bank and not _has_bank(version):
            continue
        try:
            found = opened(version, references)
            problems += found.verify() if opened is open_bank else []
        except ValueError as error:
            problems.append(str(error))
    return problems


def repair(
    config: ConfigDict, workdir: str | Path, *, write: WriteMemories, number: int | None = None
) -> list[str]:
    """Rewrites damaged or missing shards and indices of a version; returns what it rewrote.

    Raises:
      TextError: references are damaged: they are the source of all else.
    """
    version = open_version(workdir, number)
    tokenizer = Tokenizer.load(Path(workdir) / "tokenizer")
    done = []
    with only_writer(Path(workdir)):
        for folder in version.layers:
            references = References.open(folder / "references")
            references.verify()
            try:
                open_index(_alone(version, folder), references)
            except ValueError as error:
                embedder = _embedder(config, version, folder, references)
                build_index(references, embedder, folder / "index", _in_one_part(config))
                done.append(str(error))
            bank = folder / "bank"
            if not (bank / "manifest.json").exists():
                continue
            broken = Bank.open(bank).damaged_shards()
            for path, problem in broken:
                (bank / path).unlink(missing_ok=True)
                done.append(problem)
            if broken:
                write(references, bank, Bank.open(version.layers[0] / "bank"))
    open_references(config, version, tokenizer)
    return done


def _alone(version: Version, folder: Path) -> Version:
    return Version(version.workdir, 0, -1, "", (folder,), np.zeros(0, np.int64))


def _embedder(
    config: ConfigDict, version: Version, folder: Path, references: References
) -> Embedder:
    """The embedder of a layer; where it is lost, that of another which knows these texts, too."""
    for layer in (folder, *version.layers):
        try:
            found = load_embedder(layer / "index" / "embedder")
        except ValueError:
            continue
        own = layer == folder
        return found if own else found.extended(references.texts(range(len(references))))
    return make_embedder(config, version.workdir)


def _document(key: str) -> str:
    return key.rpartition("#")[0]


def _live(references: AnyReferences) -> np.ndarray:
    if isinstance(references, LayeredReferences):
        return references.numbering.live
    return np.arange(len(references))


def _found(references: AnyReferences, name: str) -> list[int]:
    """Ids of a key, or of all references of a document."""
    one = references.lookup(name)
    found = [one] if one is not None else _of_document(references, name)
    if not found:
        raise VersionError(
            f"no reference in use has the key {name!r}, nor is it a document's id; keys are"
            " DOCUMENT#N"
        )
    return found


def _of_document(references: AnyReferences, document: str) -> list[int]:
    """Ids in use of a document's references, whose keys count from 0 in every layer."""
    if isinstance(references, References):
        numbering = Numbering([len(references)], np.zeros(0, np.int64))
        layers = [references]
    else:
        numbering, layers = references.numbering, references.layers
    found = []
    for number, layer in enumerate(layers):
        n = 0
        while (row := layer.lookup(f"{document}#{n}")) is not None:
            found.append(numbering.first(number) + row)
            n += 1
    return [i for i in found if not numbering.is_removed(np.array(i))]


def _has_bank(version: Version) -> bool:
    return (version.layers[0] / "bank" / "manifest.json").exists()


def _check_writer(parent: Version, base: Any) -> None:
    bank = Bank.open(parent.layers[0] / "bank")
    first = bank.binding
    base.require(type(first)(first.writer, first.tokenizer, base.binding.references, first.layout))
    if not same(bank.codec, base.codec):
        raise VersionError(
            f"the banks {bank.folder} ({bank.codec.name}) and {base.folder} ({base.codec.name}) are"
            " stored differently; write the other one with --base of the first, then merge"
        )


def _building(workdir: Path, parent: Version, what: str) -> Path:
    """The folder of the edit under way; what another edit left there is deleted."""
    folder = workdir / VERSIONS / "building"
    identity = digest(str(parent.number), what)
    path = folder / "edit"
    if not path.exists() or path.read_text("utf-8") != identity:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(path, identity.encode())
    return folder


def _add_layer(
    config: ConfigDict,
    parent: Version,
    building: Path,
    references: AnyReferences,
    write: WriteMemories | None,
    base: Any = None,
) -> None:
    """Index and memories of the references in `building`."""
    added = References.open(building / "references")
    embedder = open_index(parent, references).embedder.extended(added.texts(range(len(added))))
    build_index(added, embedder, building / "index", _in_one_part(config))
    if _has_bank(parent):
        if write is None:
            raise VersionError("the workdir has a bank; an edit needs a writer of memories")
        write(added, building / "bank", base or Bank.open(parent.layers[0] / "bank"))


def _in_one_part(config: ConfigDict) -> ConfigDict:
    """A layer may have fewer references than the index has parts."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.retrieval.index_parts = 1
    return config


def _commit(
    workdir: Path,
    parent: Version,
    building: Path,
    gone: np.ndarray | None,
    layer: bool,
    note: str,
) -> Version:
    """Names the built version and makes it current. `gone` None: it reads its own layer alone."""
    number = max([*versions(workdir), parent.number]) + 1
    layers = [0 if path == workdir else int(path.name) for path in parent.layers]
    removed = np.union1d(parent.removed, gone) if gone is not None else np.zeros(0, np.int64)
    if gone is None:
        layers = []
    buffer = io.BytesIO()
    np.save(buffer, removed.astype(np.int64))
    write_atomically(building / REMOVED, buffer.getvalue())
    content = {
        "version": number,
        "parent": parent.number,
        "layers": [*layers, number] if layer else layers,
        "removed": checksum(building / REMOVED),
        "note": note,
    }
    write_sealed(building / VERSION, content)
    (building / "edit").unlink()
    os.replace(building, folder_of(workdir, number))
    sync_folder(workdir / VERSIONS)
    write_current(workdir, number, read_current(workdir)["oldest"])
    return open_version(workdir, number)


def _delete_older(workdir: Path, kept: Version) -> list[str]:
    """Deletes layers and versions before `kept`; returns folders that other processes read."""
    busy = []
    older = [
        path
        for path in sorted((workdir / VERSIONS).glob("[0-9]*"))
        if path.is_dir() and int(path.name) != kept.number
    ]
    folders = [] if workdir in kept.layers else [workdir]
    for folder in [*folders, *(path for path in older if path not in kept.layers)]:
        if in_use(folder):
            busy.append(str(folder))
            continue
        (folder / VERSION).unlink(missing_ok=True)  # from here on it cannot be opened
        for part in ("index", "bank", "references"):
            shutil.rmtree(folder / part, ignore_errors=True)
        if folder != workdir:
            shutil.rmtree(folder, ignore_errors=True)
    return busy
