"""Parts of a workdir: folders that are finished, and know what they were made from, or are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3jax.errors import TextError
from m3jax.files import write_atomically

BEGUN = "begun.json"  # what an unfinished part is made from
INPUTS = "inputs.json"  # what a part was made from; written last, so it marks a finished part


def begin_part(folder: Path, inputs: dict[str, Any]) -> None:
    """Makes an unfinished folder ready to go on; what other inputs left there is deleted."""
    begun = json.dumps(inputs, indent=1, sort_keys=True).encode()
    marker = folder / BEGUN
    if not marker.is_file() or marker.read_bytes() != begun:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomically(marker, begun)


def make_part(folder: Path, inputs: dict[str, Any], make: Callable[[Path], Any]) -> bool:
    """Calls `make(folder)` unless the folder is finished, then marks it with its inputs.

    Returns True where the finished part was kept; raises `TextError` where it was made from other
    inputs.
    """
    marker = folder / INPUTS
    written = json.dumps(inputs, indent=1, sort_keys=True, ensure_ascii=False)
    if marker.is_file():
        try:
            before = json.loads(marker.read_bytes())
        except ValueError as error:
            raise TextError(f"{marker} is damaged; delete {folder} and run again") from error
        other = [key for key in sorted({*inputs, *before}) if inputs.get(key) != before.get(key)]
        if other:
            key = other[0]
            raise TextError(
                f"{folder} was made from other inputs: {', '.join(other)} ({key} was"
                f" {str(before.get(key))[:200]}, is now {str(inputs.get(key))[:200]});"
                " use another workdir, or delete this one"
            )
        return True
    make(folder)
    write_atomically(marker, written.encode())
    return False
