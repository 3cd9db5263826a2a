"""Recall: how it is counted, what tuning chooses by it, and the report."""

import itertools

import numpy as np
import pytest
from tolerance import close

from m3jax.bench.retrieval import sentence_like
from m3jax.errors import RetrievalError, TextError
from m3jax.retrieval import tune
from m3jax.retrieval.build import build_index
from m3jax.retrieval.index import Index
from m3jax.retrieval.lexical import LexicalEmbedder
from m3jax.retrieval.search import ALL_CODES, SPARE, Searcher, import_scann
from m3jax.retrieval.tune import read_queries, recall_report, recall_table

needs_scann = pytest.mark.skipif(import_scann() is None, reason="ScaNN has no wheel here")


def test_share_found_counts_ties_as_found_and_each_query_once():
    ids = np.array([[4, 2, 8, 5], [1, -1, -1, -1]])
    scores = np.array([[0.9, 0.5, 0.5, 0.1], [0.3, -np.inf, -np.inf, -np.inf]], np.float32)
    cases = [
        ([[4, 2], [1, -1]], 1),
        ([[8, 4], [1, -1]], 1),  # 8 ties with 2
        ([[8, 2], [1, -1]], 2 / 3),  # one of them has the place of the tie, none that of 4
        ([[5, 4], [1, -1]], 2 / 3),
        ([[-1, -1], [-1, -1]], 0),
        ([[3, 7], [1, -1]], 1 / 3),
    ]
    for found, expected in cases:
        assert tune.recall_at_k(np.array(found), (ids, scores)) == pytest.approx(expected), found


def test_embeddings_of_the_benchmark_are_distributed_as_it_says():
    rows, queries = sentence_like(20_000, 100, 384)
    close(np.linalg.norm(rows, axis=1), 1)
    close(np.linalg.norm(queries, axis=1), 1)
    values = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    share = np.cumsum(values) / values.sum()
    close(share[[9, 49, 99]], [0.16, 0.49, 0.67], 0.02)
    scores = np.sort(queries @ rows.T)[:, ::-1]
    assert scores[:, 0].mean() == pytest.approx(0.75, rel=0.04)
    assert np.sort(rows[:100] @ rows.T)[:, -5].mean() == pytest.approx(0.5, rel=0.08)
    again, _ = sentence_like(20_000, 100, 384)
    np.testing.assert_array_equal(again, rows)


