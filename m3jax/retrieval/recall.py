"""Report that compares an index with exact search."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from m3jax.errors import RetrievalError
from m3jax.retrieval.index import Index
from m3jax.retrieval.search import SPARE, SearchResult
from m3jax.retrieval.tune import recall_at_k
from m3jax.text.jsonl import read_records


def read_queries(path: str | Path, most: int) -> list[str]:
    """Reads the first `most` texts of a file of JSON lines with `question` or `text`."""

    def parse(record: Any) -> str:
        return str(record["question"] if "question" in record else record["text"])

    form = 'a JSON object with "question" or "text"'
    return read_records(path, parse, "questions", form, most=most, error=RetrievalError)


def recall_report(index: Index, queries: Float32[np.ndarray, "n E"], k: int = 5) -> dict[str, Any]:
    """Compares `index.search` with exact search over the same embeddings, k references a query.

    Returns recall@k (ties count as returned), seconds a query of both searches, and `built_recall`,
    measured when the index was built (None for exact search). Raises `RetrievalError` without
    queries, with those of another width, or where the index has no embeddings to compare with.
    """
    queries = queries[queries.any(axis=1)]  # the rest finds nothing, exactly or not
    if not len(queries):
        raise RetrievalError("no query has a word that the knowledge base knows; give others")
    exact = index.search_exactly(queries, k + SPARE)
    result, seconds = _timed(lambda: index.search(queries, k))
    _, exact_seconds = _timed(lambda: index.search_exactly(queries, k))
    return {
        "queries": len(queries),
        "k": k,
        "references": index.size,
        "kind": index.kind,
        "recall": recall_at_k(result[0], exact),
        "seconds": seconds / len(queries),
        "exact_seconds": exact_seconds / len(queries),
        "time_over_exact": seconds / exact_seconds,
        "built_recall": index.recall,
    }


def recall_table(report: dict[str, Any]) -> str:
    """Formats the report as lines of text."""
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


def _timed(search: Callable[[], SearchResult]) -> tuple[SearchResult, float]:
    """Returns the result of a search and the least seconds of three runs."""
    return search(), min(timeit.repeat(search, number=1, repeat=3))
