"""The benchmark of retrieval on a small set, and what it does without ScaNN."""

import sys

import pytest

from m3jax.bench import retrieval as bench_retrieval
from m3jax.bench.main import BENCHMARKS
from m3jax.errors import RetrievalError
from m3jax.retrieval.search import import_scann


@pytest.mark.slow
@pytest.mark.skipif(import_scann() is None, reason="ScaNN has no wheel here")
def test_the_benchmark_measures_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(bench_retrieval, "_ROWS", 21_000)
    monkeypatch.setattr(bench_retrieval, "_DIMENSION", 64)
    result = BENCHMARKS["retrieval"](rounds=2)
    assert result["ratios"]["recall_at_5"] >= 0.92 and result["settings"]["tuned_recall"] >= 0.95
    assert result["settings"]["leaves"] == 145 and result["settings"]["leaves_searched"] < 73
    times = result["seconds"]["approximate"], result["seconds"]["exact"]
    assert 0 < times[0] < times[1]
    assert result["ratios"]["time_over_exact"] == pytest.approx(times[0] / times[1], rel=0.3)


def test_without_scann_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(RetrievalError, match="pip install scann"):
        BENCHMARKS["retrieval"]()
