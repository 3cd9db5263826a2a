"""Embedder that runs a pretrained BERT-family encoder on all devices of this process."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from m3jax.files import digest
from m3jax.mesh import local_mesh, replicated
from m3jax.retrieval.batches import Call, by_rows, calls, run
from m3jax.retrieval.bert import Architecture, Pooling, encode
from m3jax.retrieval.embedder import Embedder, different_embedders, read_spec, reading, reload
from m3jax.retrieval.pretrained import read_pretrained

_BLOCK = 4096  # texts tokenized at a time


@functools.lru_cache(maxsize=8)
def _program(architecture: Architecture, pooling: Pooling, mesh: Mesh) -> Any:
    """Jits `encode`; embedders of the same architecture share the result."""
    return by_rows(mesh, functools.partial(encode, architecture, pooling))


class NeuralEmbedder(Embedder):
    """Embeds texts by a pretrained encoder: pools its last layer (mean or first token), normalised.

    Needs no fitting. An index stores path and fingerprint of the encoder's folder, not the weights.
    """

    name = "bert"
    fitted = True

    def __init__(
        self,
        folder: str | Path,
        pooling: Literal["auto", "mean", "cls"] = "auto",
        rows: int = 16,
        dtype: Literal["float32", "bfloat16"] = "float32",
        devices: Sequence[jax.Device] | None = None,
    ):
        """Reads the encoder in a folder (`read_pretrained`) and copies it to the devices.

        Each device encodes `rows` texts at a time, fewer if they have more than 512 tokens. `dtype`
        applies to weights and matrix products. `devices` defaults to all devices of this process.
        Raises `HuggingFaceError` as `read_pretrained` does.
        """
        self.folder = Path(folder).expanduser().resolve()
        pretrained = read_pretrained(self.folder, pooling)
        self.dimension = pretrained.architecture.hidden
        self.pooling, self.max_length = pretrained.pooling, pretrained.max_length
        self.rows, self.dtype = rows, dtype
        self.fingerprint = digest(self.name, pretrained.fingerprint, dtype)
        self._tokenizer, self._lower = pretrained.tokenizer, pretrained.lower
        self._special = pretrained.tokenizer.num_special_tokens_to_add(False)
        self._padding = pretrained.architecture.padding or 0
        self._mesh = local_mesh(devices)
        cast = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), pretrained.params)
        self._params = jax.device_put(cast, replicated(self._mesh))
        self._encode = _program(pretrained.architecture, pretrained.pooling, self._mesh)

    @property
    def spec(self) -> dict[str, Any]:
        settings = {"pooling": self.pooling, "rows": self.rows, "dtype": self.dtype}
        return {**super().spec, "folder": str(self.folder), **settings}

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dimension"]:
        """Embeds texts, truncated to `max_length` tokens; zeros for a text without tokens."""
        embeddings = np.zeros((len(texts), self.dimension), np.float32)
        for start in range(0, len(texts), _BLOCK):
            part = embeddings[start : start + _BLOCK]
            encode = functools.partial(self._encode, self._params)
            for places, rows in run(encode, self._mesh, self._calls(texts[start : start + _BLOCK])):
                part[places] = rows[: len(places)]
        return embeddings

    def _calls(self, texts: Sequence[str]) -> Iterator[Call]:
        cleaned = [text.strip() for text in texts]  # as sentence-transformers does
        if self._lower:
            cleaned = [text.lower() for text in cleaned]
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(cleaned)]
        return calls(ids, self._special + 1, self.rows, self._mesh.size, self._padding)

    @classmethod
    def load(cls, *folders: str | Path) -> NeuralEmbedder:
        """Loads the embedder saved in the last folder and the encoder that it names.

        Raises `RetrievalError` if the encoder is missing or has changed, a file is damaged, or
        another folder names another encoder, and `HuggingFaceError` if the encoder cannot be read.
        """
        folder, specs = folders[-1], [read_spec(folder) for folder in folders]
        spec = specs[-1]
        if any(other.get("fingerprint") != spec.get("fingerprint") for other in specs):
            raise different_embedders()
        with reading(folder):
            path, fingerprint = Path(spec["folder"]), spec["fingerprint"]
            arguments = spec["pooling"], spec["rows"], spec["dtype"]
        return reload(folder, path, fingerprint, lambda: cls(path, *arguments))
