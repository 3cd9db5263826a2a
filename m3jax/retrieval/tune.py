"""Trains and tunes ScaNN for the cheapest search with enough recall; measures recall of an index.

The number of clusters to search depends on how well the embeddings cluster, not only on their
number: 4 % of the clusters contain the results of a query for sentence embeddings, whereas half of
them do not suffice for lexical embeddings.
"""

from __future__ import annotations

import shutil
import timeit
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from m3jax.errors import RetrievalError
from m3jax.reading import only_field, read_records
from m3jax.retrieval.embedder import Embedder
from m3jax.retrieval.index import Index
from m3jax.retrieval.search import ALL_CODES, SHARD_ROWS, SPARE, Searcher, SearchResult, build_scann
from m3jax.text.references import References

QUERIES = 512  # held-out queries for measuring recall
_K = 5
_CANDIDATES = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24)


def sample_queries(
    references: References, embedder: Embedder, count: int, ids: range | None = None
) -> Float32[np.ndarray, "n E"]:
    """Embeds the second halves of up to `count` texts, evenly spread over the references `ids`.

    As queries they find their own reference and its neighbours, like adjacent text in a corpus.
    Halves whose embedding is zero are left out.
    """
    ids = range(len(references)) if ids is None else ids
    places = np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(np.int64)
    texts = references.texts(ids.start + places)
    embeddings = embedder.embed_queries([text[len(text) // 2 :] for text in texts])
    return embeddings[embeddings.any(axis=1)]


def recall_at_k(ids: Int64[np.ndarray, "n first"], exact: SearchResult) -> float:
    """Computes recall@k: the fraction of the exact k best that an approximate search returned.

    `exact` is the result of the exact search for `k + SPARE` references, so that ids whose score
    equals the k-th count as correct.
    """
    best, scores = exact
    k = min(ids.shape[1], best.shape[1])
    kth = scores[:, k - 1 : k]
    hits = ((ids[:, :, None] == best[:, None, :]) & (best >= 0)[:, None, :]).any(axis=1)
    better, tied = scores > kth, scores == kth
    places = k - better.sum(axis=1)  # left for ids whose score equals the k-th
    shared = np.minimum((hits & tied).sum(axis=1), places)
    existing = (best[:, :k] >= 0).sum()
    return float(((hits & better).sum() + shared.sum()) / max(existing, 1))


def fit(
    scann: ModuleType,
    embeddings: Float32[np.ndarray, "R E"],
    queries: Float32[np.ndarray, "n E"],
    settings: dict[str, int],
    folder: Path,
    target: float,
    standalone: bool = False,
) -> dict[str, Any]:
    """Trains, writes and tunes a ScaNN searcher, deterministically.

    If half of the leaves or more would have to be searched, because the embeddings do not cluster,
    comparing all codes is faster, and the searcher is trained again without leaves.

    Args:
      scann, embeddings, settings, folder, standalone: as in `build_scann`.
      queries: held-out queries, of the same distribution as later queries.
      target: recall@5 to reach; the result is lower if even the largest effort does not reach it.

    Returns:
      The final `settings`, the `effort` for `Searcher`, and `recall`, the recall@5 of the queries.
    """
    shards = [embeddings[i : i + SHARD_ROWS] for i in range(0, len(embeddings), SHARD_ROWS)]
    exact = Searcher(shards).search(queries, _K + SPARE)
    while True:
        build_scann(scann, embeddings, settings, folder, standalone)
        loaded = scann.load_searcher(str(folder))
        searcher = Searcher([] if standalone else shards, loaded)
        effort = searcher.effort
        if settings["block"]:
            best = _least_effort(searcher, settings, embeddings.shape, queries, exact, target)
            if best is None and settings["leaves"]:
                shutil.rmtree(folder)
                settings = ALL_CODES
                continue
            effort = best or {"leaves": 0, "candidates": _CANDIDATES[0]}
        searcher.effort = effort
        reached = recall_at_k(searcher.search(queries, _K)[0], exact)
        return {"settings": settings, "effort": effort, "recall": reached}


def _least_effort(
    searcher: Searcher,
    settings: dict[str, int],
    shape: tuple[int, ...],
    queries: np.ndarray,
    exact: SearchResult,
    target: float,
) -> dict[str, int] | None:
    """Returns the cheapest effort that reaches the target recall; None if none does.

    Fewer candidates need more leaves, so the search follows the border of the efforts that reach
    the target.
    """
    steps, step = [0], 4
    if settings["leaves"]:
        steps = []
        while 2 * step < settings["leaves"]:
            steps.append(step)
            step = max(step + 1, round(1.2 * step))
    remaining, leaves, best = list(_CANDIDATES), 0, {}
    while remaining and leaves < len(steps):
        searcher.effort = {"leaves": steps[leaves], "candidates": remaining[0]}
        if recall_at_k(searcher.search(queries, _K)[0], exact) >= target:
            best[_cost(searcher.effort, settings, shape)] = searcher.effort
            remaining.pop(0)
        else:
            leaves += 1
    return best[min(best)] if best else None


def _cost(effort: dict[str, int], settings: dict[str, int], shape: tuple[int, ...]) -> float:
    """Estimates the nanoseconds of a query, with coefficients measured on one machine."""
    rows, dimension = shape
    compared = 2 * rows * effort["leaves"] / max(settings["leaves"], 1)  # each row is in two leaves
    codes = compared * dimension / settings["block"]
    return 0.05 * codes + 1.6 * dimension * effort["candidates"]


def read_queries(path: str | Path, most: int) -> list[str]:
    """Reads up to `most` queries from a JSON-lines file with `question` or `text`.

    Raises `TextError` if the file cannot be read, is empty, or has a line of another form.
    """

    def parse(record: dict[str, Any]) -> str:
        text = record[only_field(record, "question", "text")]
        if not isinstance(text, str) or not text.strip():
            raise TypeError("an empty text, or none")
        return text

    form = 'a JSON object with "question" or "text"'
    return read_records(path, parse, "questions", form, most=most)


def recall_report(index: Index, queries: Float32[np.ndarray, "n E"], k: int = 5) -> dict[str, Any]:
    """Compares `index.search` with exact search over the same embeddings, k references per query.

    Where there are fewer references, all of them are compared.

    Returns counts, recall@k (ties count as correct), seconds per query of both searches, and
    `built_recall`, the recall@5 measured during the build (None for exact search). Raises
    `RetrievalError` if no query has a known word, the queries have another width than the index, k
    is below 1, or the index keeps no embeddings.
    """
    k = min(k, index.size)
    queries = queries[queries.any(axis=1)]  # queries of zeros find nothing in either search
    if not len(queries):
        raise RetrievalError("no query has a word that the knowledge base knows; give others")
    exact, (ids, _) = index.search_exactly(queries, k + SPARE), index.search(queries, k)
    seconds, exact_seconds = (
        min(timeit.repeat(partial(search, queries, k), number=1, repeat=3))
        for search in (index.search, index.search_exactly)
    )
    return {
        "queries": len(queries),
        "k": k,
        "references": index.size,
        "kind": index.kind,
        "recall": recall_at_k(ids, exact),
        "seconds": seconds / len(queries),
        "exact_seconds": exact_seconds / len(queries),
        "time_over_exact": seconds / exact_seconds,
        "built_recall": index.recall,
    }


def recall_table(report: dict[str, Any]) -> str:
    """Formats the result of `recall_report` as a table of text lines."""
    built = report["built_recall"]
    rows = {
        "references": report["references"],
        "search": report["kind"],
        "queries": report["queries"],
        f"recall at {report['k']}": f"{report['recall']:.4f}",
        "recall at 5 when built": "–" if built is None else f"{built:.4f}",
        "milliseconds a query": f"{report['seconds'] * 1e3:.3f}",
        "exact": f"{report['exact_seconds'] * 1e3:.3f}",
        "time over exact": f"{report['time_over_exact']:.3f}",
    }
    return "\n".join(f"{name:24}{value:>12}" for name, value in rows.items())
