"""The files that a spec names: single files, globs, folders, data sets; and what is left out."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from m3jax.errors import TextError
from m3jax.files import checksum
from m3jax.reading import ROWS, ending, stem

TEXTS = (".txt", ".md")  # endings of files that are one document each
_IN_FOLDERS = (".jsonl", ".parquet", ".txt")  # folders hold other files of the other endings
_BY_NAME = "files that are read only where they are named"
_SHOWN = 3  # paths shown of those left out for one reason
TFDS = "tfds:"


class Part(NamedTuple):
    """File or data set.

    Attributes:
      path: of the file, or `tfds:NAME[:SPLIT]`.
      name: path below the folder that was given, or in front of the first wildcard of a glob, with
        `/`; of a file that was named itself, its name. Files of one name are named by their paths
        below the folder that holds all files.
    """

    path: str
    name: str

    @property
    def form(self) -> str:
        """Ending of the format, as `reading.ending`, or `tfds:`."""
        return TFDS if self.path.startswith(TFDS) else ending(self.path)

    @property
    def stem(self) -> str:
        """The name without endings, of which default ids are made."""
        return self.path.split(":", 2)[1] if self.form == TFDS else stem(self.name)


class Listing(NamedTuple):
    """Parts that a spec names, in reading order, and the paths left out, by reason."""

    parts: list[Part]
    left_out: dict[str, list[str]]

    def describe(self) -> str:
        """Formats what was left out, in one line; "" if nothing was."""
        return describe_files(self.left_out)


def describe_files(left_out: Mapping[str, Sequence[str]]) -> str:
    """Formats paths by reason, in one line: how many there are, and the first of them."""
    told = []
    for reason, paths in left_out.items():
        more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        told.append(f"{reason} ({len(paths)}: {', '.join(paths[:_SHOWN])}{more})")
    return "; ".join(told)


def list_files(spec: str, rows_only: bool = False) -> Listing:
    """Lists the files and data sets that a spec names, in reading order.

    A spec is a comma-separated list of files, globs, folders and `tfds:NAME[:SPLIT]`; or one path
    that has commas. Of a folder are read, sorted by path, all JSON lines (.jsonl), Parquet files
    and texts (.txt) at any depth, plain or compressed (.gz, .zst). Hidden files and folders are
    left out, those of other endings, too; links are followed. Files .json and .md are read where
    they are named, or by a glob. With `rows_only` texts are left out in folders, and refused where
    they are named.

    Raises:
      TextError: a path does not exist, or is no file that can be read several times; an unknown
        ending; a file named twice; no file at all.
    """
    listing = Listing([], {})
    seen: dict[tuple[int, int], str] = {}
    pieces = [spec] if os.path.exists(spec) else spec.split(",")
    for piece in filter(None, (piece.strip() for piece in pieces)):
        if piece.startswith(TFDS):
            if rows_only:
                raise TextError(f"{piece} is a data set of documents; name files")
            listing.parts.append(Part(piece, piece))
            continue
        before = len(listing.parts)
        for part in _parts_of(piece, rows_only, listing.left_out):
            status = os.stat(part.path)
            identity = status.st_dev, status.st_ino
            if identity in seen:
                raise TextError(
                    f"{part.path} is read twice, also as {seen[identity]}; leave one of them out"
                )
            seen[identity] = part.path
            listing.parts.append(part)
        if len(listing.parts) == before:
            endings = ", ".join(_endings(rows_only, named=False))
            left = listing.describe()
            left = f"; left out: {left}" if left else ""
            raise TextError(
                f"{piece} matches no file ending in {endings}, plain, .gz or .zst{left}"
            )
    if not listing.parts:
        raise TextError(f"no documents: the spec {spec!r} names no file")
    return Listing(_told_apart(listing.parts), listing.left_out)


def _told_apart(parts: list[Part]) -> list[Part]:
    """Names files by their paths below the folder that holds all of them, where names repeat."""
    if len({part.name for part in parts}) == len(parts):
        return parts
    files = {part.path: os.path.abspath(part.path) for part in parts if part.form != TFDS}
    folder = os.path.commonpath([os.path.dirname(path) for path in files.values()])
    return [
        Part(part.path, _below(files[part.path], folder)) if part.path in files else part
        for part in parts
    ]


def _endings(rows_only: bool, named: bool) -> tuple[str, ...]:
    endings = (*ROWS, *TEXTS) if named else _IN_FOLDERS
    return tuple(e for e in endings if not (rows_only and e in TEXTS))


def _parts_of(piece: str, rows_only: bool, left_out: dict[str, list[str]]) -> Iterator[Part]:
    """Yields the parts of a folder, a file or a glob; notes the paths that are left out."""
    home = os.path.expanduser(piece)
    path = piece if os.path.exists(piece) or not os.path.exists(home) else home
    if os.path.isdir(path):
        named = _endings(rows_only, named=True)
        yield from files_inside(path, _endings(rows_only, named=False), left_out, named=named)
    elif os.path.exists(path):
        if not os.path.isfile(path):
            raise TextError(f"{path} is a pipe or a device; documents are read several times")
        if ending(path) not in _endings(rows_only, named=True):
            accepted = ", ".join(_endings(rows_only, named=True))
            raise TextError(
                f"{path} has an unknown ending; accepted: {accepted}, plain, .gz or .zst"
            )
        yield Part(path, os.path.basename(path))
    elif glob.has_magic(home):
        folder = _fixed(home)
        matches = sorted(glob.glob(home, recursive=True))
        yield from _chosen(filter(os.path.isfile, matches), folder, rows_only, left_out)
        folders = [match for match in matches if os.path.isdir(match) and "**" not in home]
        for match in folders:
            endings, named = (_endings(rows_only, named=choice) for choice in (False, True))
            yield from files_inside(match, endings, left_out, folder, named)
    else:
        raise TextError(f"{piece} does not exist; give files, globs, folders or tfds:NAME")


def _chosen(
    paths: Iterable[str], folder: str, rows_only: bool, left_out: dict[str, list[str]]
) -> Iterator[Part]:
    for path in paths:
        if ending(path) in _endings(rows_only, named=True):
            yield Part(path, _below(path, folder))
        else:
            left_out.setdefault("files of other endings", []).append(path)


def _fixed(pattern: str) -> str:
    """Returns the folder in front of the first wildcard of a glob."""
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:first]))


def _below(path: str, folder: str) -> str:
    return os.path.relpath(path, folder).replace(os.sep, "/")


def files_inside(
    top: str,
    endings: Sequence[str],
    left_out: dict[str, list[str]],
    base: str | None = None,
    named: Sequence[str] = (),
) -> Iterator[Part]:
    """Yields the files below the folder `top`, sorted by path; follows links.

    Files are named by their paths below `base`, default `top`. A file that is reached twice, by a
    link or by a loop of links, is read once. `left_out` gets the other paths, by reason; hidden
    files and folders are among them, and files of the endings `named` that are read only where they
    are named. Raises `TextError` for a folder that cannot be read.
    """
    base = base or top
    inside, seen = [], set()

    def note(reason: str, path: str) -> None:
        left_out.setdefault(reason, []).append(path)

    def refuse(error: OSError) -> None:
        raise TextError(f"{error.filename} cannot be read: {error.strerror}") from error

    folders = set()
    for folder, names, files in os.walk(top, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in folders:
            note("folders reached before", folder)
            names.clear()
            continue
        folders.add(real)
        for name in [name for name in names if name.startswith(".")]:
            note("hidden folders", os.path.join(folder, name))
        names[:] = sorted(name for name in names if not name.startswith("."))
        for path in (os.path.join(folder, name) for name in sorted(files)):
            if os.path.basename(path).startswith("."):
                note("hidden files", path)
            elif ending(path) not in endings:
                by_name = ending(path) in named and ending(path) not in _IN_FOLDERS
                note(_BY_NAME if by_name else "files of other endings", path)
            elif not os.path.exists(path):
                note("links to nothing", path)
            elif not os.path.isfile(path):
                note("pipes and devices", path)
            elif (identity := _identity(path)) in seen:
                note("files reached before", path)
            else:
                seen.add(identity)
                inside.append(path)
    for path in sorted(inside):
        yield Part(path, _below(path, base))


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def inputs_of(spec: str) -> list[str]:
    """Returns the names and checksums of a spec's files (`list_files`), to detect later changes.

    A `tfds:…` part is listed by its name alone.
    """
    return [
        part.path if part.form == TFDS else f"{part.name} {checksum(part.path)}"
        for part in list_files(spec).parts
    ]
