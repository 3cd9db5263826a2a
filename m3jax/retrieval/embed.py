"""Makes or loads the embedder that a config or an index names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m3jax.config.renamed import REMOVED_VALUES
from m3jax.errors import RetrievalError
from m3jax.retrieval.embedder import Embedder, read_spec
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


def load_embedder(folder: str | Path) -> Embedder:
    """Loads the embedder saved in a folder, of the kind that its `embedder.json` names.

    Raises `RetrievalError` if the folder is damaged, or its encoder is missing or has changed, and
    `HuggingFaceError` if the folder of the encoder cannot be read.
    """
    name = read_spec(folder).get("name")
    return _kind(name, f"{folder} was written by the embedder {name!r}, which").load(folder)


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
