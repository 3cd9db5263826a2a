"""Base class of embedders, and reading of `embedder.json`, the spec of a saved embedder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float32

from m3jax.errors import RetrievalError
from m3jax.failures import raise_if_machine
from m3jax.files import json_text, write_atomically

_SPEC = "embedder.json"


class Embedder:
    """Base class of embedders, which map texts to unit vectors, callable from several threads."""

    name: str  # kind of the embedder, as in `config.retrieval.embedder`
    dimension: int  # width of the vectors
    fitted: bool  # True if `embed` can be called
    fingerprint: str  # hex digest of everything that the embedding of a text depends on

    @property
    def spec(self) -> dict[str, Any]:
        """Returns the content of `embedder.json`, as JSON values, from which `load` restores."""
        return {name: getattr(self, name) for name in ("name", "dimension", "fingerprint")}

    @property
    def family(self) -> str:
        """Returns a string that is equal for embedders whose vectors can be compared."""
        return self.fingerprint

    def check_fitted(self) -> None:
        """Raises `RetrievalError` if the embedder is not fitted."""
        if not self.fitted:
            raise RetrievalError(
                f"the embedder {self.name!r} has learnt nothing yet; call fit on the texts of the"
                " knowledge base, or load it from an index"
            )

    def fit(self, texts: Iterable[str]) -> None:
        """Fits the embedder to the texts of the knowledge base; replaces any earlier fit."""

    def extended(self, texts: Sequence[str]) -> Embedder:
        """Returns an embedder of the same family that also covers the words of these texts."""
        return self

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dimension"]:
        """Embeds each text as a unit vector, or as zeros if it has no known word or no token."""
        raise NotImplementedError

    def embed_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dimension"]:
        """Embeds queries, which some embedders treat differently from references."""
        return self.embed(texts)

    def save(self, folder: str | Path) -> None:
        """Writes `embedder.json` and the files of the fit, which the class method `load` reads."""
        text = json_text(self.spec, indent=2, sort_keys=True)
        write_atomically(Path(folder) / _SPEC, text.encode())


_E = TypeVar("_E", bound=Embedder)


def read_spec(folder: str | Path) -> dict[str, Any]:
    """Reads `embedder.json`; raises `RetrievalError` if it is missing or damaged."""
    try:
        spec = json.loads((Path(folder) / _SPEC).read_text("utf-8"))
        if not isinstance(spec, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise_if_machine(error)
        raise RetrievalError(
            f"{folder} holds no readable {_SPEC} ({error}); build the index again"
        ) from error
    return spec


def different_embedders() -> RetrievalError:
    """Returns the error for parts of a knowledge base whose vectors cannot be compared."""
    return RetrievalError(
        "the base and the deltas of the index were made by different embedders; make one index of"
        " them with launch/edit_bank.py compact"
    )


@contextlib.contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Converts exceptions from reading the files of a saved embedder to `RetrievalError`."""
    try:
        yield
    except (OSError, EOFError, LookupError, TypeError, ValueError, BadZipFile) as error:
        raise_if_machine(error)
        raise RetrievalError(
            f"cannot load the embedder in {folder} ({error!r}); build the index again"
        ) from error


def reload(folder: str | Path, encoder: Path, fingerprint: str, make: Callable[[], _E]) -> _E:
    """Returns the embedder that `make` restores, if it has the saved fingerprint.

    Raises `RetrievalError` if the folder `encoder` is missing or its content has changed.
    """
    remedy = (
        "put the encoder back there, or run launch/prepare.py with config.retrieval.encoder = its"
        " folder now; the same encoder at another place costs no new embeddings"
    )
    if not encoder.is_dir():
        raise RetrievalError(f"{folder} needs the encoder {encoder}, which is missing; {remedy}")
    embedder = make()
    if embedder.fingerprint != fingerprint:
        raise RetrievalError(
            f"{folder} was written with another encoder than {encoder} holds now (fingerprint"
            f" {fingerprint}; now {embedder.fingerprint}); {remedy}"
        )
    return embedder
