"""Layout of an index on disk: names, manifest, checksums.

`embedder/`, one `part-*/` per part with `embeddings-*.npy` (2¹⁴ rows each) and, unless the search
is exact, `scann/`; `build.json` (what the files belong to, so that a killed build can go on), and
`manifest.json`, written last, with a checksum of every file: ScaNN itself loads flipped bytes
without a word.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from m3jax.errors import RetrievalError
from m3jax.files import checksum, read_sealed, write_sealed
from m3jax.retrieval.search import SHARD_ROWS

FORMAT = 2
MANIFEST = "manifest.json"
BUILD = "build.json"
EMBEDDER, SCANN = "embedder", "scann"
_EMBEDDINGS = "embeddings-*"


def part_folder(folder: Path, part: int) -> Path:
    """Returns the folder of a part."""
    return folder / f"part-{part:05d}"


def part_ranges(size: int, parts: int) -> list[range]:
    """Returns the ids of every part: contiguous, of nearly equal length."""
    cuts = [part * size // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]


def shards(folder: Path, size: int) -> list[Path]:
    """Lists files of the embeddings of a part with that many references."""
    return [folder / f"embeddings-{i:05d}.npy" for i in range(-(-size // SHARD_ROWS))]


def embedding_files(folder: Path) -> list[Path]:
    """Lists all files of embeddings in an index, those of the older layout too."""
    return [*folder.glob(_EMBEDDINGS), *folder.glob("part-*/" + _EMBEDDINGS)]


def write_manifest(folder: Path, identity: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """Commits the index: syncs every file, then writes their checksums.

    Embeddings that the index does not keep are left out.
    """
    files = {}
    dropped = () if identity["keep_embeddings"] else embedding_files(folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path not in dropped:
            with path.open("rb") as file:
                os.fsync(file.fileno())  # ScaNN does not
            files[path.relative_to(folder).as_posix()] = checksum(path)
    write_sealed(folder / MANIFEST, {"identity": identity, "parts": parts, "files": files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a finished index.

    Raises:
      RetrievalError: there is none, it is damaged or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise RetrievalError(
            f"no finished index: {path} is missing; run launch/prepare.py, which goes on where a"
            " stopped build ended"
        )
    manifest = read_sealed(path)
    if manifest is None:
        raise damaged(path, "is damaged")
    stored = manifest["identity"]["format"]
    if stored != FORMAT:
        raise damaged(path, f"describes an index of format {stored}; this version reads {FORMAT}")
    return manifest


def verify(folder: Path, manifest: dict[str, Any], parts: Collection[int]) -> None:
    """Compares the files of these parts, and those that are of no part, with their checksums.

    Raises:
      RetrievalError: naming a missing part, or a missing or damaged file.
    """
    opened = {part_folder(folder, part).name for part in parts}
    for part in sorted(opened):
        if not (folder / part).is_dir():
            raise damaged(
                folder / part, "is missing (copy it here, or open the index without this part)"
            )
    for name, expected in manifest["files"].items():
        path, first = folder / name, name.split("/")[0]
        if first.startswith("part-") and first not in opened:
            continue
        if not path.is_file():
            raise damaged(path, "is missing")
        if checksum(path) != expected:
            raise damaged(path, "is damaged (its checksum differs)")


def damaged(path: Path, what: str) -> RetrievalError:
    """Makes the error of a file or folder that only a new build mends."""
    return RetrievalError(f"{path} {what}; run launch/prepare.py again to rebuild the index")
