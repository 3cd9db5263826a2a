"""Interface of embedders, and `embedder.json`, which says what embedder a folder holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from m3jax.errors import RetrievalError
from m3jax.files import write_atomically

_SPEC = "embedder.json"


@runtime_checkable
class Embedder(Protocol):
    """Interface of what turns texts into unit vectors; may be called from several threads."""

    name: str
    dimension: int

    @property
    def fitted(self) -> bool:
        """Returns True where `embed` can be called."""

    @property
    def fingerprint(self) -> str:
        """Returns the hex digest of everything the embedding of a text depends on."""

    @property
    def spec(self) -> dict[str, Any]:
        """Returns what `save` writes to `embedder.json`: JSON that `load` needs."""

    def fit(self, texts: Iterable[str]) -> None:
        """Learns from the texts of the knowledge base; replaces what was learnt before."""

    @property
    def family(self) -> str:
        """Returns a name that embedders share whose vectors can be compared."""
        return self.fingerprint

    def extended(self, texts: Sequence[str]) -> Embedder:
        """Returns an embedder of the same family that knows the words of more texts, too."""
        return self

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dimension"]:
        """Embeds texts to one unit row each, or zeros where there is nothing to search with."""

    def embed_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dimension"]:
        """Embeds texts to search with, which some embedders read in another way."""
        return self.embed(texts)

    def save(self, folder: str | Path) -> None:
        """Writes `embedder.json` and what it names into the folder; `load` is the inverse."""

    @classmethod
    def load(cls, folder: str | Path) -> Embedder:
        """Loads the embedder that `save` wrote."""


def write_spec(folder: str | Path, spec: dict[str, Any]) -> None:
    """Writes the file; `spec["name"]` says which class reads it. The folder is made if missing."""
    text = json.dumps(spec, indent=2, sort_keys=True)
    write_atomically(Path(folder) / _SPEC, text.encode())


def read_spec(folder: str | Path) -> dict[str, Any]:
    """Reads what `write_spec` wrote; raises `RetrievalError` where it is missing or damaged."""
    try:
        spec = json.loads((Path(folder) / _SPEC).read_text("utf-8"))
        if not isinstance(spec, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise RetrievalError(
            f"{folder} holds no readable {_SPEC} ({error}); build the index again"
        ) from error
    return spec
