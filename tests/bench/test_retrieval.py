"""The benchmark of retrieval on a small set, and what it does without ScaNN."""

import sys

import pytest

from m3jax.bench.retrieval import retrieval
from m3jax.errors import RetrievalError
from m3jax.retrieval.search import import_scann


@pytest.mark.slow
@pytest.mark.skipif(import_scann() is None, reason="ScaNN has no wheel here")
def test_the_search_is_tuned_and_faster_than_the_exact_one():
    result = next(retrieval(21_000, 64))
    assert result["ratios"]["recall_at_5"] >= 0.92 and result["settings"]["tuned_recall"] >= 0.95
    assert result["settings"]["leaves"] == 145 and result["settings"]["leaves_searched"] < 73
    times = result["seconds"]["approximate"], result["seconds"]["exact"]
    assert 0 < times[0] < times[1]
    assert result["ratios"]["time_over_exact"] == pytest.approx(times[0] / times[1])


def test_without_scann_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(RetrievalError, match="pip install scann"):
        next(retrieval())
