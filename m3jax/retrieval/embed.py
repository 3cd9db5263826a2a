"""Embedders: text to unit vectors whose dot product is the similarity that retrieval ranks by.

`lexical.LexicalEmbedder` needs no model; `neural.NeuralEmbedder` runs a pretrained encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32
from ml_collections import ConfigDict

from m3jax.errors import RetrievalError
from m3jax.retrieval.lexical import LexicalEmbedder
from m3jax.retrieval.spec import read_spec

if TYPE_CHECKING:
    from m3jax.retrieval.neural import NeuralEmbedder


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into unit vectors. Implementations may be called from several threads."""

    name: str
    dimension: int

    @property
    def fitted(self) -> bool:
        """Whether `embed` can be called."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything the embedding of a text depends on."""

    @property
    def spec(self) -> dict[str, Any]:
        """What `save` writes to `embedder.json`: JSON that `load` needs."""

    def fit(self, texts: Iterable[str]) -> None:
        """Learns from the texts of the knowledge base; replaces what was learnt before."""

    @property
    def family(self) -> str:
        """Embedders of one family make vectors that can be compared."""

    def extended(self, texts: Sequence[str]) -> Embedder:
        """One of the same family that knows the words of more texts, too."""

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dimension"]:
        """One unit row per text, or zeros where there is nothing to search with."""

    def embed_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dimension"]:
        """The same for texts to search with, which some embedders read in another way."""

    def save(self, folder: str | Path) -> None:
        """Writes `embedder.json` and what it names into the folder; `load` is the inverse."""

    @classmethod
    def load(cls, folder: str | Path) -> Embedder:
        """The embedder that `save` wrote."""


_EMBEDDERS = (LexicalEmbedder.name, "bert")


def make_embedder(config: ConfigDict) -> Embedder:
    """The embedder that `config.retrieval.embedder` names; the lexical one is not fitted yet.

    Raises:
      RetrievalError: an unknown name, or an encoder that cannot be used.
    """
    retrieval = config.retrieval
    if retrieval.embedder not in _EMBEDDERS:
        raise RetrievalError(
            f"config.retrieval.embedder = {retrieval.embedder!r} is unknown; one of"
            f" {', '.join(_EMBEDDERS)}"
        )
    if retrieval.embedder == LexicalEmbedder.name:
        return LexicalEmbedder(retrieval.dimension)
    return _neural()(
        retrieval.encoder, retrieval.pooling, retrieval.encoder_batch, retrieval.encoder_dtype
    )


def load_embedder(folder: str | Path) -> Embedder:
    """The embedder saved in a folder, of whatever kind its `embedder.json` names."""
    name = read_spec(folder).get("name")
    if name not in _EMBEDDERS:
        raise RetrievalError(
            f"{folder} was written by the embedder {name!r}, which this version does not have; it"
            f" has {', '.join(_EMBEDDERS)}"
        )
    return LexicalEmbedder.load(folder) if name == LexicalEmbedder.name else _neural().load(folder)


def _neural() -> type[NeuralEmbedder]:
    """Imported where it is used: it brings JAX, which the lexical embedder does without."""
    from m3jax.retrieval.neural import NeuralEmbedder

    return NeuralEmbedder
