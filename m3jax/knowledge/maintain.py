"""Maintenance of a workdir's knowledge: compaction, verification and repair."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from m3jax.errors import BankError, MachineError, VersionError
from m3jax.knowledge.current import (
    VERSION,
    data_of,
    folder_of,
    made_versions,
    write_current,
)
from m3jax.knowledge.edit import (
    WriteMemories,
    bank_of_edit,
    building_folder,
    commit_version,
    in_one_part,
)
from m3jax.knowledge.versions import (
    BANKS,
    BUILDING,
    VERSIONS,
    Version,
    editing,
    embedders,
    existing,
    fetched_parts,
    in_use,
    name_of,
    open_bank,
    open_index,
    open_references,
    open_version,
    read_version,
)
from m3jax.memory.bank import Bank
from m3jax.memory.storage import COMPLETE, delete_file, read_file, remove_shard_checksums
from m3jax.mirror import Mirror
from m3jax.retrieval.build import build_index
from m3jax.retrieval.embed import load_embedder, make_embedder
from m3jax.retrieval.embedder import Embedder
from m3jax.retrieval.index import Index
from m3jax.text.references import References, copy_references
from m3jax.text.tokenizer import Tokenizer


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
                write(whole, bank_of_edit(parent, building), open_bank(parent, references))
            summary = f"compacted to {len(whole)} references, with {len(parent.deltas)} deltas"
            parent.close()
            parent = commit_version(workdir, parent, building, note or summary, alone=True)
        write_current(workdir, parent.number, parent.number)
        parent.close()
        return parent, _delete_older(workdir, parent)


def verify(config: ConfigDict, workdir: str | Path, number: int | None = None) -> list[str]:
    """Reads all files of a version; returns one message for each damaged or missing file.

    Of a bucket those that were fetched are copied again and compared.

    Raises `VersionError` if the version itself cannot be opened.
    """
    mirror = Mirror.of(existing(Path(workdir)))
    version, problems = open_version(workdir, number, parts=False), list[str]()

    @contextlib.contextmanager
    def noting() -> Iterator[None]:
        try:
            yield
        except MachineError:
            raise
        except ValueError as error:
            problems.append(str(error))

    mirror.fetch("tokenizer", anew=True)
    for part in fetched_parts(version) if mirror.in_bucket else ():
        with noting():
            mirror.fetch(part, anew=True)
    if problems:
        return problems
    tokenizer = Tokenizer.load(Path(workdir) / "tokenizer")
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
    mirror = Mirror.of(existing(Path(workdir)))
    version, done = open_version(workdir, number, parts=False), []
    with mirror.only_writer():
        mirror.fetch("tokenizer")
        tokenizer = Tokenizer.load(Path(workdir) / "tokenizer")
        for part, (folder, bank) in enumerate(zip(version.folders, version.banks, strict=True)):
            own, index = (name_of(version, folder / name) for name in ("references", "index"))
            mirror.fetch(own, anew=True)
            references = References(folder / "references")
            references.verify()
            try:
                mirror.fetch(index, anew=True)
                embedder = load_embedder(*embedders(version.folders[: part + 1]))
                Index.open(folder / "index", references, embedder=embedder)
            except MachineError:
                raise
            except ValueError as error:
                embedder = _embedder(config, version.folders[: part + 1], references)
                build_index(references, embedder, folder / "index", in_one_part(config))
                mirror.publish(index, anew=True)
                done.append(str(error))
            if version.has_bank:
                done += _repair_bank(references, bank, version.banks[0], write)
    open_references(config, version, tokenizer)
    return done


def _repair_bank(
    references: References, folder: Path | str, base: Path | str, write: WriteMemories
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
        delete_file(folder, path)
        done.append(problem)
    if broken or read_file(folder, COMPLETE) is None:  # of a repair that was killed
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
    mirror = Mirror.of(workdir)
    older = [number for number in (0, *made_versions(workdir)) if number != kept.number]
    read = [number for number in older if in_use(workdir, number)]
    needed, opened = set[str](), [kept, *(read_version(workdir, number) for number in read)]
    for version in opened:
        needed |= {*fetched_parts(version), *version.bank_parts}
    data = {name_of(kept, data_of(workdir, version.number)) for version in opened}
    for number in (*older, kept.number):
        own = name_of(kept, folder_of(workdir, number))
        if number and number not in (kept.number, *read):
            mirror.delete(f"{own}/{VERSION}")  # so that it can no longer be opened
        inside = [f"{own}/{token}" for token in mirror.folders(own)] if number else []
        for folder in inside or [own]:
            begin = f"{folder}/" if number else ""
            banks = {f"{begin}{BANKS}/{name}" for name in _names_in(mirror, f"{begin}{BANKS}")}
            parts = {begin + part for part in ("references", "index", "bank")} | banks
            if number and folder not in data and not needed & parts:
                parts = {folder}
            for part in sorted(parts - needed):
                mirror.delete(part)
    if (building := workdir / VERSIONS / BUILDING).exists():  # of an edit that was stopped
        shutil.rmtree(building)
    for name in _names_in(mirror, VERSIONS):  # of one that was stopped, in a bucket
        if name.isdigit() and int(name) > kept.number:
            mirror.delete(f"{VERSIONS}/{name}")
    return [str(mirror.url(name_of(kept, folder_of(workdir, number)))) for number in read]


def _names_in(mirror: Mirror, part: str) -> set[str]:
    """Returns the names of the folders in a part, here and in the bucket."""
    names = {name.removeprefix(f"{part}/").split("/")[0] for name in mirror.names(f"{part}/")}
    return names | {path.name for path in (mirror.local / part).glob("[0-9]*")}
