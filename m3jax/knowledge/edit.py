"""Atomic edits of a workdir's knowledge; each edit makes a new version.

An edit is built in a temporary folder, and renaming that folder makes it a version. Until then,
readers see nothing of the edit; afterwards it is complete. A killed edit, when repeated, resumes
with the files that it had built.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3jax.errors import VersionError
from m3jax.files import checksum, digest, json_text, sync_folder, write_array, write_sealed
from m3jax.knowledge.current import (
    CURRENT,
    VERSION,
    data_of,
    folder_of,
    made_versions,
    read_current,
    recorded_oldest,
    swap,
    write_current,
)
from m3jax.knowledge.versions import (
    BANKS,
    BUILDING,
    TOMBSTONES,
    VERSIONS,
    Version,
    editing,
    existing,
    fetch_versions,
    forget_begun,
    name_of,
    open_bank,
    open_index,
    open_references,
    open_version,
    versions,
)
from m3jax.memory.bank import Bank, require_alike
from m3jax.mirror import Mirror
from m3jax.retrieval.build import build_index
from m3jax.text.documents import Document, with_unique_ids
from m3jax.text.references import References, copy_references, write_references
from m3jax.text.tokenizer import Tokenizer
from m3jax.workdir import BEGUN, begin_part, content_id, is_begun

KEEP = "keep"  # the kind of an edit by `keep_only`

# Writes a bank: (references, folder or URL, base bank for codebooks and memories to copy, if any).
WriteMemories = Callable[[References, Path | str, Any], Any]


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
      documents: documents to add; split into references as in `launch/prepare.py`.
      replace: accept documents whose ids exist; their old references are removed.
      delete: keys of references (`id#n`) or ids of documents to remove.
      write: writes the memories of added references; required if the workdir has a bank.
      note: description stored with the version; default: the counts.

    Raises:
      VersionError: there is nothing to do; a document exists and `replace` is False; a key or
        document to delete does not exist; `write` is missing; there is no workdir, or its current
        version is damaged.
      LockError: another process is writing the workdir.
      TextError, RetrievalError, BankError, OSError: references, index or bank cannot be read or
        written; the current version is unchanged.
    """
    workdir, delete = Path(workdir), list(delete)
    documents = list(with_unique_ids(documents, lambda document: document))
    texts = [[d.id, d.title, d.source, d.text] for d in documents]
    what = ["edit", texts, delete, replace]
    with editing(workdir) as parent:
        if is_made(parent, what):
            return parent
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
        building = building_folder(workdir, parent, what)
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
    """Adds the current knowledge of the workdir `other`; its memories are copied, not encoded.

    With `replace`, documents that are in both workdirs are replaced by those of `other`.

    Raises:
      VersionError: a document is in both and `replace` is False; a workdir is missing, or its
        current version is damaged.
      LockError: another process is writing the workdir.
      BankError: the other bank has another writer, tokenizer, layout or codec; a bank is missing or
        cannot be read or written.
      TextError, RetrievalError: references or index cannot be read or written.
    """
    workdir, other = Path(workdir), Path(other)
    with editing(workdir) as parent:
        theirs = open_version(other)
        tokenizer = Tokenizer.load(workdir / "tokenizer")
        references = open_references(config, parent, tokenizer)
        added = open_references(config, theirs, tokenizer)
        what = ["merge", added.fingerprint, replace]
        if is_made(parent, what):
            return parent
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
        building = building_folder(workdir, parent, what)
        copy_references(added, added.live, building / "references")
        build_delta(config, parent, building, references, write, base)
        return commit_version(workdir, parent, building, f"merged with {other}", gone)


def keep_only(config: ConfigDict, version: Version, ids: np.ndarray, *, note: str) -> Version:
    """Removes all references except those with `ids`, and makes the result the current version.

    `version` is the version in which the ids were chosen, and must be the current one. Returns the
    new version, or the current one if `ids` cover all of its references or none.

    Raises:
      VersionError: `version` is no longer current.
      LockError: another process is writing the workdir.
      TextError: the references cannot be read.
    """
    workdir = version.workdir
    what = [KEEP, version.number, np.asarray(ids).tolist()]
    with editing(workdir) as parent:
        if is_made(parent, what):
            return parent
        if parent.number != version.number:
            forget_begun(workdir)  # so that it is selected from the current version
            raise VersionError(
                f"{workdir} was edited meanwhile (version {parent.number}, was {version.number});"
                " select again"
            )
        references = open_references(config, parent, Tokenizer.load(workdir / "tokenizer"))
        live = references.live
        gone = np.setdiff1d(live, ids)
        if not gone.size or gone.size == live.size:
            return parent
        building = building_folder(workdir, parent, what)
        return commit_version(workdir, parent, building, note, gone)


