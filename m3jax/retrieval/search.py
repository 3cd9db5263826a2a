"""Search for the references of largest dot product: exact in NumPy, approximate with ScaNN.

Both end with the same ranking of a few candidates by float64 scores, each computed separately, so
that the result of a query does not depend on the other queries of its batch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from m3jax.retrieval.embedder import Embedder

SHARD_ROWS = 2**14  # embeddings per file and per block of the exact search
SPARE = 16  # candidates beyond k, so that ties at the k-th place go to the lower id
_QUERIES = 64  # queries per block
_PAIRS = 128  # pairs scored at a time in float64, which fit the processor's cache
_MARGIN = 1e-5  # exceeds the error of a float32 dot product of unit vectors
_SCORE_ALL = 20_000  # most references for which ScaNN computes all scores

SearchResult = tuple[
    Int64[np.ndarray, "n k"], Float32[np.ndarray, "n k"]
]  # ids and scores of n queries


@runtime_checkable
class SearchIndex(Protocol):
    """Interface of indices that a `Retriever` searches: `Index` or `DeltaIndex`."""

    size: int  # number of ids R, tombstones included
    references_fingerprint: str
    fingerprint: str  # hex digest of references, embedder and search settings
    embedder: Embedder  # embeds queries as the references were embedded

    def search(self, embeddings: Float32[np.ndarray, "n E"], k: int) -> SearchResult:
        """Finds the references whose embeddings have the largest dot products with the queries'.

        The result of a query does not depend on the other queries of the call.

        Returns ids and scores of k references per query, best first, of equal scores the lower id
        first; −1 and −inf if there are fewer. Scores are dot products of the float32 embeddings,
        rounded once. An index without embeddings returns and ranks by the scores of ScaNN's 8-bit
        embeddings, with an error of about 0.002 for unit vectors. Raises `RetrievalError` if k is
        below 1 or the embeddings have another width than those of `embedder`.
        """


# Settings of ScaNN for embeddings that do not cluster: no tree, all codes are compared.
ALL_CODES = {"leaves": 0, "block": 2, "sample": 100_000}


def import_scann() -> ModuleType | None:
    """Imports ScaNN's bindings without TensorFlow; None if ScaNN is not installed."""
    try:
        return importlib.import_module("scann").scann_ops_pybind
    except ImportError:
        return None


def scann_settings(references: int) -> dict[str, int]:
    """Returns initial training settings of ScaNN for a number R of references.

    For up to 20 000 references all scores are computed. For more, references are assigned to
    `leaves` = √R clusters, each reference to two, and a query is compared with the codes of a few
    clusters (asymmetric hashing: `block` dimensions are quantized to one of 16 centres). `sample`
    is the most training vectors: with 100 000 vectors like a sentence encoder's, a sample of
    30 000 lowered recall by 5 %.
    """
    if references <= _SCORE_ALL:
        return {"leaves": 0, "block": 0, "sample": 0}
    leaves = round(math.sqrt(references))
    return {"leaves": leaves, "block": 4, "sample": max(100_000, 200 * leaves)}


def build_scann(
    scann: ModuleType,
    embeddings: Float32[np.ndarray, "R E"],
    settings: dict[str, int],
    folder: Path,
    standalone: bool = False,
) -> None:
    """Trains a ScaNN searcher and writes it to a new folder, deterministically.

    ScaNN's default, random initial centres, differs between trainings; k-means++ does not, for any
    number of threads. A `standalone` searcher stores 8-bit embeddings to score its candidates
    itself; otherwise only codes are written, and `Searcher` scores the candidates. `settings` are
    the result of `scann_settings` or `ALL_CODES`.
    """
    builder, sample = scann.builder(embeddings, 1, "dot_product"), settings["sample"]
    if settings["leaves"]:
        options = {"random_init": False, "soar_lambda": 1.0, "avq": 2.5}
        builder = builder.tree(settings["leaves"], 1, training_sample_size=sample, **options)
    if settings["block"]:
        builder = builder.score_ah(settings["block"], training_sample_size=sample)
        if standalone:
            builder = builder.reorder(SPARE, quantize=True)
    else:
        builder = builder.score_brute_force(quantize=standalone)
    folder.mkdir(parents=True)
    builder.build().serialize(str(folder), relative_path=True)


def _within(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (row, column) of each row's k best scores and of ties within float32 error."""
    best = min(k, scores.shape[1])
    kth = np.partition(scores, scores.shape[1] - best, axis=1)[:, scores.shape[1] - best]
    row, column = np.nonzero((scores >= kth[:, None] - _MARGIN) & (scores > -np.inf))
    return row, column


def merge(results: Sequence[SearchResult]) -> SearchResult:
    """Merges the results of several parts of an index for the same queries.

    Ranks as `SearchIndex.search` does; entries of −1 and −inf come last.
    """
    width = results[0][0].shape[1]
    ids, scores = (np.concatenate(columns, axis=1) for columns in zip(*results, strict=True))
    order = np.lexsort((ids, -scores), axis=1)[:, :width]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)


