"""Index of a knowledge base: a folder that is written once and then searched.

It has one or more parts, each of a range of references with a searcher of its own, so that several
hosts can hold one index together: each opens some parts, and `merge` joins their results.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from m3jax.errors import RetrievalError
from m3jax.files import digest
from m3jax.retrieval.embed import load_embedder
from m3jax.retrieval.embedder import Embedder
from m3jax.retrieval.folder import (
    EMBEDDER,
    SCANN,
    damaged,
    part_folder,
    part_ranges,
    read_manifest,
    shards,
    verify,
)
from m3jax.retrieval.search import Searcher, SearchIndex, SearchResult, import_scann, merge
from m3jax.text.references import ReferenceReader


class Index(SearchIndex):
    """Searches the embeddings of a knowledge base. Thread-safe; cannot be pickled.

    Attributes: those of `SearchIndex`, and
      parts: the parts that are open; references of others are not returned.
      recall: least recall@5 of the open parts, measured when they were built; None if exact.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        parts: Sequence[int],
    ) -> None:
        identity = manifest["identity"]
        self.size: int = identity["count"]
        self.kind: str = identity["kind"]
        self.dimension: int = identity["dimension"]
        self.parts = tuple(parts)
        described = json.dumps([identity, manifest["parts"]], sort_keys=True)
        self.fingerprint: str = digest(described)
        self.references_fingerprint: str = identity["references"]
        self.embedder: Embedder = load_embedder(folder / EMBEDDER)
        if self.embedder.dimension != self.dimension:
            raise damaged(
                folder / EMBEDDER,
                f"makes vectors of dimension {self.embedder.dimension}, the index has"
                f" {self.dimension}",
            )
        recalls = [manifest["parts"][part]["recall"] for part in parts]
        self.recall: float | None = min(recalls) if self.kind == "scann" else None
        scann = import_scann() if self.kind == "scann" else None
        if self.kind == "scann" and scann is None:
            _warn_or_refuse(folder, identity["keep_embeddings"])
        ranges = part_ranges(self.size, identity["parts"])
        self._searchers: list[tuple[int, Searcher]] = []
        for part in parts:
            place, ids = part_folder(folder, part), ranges[part]
            paths = shards(place, len(ids)) if identity["keep_embeddings"] else []
            embeddings = [np.load(path, mmap_mode="r") for path in paths]
            searcher = None if scann is None else scann.load_searcher(str(place / SCANN))
            effort = manifest["parts"][part]["effort"]
            self._searchers.append((ids.start, Searcher(embeddings, searcher, effort)))

    @classmethod
    def open(
        cls,
        folder: str | Path,
        references: ReferenceReader | None = None,
        parts: Sequence[int] | None = None,
    ) -> Index:
        """Opens what `build_index` wrote, after comparing every file with its checksum.

        With `references` the index must be of these. `parts` are the parts to open, all by default;
        files of others need not be present.

        Raises:
          RetrievalError: an unfinished index, a missing or damaged file, parts that it does not
            have, or other references; the message names the thing and the remedy.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        identity = manifest["identity"]
        existing = range(identity["parts"])
        parts = existing if parts is None else sorted(set(parts))
        if not parts or not set(parts) <= set(existing):
            raise RetrievalError(
                f"the index {folder} has parts 0 … {len(existing) - 1}, not all of {list(parts)};"
                " open some of its own, or build it again with another config.retrieval.index_parts"
            )
        if references is not None and identity["count"] > len(references):
            raise RetrievalError(
                f"the index {folder} has ids 0 … {identity['count'] - 1}, but there are only"
                f" {len(references)} references; run launch/prepare.py again to rebuild the index"
            )
        if references is not None and identity["references"] != references.fingerprint:
            raise RetrievalError(
                f"the index {folder} was built from other references (fingerprint"
                f" {identity['references']}; these have {references.fingerprint}); run"
                " launch/prepare.py again to rebuild the index, or open the right references"
            )
        verify(folder, manifest, parts)
        return cls(folder, manifest, parts)

    def search(self, embeddings: Float32[np.ndarray, "n E"], k: int) -> SearchResult:
        self._check(embeddings, k)
        return self._merged([searcher for _, searcher in self._searchers], embeddings, k)

    def search_exactly(self, embeddings: Float32[np.ndarray, "n E"], k: int) -> SearchResult:
        """Searches by comparing every embedding, however the index was built; needs embeddings."""
        self._check(embeddings, k)
        exact = [searcher.exact() for _, searcher in self._searchers]
        if not all(exact):
            raise RetrievalError(
                "this index keeps no embeddings to search exactly; its recall when it was built is"
                f" {self.recall:.3f}. Build it with config.retrieval.keep_embeddings = True to"
                " compare"
            )
        return self._merged([searcher for searcher in exact if searcher], embeddings, k)

    def _check(self, embeddings: np.ndarray, k: int) -> None:
        if k < 1:
            raise RetrievalError(f"k = {k} references per query; ask for at least 1")
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dimension:
            raise RetrievalError(
                f"queries have shape {embeddings.shape}; this index needs (n, {self.dimension}),"
                " as its own embedder makes them"
            )

    def _merged(
        self, searchers: Sequence[Searcher], embeddings: np.ndarray, k: int
    ) -> SearchResult:
        queries, results = np.ascontiguousarray(embeddings), []
        for (start, _), searcher in zip(self._searchers, searchers, strict=True):
            ids, scores = searcher.search(queries, k)
            results.append((np.where(ids < 0, ids, ids + start), scores))
        return results[0] if len(results) == 1 else merge(results)


def _warn_or_refuse(folder: Path, keep_embeddings: bool) -> None:
    """Warns of an exact search where ScaNN cannot be imported, or refuses without embeddings."""
    if not keep_embeddings:
        raise RetrievalError(
            f"{folder} was built with ScaNN and keeps no embeddings, and ScaNN cannot be imported"
            " here; pip install scann where it has a wheel, or build the index with"
            " config.retrieval.keep_embeddings = True"
        )
    warnings.warn(
        f"{folder} was built with ScaNN, which cannot be imported here; searching exactly,"
        " which is slower on a large index (pip install scann where it has a wheel)",
        stacklevel=4,
    )
