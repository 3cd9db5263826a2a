"""Parts of a workdir: folders that record their inputs and whether they are finished."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3jax.errors import TextError
from m3jax.files import digest, json_text, read_sealed, write_atomically, write_sealed

BEGUN = "begun.json"  # inputs of an unfinished part
INPUTS = "inputs.json"  # inputs of a finished part; written last, so it marks the part as finished
VERSIONS = "versions"  # folder of the versions of a workdir's knowledge
_MANIFEST = "manifest.json"


def content_id(folder: str | Path) -> str | None:
    """Reads the identity of a finished folder's content from its `manifest.json`.

    It is the manifest's `fingerprint` if it has one, as corpora and references do; else a digest of
    the sealed manifest, which lists the checksums of the folder's files. None if the manifest is
    missing or damaged.
    """
    path = Path(folder) / _MANIFEST
    manifest = read_sealed(path) if path.is_file() else None
    if manifest is None:
        return None
    return manifest.get("fingerprint") or digest(json_text(manifest, sort_keys=True))


def remedy(folder: str | os.PathLike[str], script: str = "launch/prepare.py") -> str:
    """Returns, for messages, how to replace a damaged folder of a workdir without losing anything.

    `script` makes the folder anew; a folder of a version is made by an edit instead.
    """
    folder = Path(folder)
    for place in (folder, *folder.parents):
        if place.parent.name == VERSIONS:
            return (
                f"restore it from a copy, or go back to a version before {place.name} with"
                " launch/edit_bank.py rollback and edit again"
            )
    return (
        f"restore it from a copy, or move {folder} elsewhere and run {script} again, which makes it"
        " from the same inputs"
    )


def read_inputs(folder: Path) -> dict[str, Any] | None:
    """Reads the inputs of a finished part; None if it is unfinished.

    Raises `TextError` if `inputs.json` is damaged.
    """
    marker = folder / INPUTS
    if not marker.is_file():
        return None
    inputs = read_sealed(marker, unsealed=True)
    if inputs is None:
        raise TextError(
            f"{marker} is damaged; restore it from a copy, or move it elsewhere and run the same"
            f" command again, which makes {folder} from the same inputs"
        )
    return inputs


def begin_part(folder: Path, inputs: dict[str, Any]) -> None:
    """Prepares a part to be made or resumed; deletes its files if their inputs were different."""
    if not is_begun(folder, inputs):
        (folder / BEGUN).unlink(missing_ok=True)  # first: a half deleted part is not resumed
        if folder.exists():
            shutil.rmtree(folder)
        write_atomically(folder / BEGUN, _begun(inputs))


def is_begun(folder: Path, inputs: dict[str, Any]) -> bool:
    """Returns True if `begin_part` has prepared the part with these inputs."""
    marker = folder / BEGUN
    return marker.is_file() and marker.read_bytes() == _begun(inputs)


def _begun(inputs: dict[str, Any]) -> bytes:
    return json_text(inputs, indent=1, sort_keys=True).encode()


def make_part(folder: Path, inputs: dict[str, Any], make: Callable[[Path], Any]) -> bool:
    """Makes a part with `make(folder)` and marks it as finished, unless it is finished already.

    Returns True if a finished part was kept. Raises `TextError` if the finished part was made from
    inputs other than `inputs` (a JSON object), or its `inputs.json` is damaged.
    """
    before = read_inputs(folder)
    if before is not None:
        other = [key for key in sorted({*inputs, *before}) if inputs.get(key) != before.get(key)]
        if other:
            key = other[0]
            raise TextError(
                f"{folder} was made from other inputs: {', '.join(other)} ({key} was"
                f" {str(before.get(key))[:200]}, is now {str(inputs.get(key))[:200]});"
                " use another workdir"
            )
        return True
    make(folder)
    write_sealed(folder / INPUTS, inputs)
    return False
