"""Retriever: search, minus the references that would give away the text they accompany."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32, Int64

from m3jax.errors import RetrievalError
from m3jax.retrieval.search import SearchIndex
from m3jax.text.overlap import which_exceed
from m3jax.text.references import References

# Scores (n, c) of the references `ids` (n, c) for n texts; −inf for the id −1.
Rank = Callable[[Sequence[str], Int64[np.ndarray, "n c"]], Float32[np.ndarray, "n c"]]


class Retriever:
    """Searches an index and drops references by the overlap filter of Memory³ §6.1. Thread-safe.

    Attributes:
      counts: since this retriever was made, `searched`: queries with a word that the knowledge base
        knows; `returned`: references; `dropped`: references that ranked before the last of these
        and were dropped for their overlap; `unfilled`: places of the results that stayed −1.
    """

    def __init__(
        self,
        index: SearchIndex,
        references: References,
        candidates: int,
        overlap_limit: float,
        rank: Rank | None = None,
    ) -> None:
        """Makes a retriever; raises `RetrievalError` if the index is of other references.

        Per query `candidates` references are fetched and, with `rank`, put in order by its scores;
        one whose overlap with the text is above `overlap_limit` is dropped.
        """
        if index.references_fingerprint != references.fingerprint:
            raise RetrievalError(
                "the index was built from other references; open it with Index.open(folder,"
                " references) and rebuild it with launch/prepare.py"
            )
        self.index, self.references = index, references
        self.candidates, self.overlap_limit, self.rank = candidates, overlap_limit, rank
        self.counts = dict.fromkeys(("searched", "returned", "dropped", "unfilled"), 0)
        self._lock = threading.Lock()

    def retrieve(
        self, queries: Sequence[str], against: Sequence[np.ndarray] | None, k: int
    ) -> Int64[np.ndarray, "n k"]:
        """Returns ids of k references for every query, best first, −1 for none.

        Candidates with a score of 0 or less are not returned, so a query without a known word gets
        none. `against` are, for every query, the tokens of the text that its references must not
        contain; None = no filter. Raises `RetrievalError` where k is below 1, or `against` of
        another length than `queries`.
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
            scores = self.rank([queries[query] for query in searched.tolist()], candidates)
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
        """Returns the first k candidates of each query that do not leak, and counts leaking ones.

        Every round compares what the queries need next, each reference once: neighbouring chunks of
        a text find the same ones.
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
                lengths = np.asarray(self.references.lengths)[new]
                tokens = self.references.tokens(new)
                leaking = which_exceed(text, tokens, lengths, self.overlap_limit)
                leaks.update(zip(new.tolist(), leaking.tolist(), strict=True))
            for part, row, have in zip(needed, waiting, kept, strict=True):
                del row[: len(part)]
                have += [i for i in part if not leaks[i]]
                dropped += sum(leaks[i] for i in part)
        filled = np.full((len(kept), k), -1, np.int64)
        for row, have in zip(filled, kept, strict=True):
            row[: len(have)] = have
        return filled, dropped

    def report(self) -> dict[str, int]:
        """Returns the counters."""
        with self._lock:
            return dict(self.counts)


def _by_text(texts: Sequence[np.ndarray]) -> list[list[int]]:
    """Groups places of the same array: the chunks of a row share one text."""
    places: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        places.setdefault(id(text), []).append(place)
    return list(places.values())
