"""Makes or loads the embedder that a config or an index names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m3jax.config.renamed import REMOVED_VALUES
from m3jax.errors import RetrievalError
from m3jax.retrieval.embedder import Embedder, different_embedders, read_spec
from m3jax.retrieval.lexical import LexicalEmbedder

NAMES = ("lexical", "bert")


def make_embedder(config: ConfigDict) -> Embedder:
    """Makes the embedder that `config.retrieval` names, not fitted yet if it needs fitting.

    Raises:
      RetrievalError: the name is unknown, or the dimension is too small.
      HuggingFaceError: the folder of the encoder is missing, damaged or not supported.
    """
    retrieval = config.retrieval
    kind = _kind(retrieval.embedder, f"config.retrieval.embedder = {retrieval.embedder!r}")
    if retrieval.embedder == "lexical":
        return kind(retrieval.dimension)
    rows = retrieval.encoder_batch
    return kind(retrieval.encoder, retrieval.pooling, rows, retrieval.encoder_dtype)


def load_embedder(*folders: str | Path) -> Embedder:
    """Loads the embedder saved in the last folder, of the kind that its `embedder.json` names.

    Each folder's embedder is that of the folder before it, `extended` by texts of its own.

    Raises `RetrievalError` if a folder is damaged, their embedders are of different kinds, or an
    encoder is missing or has changed, and `HuggingFaceError` if the folder of the encoder cannot be
    read.
    """
    kinds = [(read_spec(folder).get("name"), folder) for folder in folders]
    name, last = kinds[-1]
    kind = _kind(name, f"{last} was written by the embedder {name!r}, which")
    if any(other != name for other, _ in kinds):
        raise different_embedders()
    return kind.load(*folders)


def _kind(name: Any, named: str) -> Any:
    """Returns the class of an embedder, imported on use: `bert` imports JAX."""
    if name == "lexical":
        return LexicalEmbedder
    if name == "bert":
        from m3jax.retrieval.neural import NeuralEmbedder

        return NeuralEmbedder
    instead = REMOVED_VALUES["retrieval.embedder"].get(str(name), "")
    listed = ", ".join(NAMES) + (instead and f"; {instead}")
    raise RetrievalError(f"{named} is unknown; this version has {listed}")
