"""Nearest references by dot product: exact in NumPy, approximate with ScaNN.

Both end in the same ranking of a few candidates, in float64 and one pair at a time, so that what a
query finds does not depend on which other queries share its batch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

SHARD_ROWS = 2**14  # embeddings per file, and per block of the exact search
_QUERIES = 64  # queries per block of the exact search
_PAIRS = 4096  # pairs scored at a time in float64
_MARGIN = 1e-5  # above the error of a float32 dot product of unit vectors
_SPARE = 16  # candidates beyond k that ScaNN returns, so that ties at the edge go to the lower id
_SCORE_ALL = 20_000  # references up to which ScaNN computes every score
_SCAN_ALL = 2**20  # references up to which it scans the code of every reference


def import_scann() -> ModuleType | None:
    """ScaNN's bindings without TensorFlow, or None where it has no wheel."""
    try:
        return importlib.import_module("scann").scann_ops_pybind
    except ImportError:
        return None


def scann_settings(references: int) -> dict[str, int]:
    """How ScaNN searches that many references; stored in the manifest.

    Up to 20 000 it computes every score. Beyond, it compares codes (asymmetric hashing, two
    dimensions a block) and computes the scores of the best `reordered`. Beyond 2²⁰ only codes in
    the `searched` nearest of `leaves` = √R clusters are compared. Lexical embeddings hardly
    cluster: of 50 000 pieces of Wikipedia, half the leaves held 0.97 of the five best, all codes
    0.995 in less time.
    """
    settings = {"leaves": 0, "searched": 0, "reordered": 0, "sample": 100_000}
    if references > _SCORE_ALL:
        settings["reordered"] = 256
    if references > _SCAN_ALL:
        settings["leaves"] = round(math.sqrt(references))
        settings["searched"] = math.ceil(settings["leaves"] / 2)
    return settings


def build_scann(
    scann: ModuleType,
    embeddings: Float32[np.ndarray, "R E"],
    settings: dict[str, int],
    folder: Path,
) -> None:
    """Trains a ScaNN searcher and writes it; the same bytes for the same embeddings.

    With random initial centres, ScaNN's default, two trainings differ; with k-means++ they do not,
    whatever the number of threads.
    """
    builder, sample = scann.builder(embeddings, 1, "dot_product"), settings["sample"]
    if settings["leaves"]:
        builder = builder.tree(
            settings["leaves"],
            settings["searched"],
            training_sample_size=sample,
            random_init=False,
            soar_lambda=1.5,
        )
    if settings["reordered"]:
        builder = builder.score_ah(2, training_sample_size=sample).reorder(settings["reordered"])
    else:
        builder = builder.score_brute_force()
    folder.mkdir(parents=True)
    builder.build().serialize(str(folder), relative_path=True)


class Searcher:
    """Search over stored embeddings. Safe to use from several threads; cannot be pickled."""

    def __init__(
        self,
        shards: Sequence[Float32[np.ndarray, "_ E"]],
        scann: Any = None,
        batched: bool = False,
    ):
        """Makes a searcher.

        Args:
          shards: all embeddings in order, every shard but the last of `SHARD_ROWS` rows.
          scann: a loaded ScaNN searcher over them, or None for exact search.
          batched: the ScaNN searcher computes every score.
        """
        self._shards, self._scann, self._batched = shards, scann, batched

    def search(
        self, queries: Float32[np.ndarray, "n E"], k: int
    ) -> tuple[Int64[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
        """The k best rows of every query, best first, ties by lower id; see `Index.search`."""
        ids = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        find = self._candidates_exact if self._scann is None else self._candidates_scann
        for start in range(0, len(queries), _QUERIES):
            block = slice(start, start + _QUERIES)
            self._rank(queries[block], *find(queries[block], k), ids[block], scores[block])
        return ids, scores

    def _candidates_exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (query, id) that hold the k best of every query, whatever the rounding."""
        pairs = []
        for shard, rows in enumerate(self._shards):
            scores = queries @ rows.T
            best = min(k, len(rows))
            kth = np.partition(scores, len(rows) - best, axis=1)[:, len(rows) - best]
            query, row = np.nonzero(scores >= kth[:, None] - _MARGIN)
            pairs.append((query, row + shard * SHARD_ROWS))
        query, row = (np.concatenate(part) for part in zip(*pairs, strict=True))
        return query, row

    def _candidates_scann(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The same from ScaNN, as far as it finds them.

        One query a call: its batched search may round differently with other queries beside, and
        then choose other clusters. Only where it computes every score does that not matter.
        """
        # Asked for more than there are, the batched search fills up with repeated ids.
        wanted = min(k + _SPARE, sum(len(rows) for rows in self._shards))
        if self._batched:
            found = list(self._scann.search_batched(queries, wanted)[0])
        else:
            found = [self._scann.search(query, wanted)[0] for query in queries]
        query = np.repeat(np.arange(len(queries)), [len(ids) for ids in found])
        return query, np.concatenate(found).astype(np.int64)

    def _rank(
        self,
        queries: np.ndarray,
        query: np.ndarray,
        row: np.ndarray,
        ids: np.ndarray,
        scores: np.ndarray,
    ) -> None:
        """Scores the pairs and writes the best of every query into `ids` and `scores`."""
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
        rows = np.empty((len(ids), self._shards[0].shape[1]), np.float32)
        shards = ids // SHARD_ROWS
        for shard in np.unique(shards):
            here = shards == shard
            rows[here] = self._shards[shard][ids[here] % SHARD_ROWS]
        return rows