def refresh(workdir: str | Path, what: str, *, write: WriteMemories, note: str) -> Version:
    """Rewrites all memories of the current version as a new version; ids and index stay the same.

    `what` identifies this refresh: a killed refresh resumes if it is repeated with the same string.
    `write` is called for the base and each delta; its third argument is their old bank.

    Raises:
      VersionError: there is no bank.
      LockError: another process is writing the workdir.
      BankError: an old bank cannot be read, or a new one cannot be written.
    """
    workdir, identity = Path(workdir), ["refresh", what]
    with editing(workdir) as parent:
        if is_made(parent, identity):
            return parent
        if not parent.has_bank:
            raise VersionError(
                f"{workdir} has no bank to refresh; write one with launch/write_bank.py"
            )
        building = building_folder(workdir, parent, identity)
        for part, (folder, bank) in enumerate(zip(parent.folders, parent.banks, strict=True)):
            added = References(folder / "references")
            write(added, bank_of_edit(parent, building, f"{BANKS}/{part}"), Bank.open(bank))
        return commit_version(workdir, parent, building, note, refreshed=True)


def end_killed(current: Version) -> None:
    """Ends the edit that made the current version, if it was killed after its commit."""
    if (data_of(current.workdir, current.number) / BEGUN).exists() and current.number:
        with editing(current.workdir):
            pass


def open_to_select(workdir: Path) -> Version:
    """Opens the version in which references to keep are selected: the current one.

    Where `keep_only` was killed after its commit, the version before it, for the same selection.
    """
    current = open_version(workdir)
    begun = data_of(workdir, current.number) / BEGUN
    if current.number and begun.exists() and json.loads(begun.read_bytes())["kind"] == KEEP:
        return open_version(workdir, current.parent)
    return current


def rollback(workdir: str | Path, number: int) -> Version:
    """Makes the version `number` the current one, even if `current.json` is damaged or missing.

    Raises:
      VersionError: the version does not exist or is damaged.
      LockError: another process is writing the workdir.
    """
    workdir = Path(workdir)
    with Mirror.of(existing(workdir)).only_writer():
        fetch_versions(workdir)
        forget_begun(workdir)
        try:
            oldest = read_current(workdir)["oldest"]
        except VersionError:  # current.json is damaged or missing
            oldest = recorded_oldest(workdir)
            write_current(workdir, max(made_versions(workdir), default=0), oldest)
        version = open_version(workdir, number)
        write_current(workdir, version.number, oldest)
        return version


def _ids_of(references: References, name: str) -> list[int]:
    """Returns the id of the reference with this key, or the ids of a document's references."""
    ids = references.ids_of(name)
    if not ids:
        raise VersionError(
            f"no reference in use has the key {name!r}, nor is it a document's id; keys are"
            " DOCUMENT#N"
        )
    return ids


def building_folder(workdir: Path, parent: Version, what: list[Any]) -> Path:
    """Makes the temporary folder of an edit; keeps its content if the same edit was killed.

    `what` is the kind of the edit and all that it depends on, as JSON values.
    """
    folder, identity = workdir / VERSIONS / BUILDING, _identity(parent.number, what)
    begin_part(folder, identity)
    mirror, own = Mirror.of(workdir), _next_folder(parent)
    if mirror.in_bucket:
        mirror.publish(f"{own}/{BEGUN}", folder / BEGUN)
        _go_on(mirror, own, (folder / BEGUN).read_bytes())
    return folder


def _go_on(mirror: Mirror, own: str, begun: bytes) -> None:
    """Copies the banks that the same edit, killed, has written in the bucket: not all of another's.

    That one may only be suspended, and go on in its own folder; it makes no version then.
    """
    siblings = f"{Path(own).parent.as_posix()}/"
    names = [name.removeprefix(siblings).split("/") for name in mirror.names(siblings)]
    counts = Counter(path[0] for path in names if len(path) > 2)  # objects of banks and parts
    for token, _ in counts.most_common():
        before = siblings + token
        if before != own and mirror.read(f"{before}/{BEGUN}") == begun:
            for bank in ("bank", BANKS):
                mirror.copy(f"{before}/{bank}", f"{own}/{bank}")
            return


