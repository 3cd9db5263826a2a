"""Parts of a workdir: folders that record their inputs and whether they are finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3jax.errors import TextError
from m3jax.files import write_atomically

BEGUN = "begun.json"  # inputs of an unfinished part
INPUTS = "inputs.json"  # inputs of a finished part; written last, so it marks the part as finished


def begin_part(folder: Path, inputs: dict[str, Any]) -> None:
    """Prepares a part to be made or resumed; deletes its files if their inputs were different."""
    begun = json.dumps(inputs, indent=1, sort_keys=True).encode()
    marker = folder / BEGUN
    if not marker.is_file() or marker.read_bytes() != begun:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomically(marker, begun)


def make_part(folder: Path, inputs: dict[str, Any], make: Callable[[Path], Any]) -> bool:
    """Makes a part with `make(folder)` and marks it as finished, unless it is finished already.

    Returns True if a finished part was kept. Raises `TextError` if the finished part was made from
    inputs other than `inputs` (a JSON object), or its `inputs.json` is damaged.
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
