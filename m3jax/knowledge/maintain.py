"""Maintenance of a workdir's knowledge: compaction, verification and repair."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from m3jax.errors import BankError, MachineError, VersionError
from m3jax.knowledge.edit import WriteMemories, building_folder, commit_version, in_one_part
from m3jax.knowledge.versions import (
    BANKS,
    BUILDING,
    VERSION,
    VERSIONS,
    Version,
    editing,
    embedders,
    existing,
    in_use,
    open_bank,
    open_index,
    open_references,
    open_version,
    read_version,
    write_current,
)
from m3jax.memory.bank import Bank
from m3jax.memory.storage import COMPLETE, remove_shard_checksums
from m3jax.retrieval.build import build_index
from m3jax.retrieval.embed import load_embedder, make_embedder
from m3jax.retrieval.embedder import Embedder
from m3jax.retrieval.index import Index
from m3jax.text.references import References, copy_references
from m3jax.text.tokenizer import Tokenizer
from m3jax.workdir import only_writer


def compact(
    config: ConfigDict, workdir: str | Path, *, write: WriteMemories, note: str = ""
) -> tuple[Version, list[str]]:
    """Writes the current version as a base without tombstones, and deletes all other versions.

    Older versions are deleted only after the new version is current. A version without deltas and
    tombstones is already compact and is not rewritten.

    Returns:
      The compact version, in which references have new ids, and the folders that are kept until the
      next compaction because another process reads them.

    Raises:
      VersionError: no reference is left, or the current version cannot be opened.
      LockError: another process is writing the workdir.
      TextError, RetrievalError, BankError: references, index or bank cannot be read or written.
    """
    workdir = Path(workdir)
    with editing(workdir) as parent:
        if parent.deltas or parent.tombstones.size:
            tokenizer = Tokenizer.load(workdir / "tokenizer")
            references = open_references(config, parent, tokenizer)
            if not len(references.live):
                raise VersionError(f"nothing is left in version {parent.number} of {workdir}")
            building = building_folder(workdir, parent, ["compact", references.fingerprint])
            copy_references(references, references.live, building / "references")
            whole = References(building / "references")
            build_index(whole, make_embedder(config), building / "index", config)
            if parent.has_bank:
                write(whole, building / "bank", open_bank(parent, references))
            summary = f"compacted to {len(whole)} references, with {len(parent.deltas)} deltas"
            parent.close()
            parent = commit_version(workdir, parent, building, note or summary, alone=True)
        write_current(workdir, parent.number, parent.number)
        parent.close()
        return parent, _delete_older(workdir, parent)


def verify(config: ConfigDict, workdir: str | Path, number: int | None = None) -> list[str]:
    """Reads all files of a version; returns one message for each damaged or missing file.

    Raises `VersionError` if the version itself cannot be opened.
    """
    version, problems = open_version(workdir, number), []
    tokenizer = Tokenizer.load(Path(workdir) / "tokenizer")

    @contextlib.contextmanager
    def noting() -> Iterator[None]:
        try:
            yield
        except MachineError:
            raise
        except ValueError as error:
            problems.append(str(error))

    with noting():
        references = open_references(config, version, tokenizer)
        with noting():
            references.verify()
        with noting():
            open_index(version, references)
        with noting():
            if version.has_bank:
                problems += open_bank(version, references).verify()
    return problems


def repair(
    config: ConfigDict, workdir: str | Path, *, write: WriteMemories, number: int | None = None
) -> list[str]:
    """Rewrites damaged or missing files of banks, and indices, of a version.

    Returns one message for each fault that it repaired.

    Raises:
      TextError: references are damaged; index and memories are made from them.
      BankError: a bank is damaged in a way that leaves in doubt what it holds, or cannot be
        written.
      VersionError: the version cannot be opened.
      LockError: another process is writing the workdir.
    """
    version = open_version(workdir, number)
    tokenizer = Tokenizer.load(Path(workdir) / "tokenizer")
    done = []
    with only_writer(existing(Path(workdir))):
        for part, (folder, bank) in enumerate(zip(version.folders, version.banks, strict=True)):
            references = References(folder / "references")
            references.verify()
            try:
                embedder = load_embedder(*embedders(version.folders[: part + 1]))
                Index.open(folder / "index", references, embedder=embedder)
            except MachineError:
                raise
            except ValueError as error:
                embedder = _embedder(config, version.folders[: part + 1], references)
                build_index(references, embedder, folder / "index", in_one_part(config))
                done.append(str(error))
            if version.has_bank:
                done += _repair_bank(references, bank, version.banks[0], write)
    open_references(config, version, tokenizer)
    return done


def _repair_bank(
    references: References, folder: Path, base: Path, write: WriteMemories
) -> list[str]:
    """Repairs the bank of a base or delta; returns one message for each fault."""
    done = []
    try:
        opened = Bank.open(folder, finished=False)
        _ = opened.record_hashes  # compared with its checksum
    except BankError as error:  # outside its shards
        done.append(str(error))
        write(references, folder, None if folder == base else Bank.open(base, finished=False))
        opened = Bank.open(folder)
    broken = opened.parts[0].damaged()
    for path, problem in broken:
        (folder / path).unlink(missing_ok=True)
        done.append(problem)
    if broken or not (folder / COMPLETE).exists():  # of a repair that was killed
        write(references, folder, opened if folder == base else Bank.open(base, finished=False))
    else:
        remove_shard_checksums(folder)  # if a repair ended before it did
    return done


def _embedder(config: ConfigDict, folders: Sequence[Path], references: References) -> Embedder:
    """Loads the embedder of the last of the base and its deltas; if it is damaged, makes it."""
    *before, own = embedders(folders)
    try:
        return load_embedder(*before, own)
    except MachineError:
        raise
    except ValueError:
        if not before:
            return make_embedder(config)
        return load_embedder(*before).extended(references.texts(range(len(references))))


def _delete_older(workdir: Path, kept: Version) -> list[str]:
    """Deletes what neither `kept` nor a version that is being read needs; can be repeated.

    Returns the folders of the versions that are being read.
    """
    folders = {int(path.name): path for path in sorted((workdir / VERSIONS).glob("[0-9]*"))}
    folders = {0: workdir, **folders}
    read = [n for n in folders if n != kept.number and in_use(workdir, n)]
    needed = set()
    for version in [kept, *(read_version(workdir, number) for number in read)]:
        own = (folder / part for folder in version.folders for part in ("references", "index"))
        needed |= {*own, *version.banks}
    for number, folder in folders.items():
        if number and number not in (kept.number, *read):
            (folder / VERSION).unlink(missing_ok=True)  # so that it can no longer be opened
        parts = [folder / part for part in ("references", "index", "bank")]
        parts += sorted((folder / BANKS).glob("[0-9]*"))
        if number and not needed.intersection(parts) and number not in (kept.number, *read):
            parts = [folder]
        for part in parts:
            if part not in needed and part.exists():
                shutil.rmtree(part)
    if (building := workdir / VERSIONS / BUILDING).exists():  # of an edit that was stopped
        shutil.rmtree(building)
    return [str(folders[number]) for number in read]
