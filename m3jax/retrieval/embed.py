"""Choice of the embedder: text to unit vectors whose dot product ranks references.

`lexical.LexicalEmbedder` needs no model; `neural.NeuralEmbedder` runs a pretrained encoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m3jax.errors import RetrievalError
from m3jax.retrieval.embedder import Embedder, read_spec
from m3jax.retrieval.lexical import LexicalEmbedder

_EMBEDDERS = (LexicalEmbedder.name, "bert")


def make_embedder(config: ConfigDict) -> Embedder:
    """Makes the embedder that `config.retrieval.embedder` names; the lexical one is not fitted yet.

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
    """Loads the embedder saved in a folder, of whatever kind its `embedder.json` names."""
    name = read_spec(folder).get("name")
    if name not in _EMBEDDERS:
        raise RetrievalError(
            f"{folder} was written by the embedder {name!r}, which this version does not have; it"
            f" has {', '.join(_EMBEDDERS)}"
        )
    return LexicalEmbedder.load(folder) if name == LexicalEmbedder.name else _neural().load(folder)


def _neural() -> Any:
    """Imported where it is used: it brings JAX, which the lexical embedder does without."""
    from m3jax.retrieval.neural import NeuralEmbedder

    return NeuralEmbedder
