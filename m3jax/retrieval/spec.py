"""`embedder.json`: which embedder a folder holds, and with what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m3jax.errors import RetrievalError
from m3jax.files import write_atomically

_SPEC = "embedder.json"


def write_spec(folder: str | Path, spec: dict[str, Any]) -> None:
    """Writes the file; `spec["name"]` says which class reads it. The folder is made if missing."""
    text = json.dumps(spec, indent=2, sort_keys=True)
    write_atomically(Path(folder) / _SPEC, text.encode())


def read_spec(folder: str | Path) -> dict[str, Any]:
    """What `write_spec` wrote.

    Raises:
      RetrievalError: there is none, or it is damaged.
    """
    try:
        spec = json.loads((Path(folder) / _SPEC).read_text("utf-8"))
        if not isinstance(spec, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise RetrievalError(
            f"{folder} holds no readable {_SPEC} ({error}); build the index again"
        ) from error
    return spec
