"""Choice of the embedder: text to unit vectors whose dot product ranks references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m3jax.errors import RetrievalError
from m3jax.retrieval.embedder import Embedder, read_spec
from m3jax.retrieval.lexical import LexicalEmbedder

NAMES = ("lexical", "bert", "model", "attention")


def make_embedder(config: ConfigDict, workdir: str | Path = "") -> Embedder:
    """Makes the embedder that `config.retrieval` names, not fitted yet if it learns from texts.

    `workdir/warmup` is the checkpoint where `config.retrieval.checkpoint` is empty. Raises
    `RetrievalError`, for an encoder `HuggingFaceError`, where it cannot be made.
    """
    retrieval = config.retrieval
    kind = _kind(retrieval.embedder, f"config.retrieval.embedder = {retrieval.embedder!r}")
    if retrieval.embedder == "lexical":
        return kind(retrieval.dimension)
    rows = retrieval.encoder_batch
    if retrieval.embedder == "bert":
        return kind(retrieval.encoder, retrieval.pooling, rows, retrieval.encoder_dtype)
    checkpoint = retrieval.checkpoint or Path(workdir) / "warmup"
    layer = retrieval.layer if retrieval.embedder == "model" else 0
    return kind(checkpoint, retrieval.dimension, layer, rows)


def load_embedder(folder: str | Path) -> Embedder:
    """Loads the embedder saved in a folder, of whatever kind its `embedder.json` names."""
    name = read_spec(folder).get("name")
    return _kind(name, f"{folder} was written by the embedder {name!r}, which").load(folder)


def _kind(name: Any, named: str) -> Any:
    """Imports a class on use: all but the lexical embedder bring JAX."""
    if name == "lexical":
        return LexicalEmbedder
    if name == "bert":
        from m3jax.retrieval.neural import NeuralEmbedder

        return NeuralEmbedder
    if name not in NAMES:
        raise RetrievalError(f"{named} is unknown; this version has {', '.join(NAMES)}")
    from m3jax.retrieval.checkpoint_embedders import AttentionEmbedder, ModelEmbedder

    return ModelEmbedder if name == "model" else AttentionEmbedder
