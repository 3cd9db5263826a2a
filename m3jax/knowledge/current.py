"""The version of a workdir's knowledge that readers open: `versions/current.json`.

Changed atomically; in a bucket only if nobody else has changed it since it was read.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from m3jax.errors import VersionError
from m3jax.files import digest, json_text, read_sealed, sealed
from m3jax.mirror import Mirror
from m3jax.workdir import VERSIONS, content_id

CURRENT, VERSION = "current.json", "version.json"


def folder_of(workdir: Path, number: int) -> Path:
    """Returns the folder of a version; the workdir itself for version 0."""
    return workdir if number == 0 else workdir / VERSIONS / f"{number:06d}"


def data_of(workdir: Path, number: int) -> Path:
    """Returns the folder of what a version has itself, but for `version.json`."""
    path = folder_of(workdir, number) / VERSION
    content = read_sealed(path) if number and path.is_file() else None
    return workdir / content["data"] if content and "data" in content else path.parent


def read_current(workdir: Path) -> dict[str, int]:
    """Reads from `current.json` the current `version` and `oldest`, the oldest version kept.

    Raises `VersionError` if `current.json` is damaged or that of another workdir, or missing though
    there are versions: without it deleted facts would come back.
    """
    path = workdir / VERSIONS / CURRENT
    numbers = made_versions(workdir)
    if not path.exists() and not numbers:
        return {"version": 0, "oldest": 0}
    current = read_sealed(path, "version", "oldest") if path.exists() else None
    if current is not None:
        expected, there = current.get("content"), _content(workdir, current["version"])
        if not numbers or None in (expected, there) or expected == there:
            return {name: current[name] for name in ("version", "oldest")}
    if not path.exists():
        what = f"is missing, but {workdir} has versions"
    else:
        what = "is damaged" if current is None else "belongs to another workdir"
    newest = f"; the newest is {max(numbers)}" if numbers else ""
    raise VersionError(
        f"{path} {what}; restore it from a copy, or write it anew with launch/edit_bank.py rollback"
        f" --to=VERSION{newest}"
    )


def made_versions(workdir: Path) -> list[int]:
    """Lists the numbers of the versions whose folders are there, ascending; 0 has none."""
    folders = (workdir / VERSIONS).glob("[0-9]*")
    return sorted(int(path.name) for path in folders if path.name.isdigit() and path.is_dir())


def _content(workdir: Path, number: int) -> str | None:
    """Returns what identifies the content of a version; None if it is missing or damaged."""
    if number == 0:
        return content_id(workdir / "references")
    path = folder_of(workdir, number) / VERSION
    content = read_sealed(path) if path.exists() else None
    return None if content is None else digest(json_text(content, sort_keys=True))


def recorded_oldest(workdir: Path) -> int:
    """Returns the oldest version kept, as recorded in the versions: to restore `current.json`."""
    contents = (read_sealed(path) for path in (workdir / VERSIONS).glob(f"[0-9]*/{VERSION}"))
    return max((content["oldest"] for content in contents if content is not None), default=0)


def write_current(workdir: Path, version: int, oldest: int) -> None:
    """Makes a version the current one, atomically.

    Raises `VersionError` if the workdir is in a bucket and was edited since it was read.
    """
    mirror = Mirror.of(workdir)
    current = {"version": version, "oldest": oldest, "content": _content(workdir, version)}
    if mirror.in_bucket:  # no two are alike
        current["written"] = secrets.token_hex(8)
    swap(mirror, f"{VERSIONS}/{CURRENT}", sealed(current))


def swap(mirror: Mirror, name: str, data: bytes) -> None:
    """Writes a file as `Mirror.swap` does; raises `VersionError` if another process has."""
    if not mirror.swap(name, data):
        raise VersionError(
            f"{mirror.place} was edited meanwhile by another process; run the same command again"
        )