@needs_scann
@pytest.mark.slow
@pytest.mark.parametrize("standalone", [False, True])
def test_tuning_finds_a_cheap_search_of_clustered_embeddings(standalone, tmp_path):
    rows, queries = sentence_like(25_000, 512, 64)
    held_out, queries = queries[:256], queries[256:]
    settings = {"leaves": 100, "block": 4, "sample": 25_000}
    scann = import_scann()
    fits = [
        tune.fit(scann, rows, held_out, settings, tmp_path / str(i), 0.95, standalone)
        for i in (0, 1)
    ]
    assert fits[0] == fits[1] and fits[0]["settings"] == settings
    assert fits[0]["recall"] >= 0.95 and fits[0]["effort"]["leaves"] < 50
    shards = [rows[i : i + 2**14] for i in range(0, len(rows), 2**14)]
    searcher = Searcher(
        [] if standalone else shards,
        scann.load_searcher(str(tmp_path / "0")),
        fits[0]["effort"],
    )
    exact = Searcher(shards).search(queries, 5 + SPARE)
    assert tune.recall_at_k(searcher.search(queries, 5)[0], exact) >= 0.93
    # Half as many leaves miss the target.
    exact = Searcher(shards).search(held_out, 5 + SPARE)
    effort = fits[0]["effort"]
    searcher.effort = {**effort, "leaves": effort["leaves"] // 2}
    assert tune.recall_at_k(searcher.search(held_out, 5)[0], exact) < 0.95


@needs_scann
@pytest.mark.slow
def test_embeddings_that_do_not_cluster_are_searched_without_leaves(tmp_path):
    rng = np.random.default_rng(0)
    rows, queries = (rng.standard_normal((n, 256), np.float32) for n in (5000, 200))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    settings = {"leaves": 70, "block": 4, "sample": 5000}
    fitted = tune.fit(import_scann(), rows, queries, settings, tmp_path / "scann", 0.95)
    assert fitted["settings"] == ALL_CODES and fitted["effort"]["leaves"] == 0
    assert fitted["recall"] >= 0.95


@needs_scann
@pytest.mark.slow
def test_searching_in_leaves_does_not_depend_on_other_queries(tmp_path):
    rows, queries = sentence_like(25_000, 600, 128)
    scann, settings = import_scann(), {"leaves": 158, "block": 4, "sample": 25_000}
    tune.fit(scann, rows, queries[:100], settings, tmp_path / "scann", 0.95)
    loaded = scann.load_searcher(str(tmp_path / "scann"))
    shards = [rows[i : i + 2**14] for i in range(0, len(rows), 2**14)]
    rng = np.random.default_rng(0)
    for leaves, candidates in itertools.product([1, 3, 12], [24, 64]):
        searcher = Searcher(shards, loaded, {"leaves": leaves, "candidates": candidates})
        expected = searcher.search(queries, 9)
        # ScaNN's own scores too: another rounding could choose other leaves for another batch.
        together = searcher._candidates(queries[:64], 9)
        for one in (0, 1, 40, 63):
            alone = searcher._candidates(queries[one : one + 1], 9)
            for got, wanted in zip(alone, together, strict=True):
                np.testing.assert_array_equal(got[0], wanted[one])
        for _ in range(4):
            order = rng.permutation(len(queries))
            cuts = np.sort(rng.choice(len(queries), 9, replace=False))
            parts = [searcher.search(queries[part], 9) for part in np.split(order, cuts)]
            for got, wanted in zip(
                map(np.concatenate, zip(*parts, strict=True)), expected, strict=True
            ):
                np.testing.assert_array_equal(got, wanted[order])


@pytest.fixture
def index(sentences, write, config, tmp_path):
    texts = sentences(200)
    references = write(tmp_path / "references", texts)
    config.retrieval.exact_below = 0
    build_index(references, LexicalEmbedder(64), tmp_path / "index", config)
    return Index.open(tmp_path / "index", references), references


@needs_scann
def test_the_report_agrees_with_counting(index, monkeypatch):
    index, references = index
    queries = tune.sample_queries(references, index.embedder, 40)
    assert queries.shape == (40, 64)
    report = recall_report(index, queries, k=3)
    assert report["recall"] == 1 and report["queries"] == 40 and report["kind"] == "scann"
    assert report["built_recall"] == 1 and report["time_over_exact"] > 0
    whole = index.search
    monkeypatch.setattr(
        index,
        "search",
        lambda queries, k: tuple(
            np.roll(part, 1, axis=1) if part.dtype == np.int64 else part
            for part in whole(queries, k)
        ),
    )
    assert recall_report(index, queries, 3)["recall"] == 1  # a set, whatever its order
    monkeypatch.setattr(
        index,
        "search",
        lambda queries, k: (
            np.where(np.arange(k) == 0, -1, whole(queries, k)[0]),
            whole(queries, k)[1],
        ),
    )
    report = recall_report(index, queries, 3)
    assert report["recall"] == pytest.approx(2 / 3, rel=0.03)
    assert f"{report['recall']:.4f}" in recall_table(report)
    with pytest.raises(RetrievalError, match="no query has a word"):
        recall_report(index, np.zeros((3, 64), np.float32))


def test_files_of_queries(tmp_path):
    path = tmp_path / "queries.jsonl"
    path.write_text('{"question": "a?"}\n\n{"text": "b"}\n{"question": "d"}\n')
    assert read_queries(path, 2) == ["a?", "b"] and read_queries(path, 9) == ["a?", "b", "d"]
    for content, words in {
        '{"text": "a"}\n{"prompt": 1}\n': ":2: expected a JSON object with",
        "{": ":1: not valid JSON",
        "[1]": ":1: a JSON list; expected a JSON object with",
        '{"text": "c", "question": "d"}': "it has 'question' and 'text'; leave all but one out",
        "\n": "holds no questions",
    }.items():
        path.write_text(content)
        with pytest.raises(TextError, match=words):
            read_queries(path, 9)
    with pytest.raises(TextError, match="does not exist"):
        read_queries(tmp_path / "none.jsonl", 9)