def _next_folder(parent: Version) -> str:
    """Returns the path in the workdir of what an edit of `parent` makes, but for `version.json`."""
    number = max([*versions(parent.workdir), parent.number]) + 1
    own = folder_of(parent.workdir, number) / Mirror.of(parent.workdir).token
    return own.relative_to(parent.workdir).as_posix()


def bank_of_edit(parent: Version, building: Path, part: str = "bank") -> Path | str:
    """Returns where an edit writes a bank: in `building`; in a bucket, where its version is."""
    mirror = Mirror.of(parent.workdir)
    return mirror.url(f"{_next_folder(parent)}/{part}") if mirror.in_bucket else building / part


def is_made(current: Version, what: list[Any]) -> bool:
    """Returns True if this very edit made the current version and was killed after its commit."""
    folder = data_of(current.workdir, current.number)
    return current.number > 0 and is_begun(folder, _identity(current.parent, what))


def _identity(parent: int, what: list[Any]) -> dict[str, Any]:
    return {"parent": parent, "kind": what[0], "edit": digest(json_text(what))}


def build_delta(
    config: ConfigDict,
    parent: Version,
    building: Path,
    references: References,
    write: WriteMemories | None,
    base: Any = None,
) -> None:
    """Builds index and bank of the delta whose references are in `building`.

    `base` is the bank whose memories and codebooks can be reused; default: that of the base.
    """
    added = References(building / "references")
    embedder = open_index(parent, references).embedder.extended(added.texts(range(len(added))))
    build_index(added, embedder, building / "index", in_one_part(config))
    if parent.has_bank:
        if write is None:
            raise VersionError("the workdir has a bank; an edit needs a writer of memories")
        write(added, bank_of_edit(parent, building), base or Bank.open(parent.banks[0]))


def in_one_part(config: ConfigDict) -> ConfigDict:
    """Returns the config with `index_parts` = 1: a delta may have fewer references than parts."""
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
    refreshed: bool = False,
) -> Version:
    """Turns the folder `building` into the next version, makes it current and opens it.

    The version consists of the parts of `parent` and the delta in `building`, if any; the ids
    `gone` become tombstones. With `alone`, `building` is a new base and nothing of `parent` stays;
    if it is `refreshed`, it has the banks of all parts.
    """
    mirror, own = Mirror.of(workdir), _next_folder(parent)
    number = int(Path(own).parts[1])
    folders = [] if alone else [name_of(parent, path) for path in parent.folders]
    banks = [] if alone else [*parent.bank_parts]
    removed = np.asarray(gone, np.int64)
    tombstones = removed if alone else np.union1d(parent.tombstones, removed)
    if (building / "references").exists():
        folders, banks = [*folders, own], [*banks, f"{own}/bank"]
    if refreshed:
        banks = [f"{own}/{BANKS}/{part}" for part in range(len(folders))]
    write_array(building / TOMBSTONES, tombstones)
    parts = [building if folder == own else workdir / folder for folder in folders]
    content = {
        "version": number,
        "parent": parent.number,
        "folders": folders,
        "banks": banks,
        "data": own,
        "references": [content_id(part / "references") for part in parts],
        "tombstones": checksum(building / TOMBSTONES),
        "oldest": number if alone else read_current(workdir)["oldest"],
        "note": note,
    }
    write_sealed(building / VERSION, content)
    if not (workdir / VERSIONS / CURRENT).exists():  # never missing where there are versions
        write_current(workdir, 0, 0)
    made = [name for name in ("references", "index") if (building / name).exists()]
    for name in (*made, TOMBSTONES):
        mirror.publish(f"{own}/{name}", building / name)
    if mirror.in_bucket:  # this makes it a version
        version = folder_of(workdir, number) / VERSION
        swap(mirror, name_of(parent, version), (building / VERSION).read_bytes())
        (building / VERSION).unlink()
    os.replace(building, workdir / own)
    sync_folder((workdir / own).parent)
    for name in made:
        mirror.publish(f"{own}/{name}")  # the mirror has it already
    write_current(workdir, number, read_current(workdir)["oldest"])
    return open_version(workdir, number)