class Searcher:
    """Searches stored embeddings. Safe to use from several threads; cannot be pickled.

    Attributes:
      effort: `leaves` to search and lowest number of `candidates` to score in an approximate
        search; both 0 if all scores are computed.
    """

    def __init__(
        self,
        shards: Sequence[Float32[np.ndarray, "_ E"]],
        scann: Any = None,
        effort: dict[str, int] | None = None,
    ):
        """Makes a searcher.

        Args:
          shards: all embeddings in order; every shard but the last has `SHARD_ROWS` rows. Empty if
            the ScaNN searcher is `standalone`, whose scores are final.
          scann: a loaded ScaNN searcher over the embeddings, or None for exact search. With a
            searcher, the embeddings are copied to one array in RAM.
          effort: see the attribute.
        """
        self._scann, self.effort = scann, effort or {"leaves": 0, "candidates": 0}
        self._size = sum(map(len, shards)) if shards else scann.size()
        self._shards, self._whole = shards, None
        if scann is not None and shards:
            self._whole = np.concatenate(shards)
            starts = range(0, self._size, SHARD_ROWS)
            self._shards = [self._whole[start : start + SHARD_ROWS] for start in starts]

    def exact(self) -> Searcher | None:
        """Returns an exact searcher over the same embeddings; None without embeddings."""
        return Searcher(self._shards) if self._shards else None

    def search(self, queries: Float32[np.ndarray, "n E"], k: int) -> SearchResult:
        """Returns the k best rows for each query; see `SearchIndex.search`."""
        ids = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for start in range(0, len(queries), _QUERIES):
            block = slice(start, start + _QUERIES)
            if self._scann is None:
                query, row = self._pairs_exact(queries[block], k)
            else:
                candidates = self._candidates(queries[block], k)
                if self._whole is None:
                    best = [part[:, :k] for part in merge([candidates])]
                    width = best[0].shape[1]
                    ids[block, :width], scores[block, :width] = best
                    continue
                query, row = self._pairs_scann(queries[block], k, *candidates)
            self._rank(queries[block], query, row, ids[block], scores[block])
        return ids, scores

    def _pairs_exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns pairs (query, id) that include the k best of each query despite rounding."""
        pairs = []
        for shard, rows in enumerate(self._shards):
            query, row = _within(queries @ rows.T, k)
            pairs.append((query, row + shard * SHARD_ROWS))
        query, row = (np.concatenate(part) for part in zip(*pairs, strict=True))
        return query, row

    def _pairs_scann(
        self, queries: np.ndarray, k: int, ids: np.ndarray, scores: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores ScaNN's candidates in float32; returns pairs as `_pairs_exact` does."""
        assert self._whole is not None
        # One query at a time, so that its gathered rows are still in the cache for the product.
        rows = np.empty((ids.shape[1], queries.shape[1]), np.float32)
        for query, row, score in zip(queries, ids, scores, strict=True):
            self._whole.take(row, axis=0, out=rows, mode="wrap")  # wrap: also accepts the id −1
            np.matmul(rows, query, out=score)
        scores[ids < 0] = -np.inf
        query, column = _within(scores, k)
        return query, ids[query, column]

    def _candidates(self, queries: np.ndarray, k: int) -> SearchResult:
        """Returns ids and scores of ScaNN's candidates, filled up with −1 and −inf.

        ScaNN searches a block of queries in one call. The leaves of a query and their order do not
        depend on the other queries, but the rounding of the product of queries and cluster centres
        depends on the size of the block. Therefore every block is filled up to the same size with
        copies of its last query.
        """
        n, leaves, candidates = len(queries), self.effort["leaves"], self.effort["candidates"]
        # For a count above the number of references, ScaNN returns ids 0 with scores of NaN.
        count = min(max(k + SPARE, candidates, 4 * k if candidates else 0), self._size)
        if n < _QUERIES and (candidates or self._whole is None):
            queries = np.concatenate([queries, np.repeat(queries[-1:], _QUERIES - n, axis=0)])
        limits = (count, leaves or None) if candidates else ()
        ids, scores = self._scann.search_batched(queries, count, *limits)
        ids, scores = ids[:n].astype(np.int64), scores[:n]
        missing = np.isnan(scores)
        return np.where(missing, -1, ids), np.where(missing, np.float32(-np.inf), scores)

    def _rank(
        self,
        queries: np.ndarray,
        query: np.ndarray,
        row: np.ndarray,
        ids: np.ndarray,
        scores: np.ndarray,
    ) -> None:
        """Scores pairs in float64 and writes the best of each query into `ids` and `scores`."""
        score = np.empty(len(query), np.float32)
        for start in range(0, len(query), _PAIRS):
            part = slice(start, start + _PAIRS)
            products = self._rows(row[part]).astype(np.float64) * queries[query[part]]
            score[part] = products.sum(axis=1)
        order = np.lexsort((row, -score, query))
        query, row, score = query[order], row[order], score[order]
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        kept = rank < ids.shape[1]
        ids[query[kept], rank[kept]] = row[kept]
        scores[query[kept], rank[kept]] = score[kept]

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        if self._whole is not None:
            return self._whole[ids]
        rows = np.empty((len(ids), self._shards[0].shape[1]), np.float32)
        shards = ids // SHARD_ROWS
        for shard in np.unique(shards):
            inside = shards == shard
            rows[inside] = self._shards[shard][ids[inside] % SHARD_ROWS]
        return rows
