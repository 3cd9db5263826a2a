"""Versions of a workdir's knowledge: references, index and bank that belong together.

Version 0 is `references/ index/ bank/` of the workdir. Each edit (`m3jax.knowledge.edit`) makes a
new version:

    versions/000003/version.json    base and deltas of the version, with a checksum; written last
    versions/000003/tombstones.npy  ids that were deleted or replaced
    versions/000003/references/ index/ bank/   the delta that the edit added, if any
    versions/000003/banks/0/ 1/ …   banks of base and deltas, if the version is a refresh
    versions/current.json           the version that readers open, the oldest version kept, and what
                                    identifies the content of the former; written before the first
                                    version is, so that it is never missing where versions exist

A version is complete as soon as its folder has its final name, and never changes afterwards. Only
`begun.json`, which names the edit, is deleted when the edit has come to its end.

In a bucket all but `version.json` is in a folder `versions/000003/TOKEN/` of the editor, who alone
writes there: one that was suspended and has lost its lease meets nobody when it goes on.
`version.json` is made only if there is none, and makes the version; `current.json` changes only if
nobody else has changed it. What is opened is fetched into the mirror, all but banks; what is read
is held by leases `versions/readers/000003-…`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import os
import re
import shutil
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3jax.config import PREFIX_TOKENS
from m3jax.errors import TextError, VersionError
from m3jax.failures import raise_if_machine
from m3jax.files import checksum, read_sealed
from m3jax.knowledge.current import (
    CURRENT,
    VERSION,
    data_of,
    folder_of,
    made_versions,
    read_current,
    recorded_oldest,
    write_current,
)
from m3jax.memory.bank import Bank, join_banks
from m3jax.memory.binding import Binding, layout_of
from m3jax.memory.storage import COMPLETE, read_file
from m3jax.mirror import Mirror
from m3jax.retrieval.embed import load_embedder
from m3jax.retrieval.index import EMBEDDER, DeltaIndex, Index
from m3jax.retrieval.ranking import Ranking
from m3jax.retrieval.retriever import Retriever
from m3jax.retrieval.search import SearchIndex
from m3jax.text.references import DeltaReferences, References
from m3jax.text.tokenizer import Tokenizer
from m3jax.workdir import BEGUN, VERSIONS, content_id

TOMBSTONES = "tombstones.npy"
BUILDING = "building"  # of an edit
BANKS = "banks"  # of a refresh: one folder for the base and one for each delta
MANIFEST = "manifest.json"  # of references and of a bank
_MADE = re.compile(rf"{VERSIONS}/\d+/{VERSION}")


def _readers(number: int) -> str:
    return f"{VERSIONS}/readers/{number:06d}"


class _Lock:
    """Shows that a version is read, until it is closed or garbage-collected.

    On a disk by a shared lock on a file, in a bucket by a lease.
    """

    def __init__(self, workdir: Path, number: int) -> None:
        mirror = Mirror.of(workdir)
        if mirror.in_bucket:
            self.close: Any = weakref.finalize(self, mirror.reading(_readers(number)))
            return
        descriptor = os.open(_locked_file(workdir, number), os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, descriptor)
        with contextlib.suppress(OSError):  # the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)


@dataclasses.dataclass(frozen=True)
class Version:
    """Describes an opened version.

    Attributes:
      number: number of the version; 0 = as prepared, without edits.
      parent: number of the version that was edited; −1 for version 0.
      note: description of the edit.
      folders: folders with `references/ index/`: the base, then the deltas.
      bank_parts: paths in the workdir of the banks of the base and the deltas, in the same order.
      tombstones: ids that were deleted or replaced.
      lock: keeps a compaction from deleting the folders.
    """

    workdir: Path
    number: int
    parent: int
    note: str
    folders: tuple[Path, ...]
    bank_parts: tuple[str, ...]
    tombstones: np.ndarray
    lock: _Lock | None = None

    @property
    def deltas(self) -> tuple[Path, ...]:
        """Returns the folders of the deltas over the base, oldest first."""
        return self.folders[1:]

    @property
    def banks(self) -> tuple[Path | str, ...]:
        """Returns the folders or URLs of the banks of the base and the deltas."""
        mirror = Mirror.of(self.workdir)
        return tuple(mirror.url(part) for part in self.bank_parts)

    @property
    def has_bank(self) -> bool:
        """Returns True if the version has a bank, be it damaged."""
        return any(read_file(self.banks[0], name) is not None for name in (MANIFEST, COMPLETE))

    def close(self) -> None:
        """Releases the lock, so that a compaction may delete the folders."""
        if self.lock is not None:
            self.lock.close()


def fetch_current(workdir: Path) -> None:
    """Makes the mirror of a bucket have its `current.json`."""
    mirror = Mirror.of(workdir)
    if mirror.in_bucket:
        mirror.fetch_files([f"{VERSIONS}/{CURRENT}"])


def fetch_versions(workdir: Path) -> None:
    """Makes the mirror of a bucket have its versions: all but references, indices and banks."""
    mirror = Mirror.of(workdir)
    if not mirror.in_bucket:
        return
    fetch_current(workdir)  # first: the version that it names is there by then
    there = mirror.names(f"{VERSIONS}/")
    made = [name for name in there if _MADE.fullmatch(name)]
    mirror.fetch_files(made)
    own = {int(Path(name).parent.name) for name in made}
    for number in made_versions(workdir):
        if number not in own:  # deleted by a compaction elsewhere
            shutil.rmtree(folder_of(workdir, number), ignore_errors=True)
    data = [data_of(workdir, number).relative_to(workdir).as_posix() for number in own]
    mirror.fetch_files([f"{folder}/{name}" for folder in data for name in (TOMBSTONES, BEGUN)])
    mirror.drop_older("references")  # else versions would be compared with another preparation
    if recorded_oldest(workdir):
        for part in ("references", "index"):
            if (workdir / part).exists() and not mirror.has(part):
                shutil.rmtree(workdir / part, ignore_errors=True)


def existing(workdir: Path) -> Path:
    """Returns the folder of a workdir; raises `VersionError` if there is none."""
    mirror = Mirror.of(workdir)
    if not workdir.is_dir() or (mirror.in_bucket and not mirror.has("tokenizer")):
        raise VersionError(f"there is no workdir {mirror.place}; make it with launch/prepare.py")
    return workdir


def versions(workdir: str | Path) -> list[int]:
    """Lists the numbers of all versions that can be opened, ascending.

    Raises `VersionError` if the workdir is missing or `current.json` is damaged.
    """
    workdir = Path(workdir)
    if not Mirror.of(workdir).in_bucket:
        existing(workdir)
    oldest = read_current(workdir)["oldest"]
    return [number for number in [0, *made_versions(workdir)] if number >= oldest]


def open_version(workdir: str | Path, number: int | None = None, *, parts: bool = True) -> Version:
    """Opens a version of a prepared workdir for reading; default: the current version.

    In a bucket its references and indices are fetched, and the tokenizer, but not without `parts`.

    Raises `VersionError` if the version does not exist, was deleted by a compaction or is damaged.
    """
    workdir = Path(workdir)
    for _ in range(3):  # a compaction may delete the current version meanwhile
        fetch_versions(workdir)
        current = read_current(workdir)
        chosen = current["version"] if number is None else number
        if chosen >= current["oldest"]:
            with contextlib.suppress(FileNotFoundError):
                version = _locked(workdir, chosen)
                fetch_current(workdir)
                if chosen >= read_current(workdir)["oldest"]:
                    return _fetched(version) if parts else version
                version.close()  # a compaction may not have seen the lock
        if number is not None:
            break
    place = Mirror.of(workdir).place
    reason = f"{place} has no version {chosen}"
    if chosen < current["oldest"]:
        reason = f"version {chosen} of {place} was deleted by a compaction"
    elif folder_of(workdir, chosen).is_dir():
        reason = (
            f"{folder_of(workdir, chosen) / VERSION} is missing; restore it from a copy, or go back"
            " with launch/edit_bank.py rollback"
        )
    raise VersionError(f"{reason}; there are {', '.join(map(str, versions(workdir)))}")


def _locked(workdir: Path, number: int) -> Version:
    if number:
        _locked_file(workdir, number).stat()  # FileNotFoundError: no such version
    there = Mirror.of(workdir).in_bucket or _locked_file(workdir, number).exists()
    lock = _Lock(workdir, number) if there else None
    return dataclasses.replace(read_version(workdir, number), lock=lock)


def _fetched(version: Version) -> Version:
    """Fetches what a version reads, but for banks, and reads it again, with what binds it."""
    mirror = Mirror.of(version.workdir)
    if not mirror.in_bucket:
        return version
    try:
        mirror.fetch("tokenizer", *fetched_parts(version))
    except BaseException:
        version.close()
        raise
    return dataclasses.replace(read_version(version.workdir, version.number), lock=version.lock)


def _locked_file(workdir: Path, number: int) -> Path:
    """Returns the file on which readers of a version hold a lock."""
    folder = folder_of(workdir, number)
    return folder / VERSION if number else folder / "references" / MANIFEST


def fetched_parts(version: Version) -> list[str]:
    """Returns the paths in the workdir of the references and indices of a version."""
    names = ("references", "index")
    return [name_of(version, folder / name) for folder in version.folders for name in names]


def name_of(version: Version, path: Path) -> str:
    """Returns the path in the workdir of what is there at a path."""
    return path.relative_to(version.workdir).as_posix()


def read_version(workdir: Path, number: int) -> Version:
    """Reads what a version consists of, without a lock; errors as in `open_version`.

    Raises `FileNotFoundError` if there is no such version.
    """
    if number == 0:
        nothing = np.zeros(0, np.int64)
        return Version(workdir, 0, -1, "as prepared", (workdir,), ("bank",), nothing)
    folder = folder_of(workdir, number)
    (folder / VERSION).stat()  # FileNotFoundError: no such version
    content = read_sealed(folder / VERSION, "version", "banks", "note")
    if content is not None and content["version"] != number:
        content = None  # of another version
    data = data_of(workdir, number)
    path = folder / VERSION if content is None else data / TOMBSTONES
    if content is None or not path.is_file() or checksum(path) != content.get("tombstones"):
        raise VersionError(
            f"{path} is {'damaged' if path.is_file() else 'missing'}; restore it from a copy, or go"
            f" back to an earlier version, for example with launch/edit_bank.py rollback"
            f" --to={number - 1}, and edit again"
        )
    tombstones = np.load(io.BytesIO((data / TOMBSTONES).read_bytes()), allow_pickle=False)
    folders = tuple(workdir / part for part in _folders(content))
    banks = tuple(content["banks"])
    for part, made_from in zip(folders, content.get("references", ()), strict=False):
        if content_id(part / "references") not in (None, made_from):
            raise VersionError(
                f"{folder / VERSION} was made from other references ({made_from[:12]}) than"
                f" {part / 'references'} holds; put back the one that was exchanged, or go back to"
                " another version with launch/edit_bank.py rollback"
            )
    return Version(workdir, number, content["parent"], content["note"], folders, banks, tombstones)


def _folders(content: dict[str, Any]) -> list[str]:
    """Returns the paths in the workdir of base and deltas, from the content of `version.json`."""
    if "folders" in content:
        return list(content["folders"])
    numbers = [content["base"], *content["deltas"]]  # of an earlier version of m3jax
    return [f"{VERSIONS}/{number:06d}" if number else "" for number in numbers]


def in_use(workdir: Path, number: int) -> bool:
    """Returns True if a process has opened the version; of a bucket, any but this one."""
    mirror = Mirror.of(workdir)
    if mirror.in_bucket:
        return mirror.read_by_others(_readers(number))
    try:
        with _locked_file(workdir, number).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:  # no such version, or the file system has no locks
        raise_if_machine(error)  # but not: there may be readers
        return False
    return False


@contextlib.contextmanager
def editing(workdir: Path) -> Iterator[Version]:
    """Locks a workdir and opens its current version; errors of `only_writer` and `open_version`.

    An edit that was killed between its commit and its end is brought to its end: its version is
    made current, and keeps `begun.json`, by which the same edit, repeated, knows that it is done.
    """
    mirror = Mirror.of(existing(workdir))
    with mirror.only_writer():
        fetch_versions(workdir)
        current, last = read_current(workdir), max(versions(workdir))
        if last > current["version"] and (data_of(workdir, last) / BEGUN).exists():
            write_current(workdir, last, current["oldest"])
        yield open_version(workdir)
        ended = _begun(workdir)
        _delete_stopped(mirror, ended)
    for name in ended:  # last, when the lock is gone, too: from here on, a repetition is an edit
        mirror.delete(name)


def forget_begun(workdir: Path) -> None:
    """Ends all edits of a locked workdir: repeated from now on, they are edits of their own."""
    mirror, ended = Mirror.of(workdir), _begun(workdir)
    _delete_stopped(mirror, ended)
    for name in ended:
        mirror.delete(name)


def _delete_stopped(mirror: Mirror, ended: Sequence[str]) -> None:
    """Deletes what edits that were stopped have left in a bucket beside those that have ended."""
    for name in ended if mirror.in_bucket else ():
        _, number, token, _ = name.split("/")
        for other in {*mirror.folders(f"{VERSIONS}/{number}")} - {token}:
            mirror.delete(f"{VERSIONS}/{number}/{other}")


def _begun(workdir: Path) -> list[str]:
    paths = (data_of(workdir, number) / BEGUN for number in made_versions(workdir))
    return [path.relative_to(workdir).as_posix() for path in paths if path.exists()]


def require_unedited(workdir: Path) -> None:
    """Raises `VersionError` if the workdir was edited, because later versions read version 0."""
    fetch_versions(workdir)
    if made_versions(workdir):
        number = read_current(workdir)["version"]
        raise VersionError(
            f"{Mirror.of(workdir).place} was edited (version {number}): its references, index and"
            f" bank are changed"
            " with launch/edit_bank.py. To begin anew, use another workdir"
        )


def open_references(config: ConfigDict, version: Version, tokenizer: Tokenizer) -> References:
    """Opens the references of a version.

    Raises `TextError` if they are missing or damaged, were made with another tokenizer, or are
    longer than `config.memory.reference_length`.
    """
    sets = []
    for part in version.folders:
        folder = part / "references"
        references = References(folder)
        if references.tokenizer_fingerprint != tokenizer.fingerprint:
            raise TextError(f"{folder} was cut with another tokenizer; run launch/prepare.py again")
        if references.length > config.memory.reference_length:
            raise TextError(
                f"{folder} has references of up to {references.length} tokens, but"
                f" config.memory.reference_length = {config.memory.reference_length}; prepare again"
            )
        sets.append(references)
    return DeltaReferences(sets, version.tombstones) if version.number else sets[0]


def open_index(version: Version, references: References) -> SearchIndex:
    """Opens the index of a version; `references` are the result of `open_references`.

    Raises `RetrievalError` or `HuggingFaceError` as `Index.open` does, and `RetrievalError` if base
    and deltas have different embedders.
    """
    if not isinstance(references, DeltaReferences):
        return Index.open(version.folders[0] / "index", references)
    embedder = load_embedder(*embedders(version.folders))
    indices = [
        Index.open(folder / "index", part, embedder=embedder)
        for folder, part in zip(version.folders, references.sets, strict=True)
    ]
    return DeltaIndex(indices, version.tombstones, references.fingerprint)


def embedders(folders: Sequence[Path]) -> list[Path]:
    """Returns the folders of the embedders of a base and its deltas."""
    return [folder / "index" / EMBEDDER for folder in folders]


def open_bank(version: Version, references: References, cache_bytes: int = 0) -> Bank:
    """Opens the bank of a version; `cache_bytes` and errors as in `Bank.open` and `join_banks`."""
    banks = [Bank.open(folder, cache_bytes) for folder in version.banks]
    if not version.number:
        return banks[0]
    return join_banks(banks, version.tombstones, references.fingerprint)


def open_retriever(
    config: ConfigDict,
    version: Version,
    references: References,
    overlap_limit: float,
    candidates: int | None = None,
    bank: Bank | None = None,
) -> Retriever:
    """Opens the retriever of a version; `references` are the result of `open_references`.

    `candidates` defaults to `config.retrieval.candidates`. With `config.retrieval.rerank`, the
    memories in `bank` (default: the version's bank) rerank the candidates. Raises `RetrievalError`
    if the index cannot be opened or does not fit the references, or the checkpoint that ranks is
    not the bank's writer, and `BankError` if the version's bank cannot be opened.
    """
    settings, rank = config.retrieval, None
    index = open_index(version, references)
    if settings.rerank:
        writer = settings.checkpoint or Mirror.of(version.workdir).url("warmup")
        read = bank or open_bank(version, references)
        rank = Ranking(writer, read, references, settings.encoder_batch)
    fetched = candidates or settings.candidates
    return Retriever(index, references, fetched, overlap_limit, rank, settings.rerank)


def check_bank(
    config: ConfigDict, bank: Bank, references: References, tokenizer: Tokenizer
) -> None:
    """Raises `BankError` unless a bank, of any writer, fits config, references and tokenizer."""
    layout, writer = layout_of(config, PREFIX_TOKENS), bank.binding.writer
    bank.require(Binding(writer, tokenizer.fingerprint, references.fingerprint, layout))
