"""Retriever: searches references and drops any that overlap with the text being predicted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int64

from m3jax.errors import RetrievalError
from m3jax.retrieval.search import SearchIndex
from m3jax.text.overlap import which_exceed_either_way
from m3jax.text.references import References

# Reranker: returns the scores (n, c) of candidate ids (n, c) for n queries; −inf for the id −1.
Rank = Callable[[Sequence[str], Int64[np.ndarray, "n c"]], Float32[np.ndarray, "n c"]]


class Retriever:
    """Searches an index and applies the overlap filter of Memory³ §6.1. Thread-safe.

    Attributes:
      counts: totals since the retriever was made. `searched`: queries whose embedding is not zero;
        `returned`: references in results; `dropped`: candidates that the overlap filter removed
        while filling the results; `unfilled`: places in results that stayed −1.
    """

    def __init__(
        self,
        index: SearchIndex,
        references: References,
        candidates: int,
        overlap_limit: float,
        rank: Rank | None = None,
        weight: float = 1.0,
    ) -> None:
        """Makes a retriever; raises `RetrievalError` if the index is of other references.

        Args:
          index, references: index to search, and the references that it was built from.
          candidates: number of references that are fetched from the index per query.
          overlap_limit: candidates whose overlap with the text, or the text's with them, is above
            this fraction (0 to 1) are dropped.
          rank: its scores, times `weight`, are added to the candidates' scores in the index, and
            reorder them; None = order of the index.
        """
        if index.references_fingerprint != references.fingerprint:
            raise RetrievalError(
                "the index was built from other references; open it with Index.open(folder,"
                " references) and rebuild it with launch/prepare.py"
            )
        self.index, self.references = index, references
        self.candidates, self.overlap_limit = candidates, overlap_limit
        self.rank, self.weight = rank, weight
        self.counts = dict.fromkeys(("searched", "returned", "dropped", "unfilled"), 0)
        self._lock = threading.Lock()

    def with_limit(self, overlap_limit: float) -> Retriever:
        """Returns a retriever that searches and ranks as this one, with another overlap limit."""
        parts = self.index, self.references, self.candidates, overlap_limit
        return Retriever(*parts, self.rank, self.weight)

    def retrieve(
        self, queries: Sequence[str], against: Sequence[np.ndarray] | None, k: int
    ) -> Int64[np.ndarray, "n k"]:
        """Returns the ids of up to k references for each query, best first, filled up with −1.

        Candidates whose score in the index is 0 or less are not returned, so that a query without
        known words gets none. `against` has, for each query, the tokens of the text with which its
        references must not overlap; None = no filter. Raises `RetrievalError` if k is below 1, or
        `queries` and `against` differ in length.
        """
        if k < 1:
            raise RetrievalError(f"k = {k} references per query; ask for at least 1")
        if against is not None and len(against) != len(queries):
            raise RetrievalError(
                f"{len(queries)} queries with {len(against)} texts to filter against; give one each"
            )
        ids = np.full((len(queries), k), -1, np.int64)
        embeddings = self.index.embedder.embed_queries(queries)
        searched = np.flatnonzero(embeddings.any(axis=1))
        candidates, scores = self.index.search(embeddings[searched], max(self.candidates, k))
        candidates = np.where(scores > 0, candidates, -1)
        if self.rank is not None:
            texts = [queries[query] for query in searched.tolist()]
            scores = scores + self.weight * self.rank(texts, candidates)
            order = np.lexsort(
                (np.where(candidates < 0, self.index.size, candidates), -scores), axis=1
            )
            candidates = np.take_along_axis(candidates, order, axis=1)
        dropped = 0
        if against is None:
            ids[searched] = candidates[:, :k]
        else:
            for places in _by_text([against[query] for query in searched.tolist()]):
                text = against[int(searched[places[0]])]
                ids[searched[places]], leaking = self._survivors(candidates[places], text, k)
                dropped += leaking
        with self._lock:
            self.counts["searched"] += len(searched)
            self.counts["returned"] += int((ids >= 0).sum())
            self.counts["dropped"] += dropped
            self.counts["unfilled"] += int((ids < 0).sum())
        return ids

    def _survivors(
        self, candidates: Int64[np.ndarray, "n c"], text: np.ndarray, k: int
    ) -> tuple[Int64[np.ndarray, "n k"], int]:
        """Returns each query's first k candidates that do not overlap, and the number dropped.

        All queries have the same text. Each round compares the next needed candidates of all
        queries, each reference only once, because neighbouring chunks find the same references.
        """
        leaks: dict[int, bool] = {}
        waiting = [row[row >= 0].tolist() for row in candidates]  # best first
        kept: list[list[int]] = [[] for _ in waiting]
        dropped = 0
        while any(
            needed := [row[: k - len(have)] for row, have in zip(waiting, kept, strict=True)]
        ):
            new = np.array(sorted(set().union(*needed) - leaks.keys()), np.int64)
            if len(new):
                leaking = self.overlapping(new, text)
                leaks.update(zip(new.tolist(), leaking.tolist(), strict=True))
            for part, row, have in zip(needed, waiting, kept, strict=True):
                del row[: len(part)]
                have += [i for i in part if not leaks[i]]
                dropped += sum(leaks[i] for i in part)
        filled = np.full((len(kept), k), -1, np.int64)
        for row, have in zip(filled, kept, strict=True):
            row[: len(have)] = have
        return filled, dropped

    def overlapping(self, ids: Int64[np.ndarray, " n"], text: np.ndarray) -> Bool[np.ndarray, " n"]:
        """Returns True for each reference whose overlap with a text is above the limit."""
        lengths = np.asarray(self.references.lengths)[ids]
        tokens = self.references.tokens(ids)
        return which_exceed_either_way(text, tokens, lengths, self.overlap_limit)

    def report(self) -> dict[str, int]:
        """Returns a copy of the counters."""
        with self._lock:
            return dict(self.counts)


def _by_text(texts: Sequence[np.ndarray]) -> list[list[int]]:
    """Groups positions of the same array object: all chunks of a row share one text."""
    places: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        places.setdefault(id(text), []).append(place)
    return list(places.values())
