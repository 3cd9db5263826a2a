"""Benchmark of the approximate search against the exact one, in one process and one thread."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from m3jax.errors import RetrievalError
from m3jax.retrieval.search import SHARD_ROWS, SPARE, Searcher, import_scann, scann_settings
from m3jax.retrieval.tune import QUERIES, fit, share_found

_ROWS, _DIMENSION, _K = 100_000, 384, 5
_TARGET = 0.95  # recall that the search is tuned to
_SEARCHED = 640  # queries of a round: ten blocks of the exact search
# Variables that libraries of linear algebra read when they are loaded.
_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_LEVELS = (8, 64, 512)  # nodes per level of the hierarchy of subjects
_SHARES = {"mean": 0.02, "level": 0.057, "topic": 0.26}  # of the variance; the rest is a row's own
_TOPIC_ROWS = 25
_QUERY_COSINE = 0.75


def retrieval(rounds: int = 21) -> dict[str, dict[str, float]]:
    """Recall at 5 and time of the tuned approximate search over 100 000 × 384 embeddings.

    Runs in a process of its own, in which NumPy has one thread, as ScaNN's calls have.

    Returns:
      `ratios`: `recall_at_5` and `time_over_exact`, the median of paired rounds of 640 queries;
      `seconds`: medians a query; `settings`: what was trained and tuned, and the recall on the
      held-out queries that it was tuned with.

    Raises:
      RetrievalError: ScaNN cannot be imported.
    """
    if import_scann() is None:
        raise RetrievalError("bench retrieval needs ScaNN; pip install scann where it has a wheel")
    command = [sys.executable, "-m", __name__, str(_ROWS), str(_DIMENSION), str(rounds)]
    environment = os.environ | dict.fromkeys(_THREADS, "1")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def sentence_like(
    rows: int, queries: int, dimension: int, seed: int = 0
) -> tuple[Float32[np.ndarray, "R E"], Float32[np.ndarray, "n E"]]:
    """Unit vectors distributed like a sentence encoder's of passages, and queries near some.

    A row is a sum of Gaussian vectors, normalised: one that all rows share (2 % of the variance),
    one of each of three nested subjects (8, 64 and 512 of them, 5.7 % each), one of its topic
    (26 %; 25 rows a topic on average) and one of its own. All have the covariance with eigenvalues
    (i + 30)^−1.3 in the same random basis. A query is a row with noise of that covariance at a
    cosine of 0.75. The shares were fitted to 37 000 passages of Wikipedia embedded by
    all-MiniLM-L6-v2: the spectrum (there 17, 47 and 69 % of the variance in 10, 50 and 100
    directions, here 16, 49 and 67 %), the mean cosine of a row with its 5th neighbour (0.55, here
    0.50), and the recall with few leaves searched, on which the benchmark depends (there 0.934 with
    6 of 192 leaves, here 0.946).

    Args:
      rows: embeddings R.
      queries: number n of queries, of distinct rows.
      dimension: width E.
      seed: of everything.
    """
    rng = np.random.default_rng(seed)
    spectrum = (np.arange(1, dimension + 1) + 30.0) ** -0.65
    spectrum = (spectrum / np.linalg.norm(spectrum)).astype(np.float32)
    basis = np.linalg.qr(rng.standard_normal((dimension, dimension)).astype(np.float32))[0]

    def draw(n: int) -> np.ndarray:
        return (rng.standard_normal((n, dimension), np.float32) * spectrum) @ basis

    topics = max(1, rows // _TOPIC_ROWS)
    centres = _SHARES["topic"] ** 0.5 * draw(topics) + _SHARES["mean"] ** 0.5 * draw(1)[[0]]
    leaf = rng.integers(_LEVELS[-1], size=topics)
    for nodes in _LEVELS:
        centres += _SHARES["level"] ** 0.5 * draw(nodes)[leaf * nodes // _LEVELS[-1]]
    own = 1 - _SHARES["mean"] - _SHARES["topic"] - len(_LEVELS) * _SHARES["level"]
    embeddings = np.empty((rows, dimension), np.float32)
    for start in range(0, rows, SHARD_ROWS):
        part = embeddings[start : start + SHARD_ROWS]
        part[:] = centres[rng.integers(topics, size=len(part))] + own**0.5 * draw(len(part))
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    noise = draw(queries)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    near = embeddings[rng.choice(rows, queries, replace=False)]
    asked = _QUERY_COSINE * near + (1 - _QUERY_COSINE**2) ** 0.5 * noise
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    return embeddings, asked.astype(np.float32)


def compare(rows: int, dimension: int, rounds: int) -> dict[str, dict[str, float]]:
    """What `retrieval` returns, measured in this process with the threads it has."""
    scann = import_scann()
    assert scann is not None
    embeddings, queries = sentence_like(rows, _SEARCHED + QUERIES, dimension)
    queries, held_out = queries[:_SEARCHED], queries[_SEARCHED:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "scann"
        begin = time.perf_counter()
        fitted = fit(scann, embeddings, held_out, scann_settings(rows), folder, _TARGET)
        built = time.perf_counter() - begin
        loaded = scann.load_searcher(str(folder))
    shards = [embeddings[i : i + SHARD_ROWS] for i in range(0, rows, SHARD_ROWS)]
    exact, approximate = Searcher(shards), Searcher(shards, loaded, fitted["effort"])
    recall = share_found(approximate.search(queries, _K)[0], exact.search(queries, _K + SPARE))
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        approximate.search(queries, _K)
        middle = time.perf_counter()
        exact.search(queries, _K)
        times.append((middle - begin, time.perf_counter() - middle))
    seconds = [statistics.median(column) / len(queries) for column in zip(*times, strict=True)]
    return {
        "ratios": {
            "recall_at_5": recall,
            "time_over_exact": statistics.median(a / b for a, b in times),
        },
        "seconds": {"approximate": seconds[0], "exact": seconds[1], "building": built},
        "settings": {
            **fitted["settings"],
            **{f"{key}_searched": value for key, value in fitted["effort"].items()},
            "tuned_recall": fitted["recall"],
        },
    }


if __name__ == "__main__":
    print(json.dumps(compare(*map(int, sys.argv[1:]))))
