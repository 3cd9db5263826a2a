"""The retriever: candidates from the index, minus what overlaps, and its counters."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from m3jax.errors import RetrievalError
from m3jax.retrieval import retriever as retriever_module
from m3jax.retrieval.build import build_index
from m3jax.retrieval.index import Index
from m3jax.retrieval.lexical import LexicalEmbedder
from m3jax.retrieval.retriever import Retriever
from m3jax.text.overlap import overlap, which_exceed_either_way


@pytest.fixture(scope="module")
def texts(sentences):
    base = sentences(150, length=12)
    # Versions of the same text that overlap by different shares, so that the filter has work.
    versions = [" ".join(text.split()[:n] + ["zofa"] * (9 - n)) for text in base for n in (9, 6, 4)]
    return base + versions


@pytest.fixture(scope="module")
def references(texts, write, tmp_path_factory):
    return write(tmp_path_factory.mktemp("references"), texts)


@pytest.fixture
def index(references, config, tmp_path):
    config.retrieval.exact_below = 1000
    build_index(references, LexicalEmbedder(256), tmp_path / "index", config)
    return Index.open(tmp_path / "index", references)


@pytest.fixture
def rows(texts, tokenizer):
    """Tokens of texts of training, each of several references: the text that must not leak."""
    return [np.asarray(tokenizer.encode(" ".join(texts[i : i + 3]))) for i in range(0, 60, 2)]


@pytest.fixture
def queries(texts):
    return [texts[i] for i in range(0, 60, 2)]


def _slow(index, references, queries, against, candidates, limit, k):
    found, scores = index.search(index.embedder.embed(queries), candidates)
    ids, dropped = np.full((len(queries), k), -1), 0
    for i, text in enumerate(against):
        kept = []
        for j, score in zip(found[i].tolist(), scores[i], strict=True):
            if j < 0 or score <= 0 or len(kept) == k:
                continue
            reference = references.tokens([j])[0, : references.lengths[j]]
            if max(overlap(text, reference), overlap(reference, text)) > limit:
                dropped += 1
            else:
                kept.append(j)
        ids[i, : len(kept)] = kept
    return ids, dropped


@pytest.mark.parametrize("limit", [0.9, 2 / 3, 0.5])
@pytest.mark.parametrize("k", [1, 5])
def test_drops_exactly_what_the_slow_measure_says(index, references, queries, rows, limit, k):
    retriever = Retriever(index, references, 12, limit)
    ids = retriever.retrieve(queries, rows, k)
    expected, dropped = _slow(index, references, queries, rows, 12, limit, k)
    np.testing.assert_array_equal(ids, expected)
    assert dropped > 10
    assert retriever.report() == {
        "searched": len(queries),
        "returned": int((ids >= 0).sum()),
        "dropped": dropped,
        "unfilled": int((ids < 0).sum()),
    }


@pytest.mark.parametrize("limit", [0.9, 2 / 3, 0.5])
def test_a_reference_that_holds_a_shorter_text_is_dropped(
    index, references, texts, tokenizer, limit
):
    """A question: little of the reference occurs in it, but all of it in the reference."""
    short = [" ".join(text.split()[:5]) for text in texts[:30]]
    against = [np.asarray(tokenizer.encode(text)) for text in short]
    retriever = Retriever(index, references, 12, limit)
    ids = retriever.retrieve(short, against, 5)
    expected, dropped = _slow(index, references, short, against, 12, limit, 5)
    np.testing.assert_array_equal(ids, expected)
    assert retriever.report()["dropped"] == dropped > 10
    assert not (ids == np.arange(30)[:, None]).any()


def test_order_and_company_of_queries_do_not_matter(index, references, queries, rows):
    retriever = Retriever(index, references, 12, 2 / 3)
    ids = retriever.retrieve(queries, rows, 3)
    order = np.random.default_rng(0).permutation(len(queries))
    shuffled = retriever.retrieve([queries[i] for i in order], [rows[i] for i in order], 3)
    np.testing.assert_array_equal(shuffled, ids[order])
    for i in (0, 11):
        np.testing.assert_array_equal(retriever.retrieve([queries[i]], [rows[i]], 3)[0], ids[i])


def test_without_a_text_to_protect_nothing_is_dropped(index, references, queries):
    retriever = Retriever(index, references, 12, 0.5)
    ids = retriever.retrieve(queries, None, 4)
    np.testing.assert_array_equal(ids, index.search(index.embedder.embed(queries), 4)[0])
    assert ids[:, 0].tolist() == list(range(0, 60, 2))
    assert retriever.counts["dropped"] == 0


def test_another_limit_keeps_rank_and_weight(index, references, queries):
    """What evaluation searches with is what generation does."""

    def rank(_, ids):
        return np.where(ids < 0, -np.inf, -1e-4 * ids).astype(np.float32)

    retriever = Retriever(index, references, 12, 0.5, rank, 1e6)
    other = retriever.with_limit(1.0)
    assert (other.overlap_limit, other.candidates) == (1.0, 12)
    ids = other.retrieve(queries, None, 4)
    np.testing.assert_array_equal(ids, np.sort(ids, axis=1))
    np.testing.assert_array_equal(ids, retriever.retrieve(queries, None, 4))
    light = Retriever(index, references, 12, 0.5, rank, 1.0).retrieve(queries, None, 4)
    assert not np.array_equal(light, ids)  # the weight matters


def test_queries_without_words_find_nothing(index, references, queries, rows):
    retriever = Retriever(index, references, 12, 0.9)
    ids = retriever.retrieve(["", queries[0], " …!", "unheardof"], rows[:4], 2)
    assert (ids[[0, 2, 3]] == -1).all() and (ids[1] >= 0).all()
    assert retriever.report() == {
        "searched": 1,
        "returned": 2,
        "dropped": retriever.counts["dropped"],
        "unfilled": 6,
    }
    assert retriever.retrieve([], [], 2).shape == (0, 2)
    assert retriever.retrieve(["", ""], None, 2).tolist() == [[-1, -1]] * 2


def test_candidates_without_similarity_are_not_returned(write, config, tmp_path):
    references = write(tmp_path / "r", ["dafa lema", "gana kofi", "zoga zofi"])
    build_index(references, LexicalEmbedder(512), tmp_path / "i", config)
    retriever = Retriever(Index.open(tmp_path / "i"), references, 3, 0.9)
    assert retriever.retrieve(["lema"], None, 5).tolist() == [[0, -1, -1, -1, -1]]
    assert retriever.counts["unfilled"] == 4


def test_the_filter_stops_when_it_has_enough(index, references, queries, rows, monkeypatch):
    compared = []

    def counting(text, tokens, lengths, threshold):
        compared.append(len(tokens))
        return np.zeros(len(tokens), bool)

    monkeypatch.setattr(retriever_module, "which_exceed_either_way", counting)
    Retriever(index, references, 12, 0.9).retrieve(queries, rows, 3)
    assert compared == [3] * len(queries)


def test_queries_of_one_text_share_its_comparisons(index, references, queries, rows, monkeypatch):
    """The chunks of a row: same result and counts as alone, every reference compared once."""
    near = [queries[0], queries[1], queries[0], f"{queries[0]} {queries[2]}"]
    compared = []

    def recording(text, tokens, lengths, threshold):
        compared.append(tokens)
        return which_exceed_either_way(text, tokens, lengths, threshold)

    monkeypatch.setattr(retriever_module, "which_exceed_either_way", recording)
    for against in ([rows[0]] * 4, [rows[0], rows[1], rows[0], rows[1]]):
        together, alone = (Retriever(index, references, 12, 0.5) for _ in range(2))
        compared.clear()
        ids = together.retrieve(near, against, 3)
        once = np.concatenate(compared)
        for i in range(4):
            found = alone.retrieve(near[i : i + 1], against[i : i + 1], 3)
            np.testing.assert_array_equal(found[0], ids[i])
        assert together.report() == alone.report() and together.counts["dropped"] > 0
        if against[1] is rows[0]:
            assert len(np.unique(once, axis=0)) == len(once)


def test_more_wanted_than_candidates(index, references, queries):
    ids = Retriever(index, references, 2, 0.9).retrieve(queries[:2], None, 6)
    assert (ids >= 0).all()


def test_threads_count_and_find_the_same(index, references, queries, rows):
    alone = Retriever(index, references, 12, 2 / 3)
    expected = alone.retrieve(queries, rows, 3)
    shared = Retriever(index, references, 12, 2 / 3)
    with ThreadPoolExecutor(8) as pool:
        tasks = [pool.submit(shared.retrieve, queries, rows, 3) for _ in range(24)]
        for task in tasks:
            np.testing.assert_array_equal(task.result(), expected)
    assert shared.report() == {name: 24 * n for name, n in alone.report().items()}


def test_misuse_is_refused(index, references, queries, rows, write, tmp_path):
    retriever = Retriever(index, references, 12, 0.9)
    with pytest.raises(RetrievalError, match="30 queries with 2 texts"):
        retriever.retrieve(queries, rows[:2], 1)
    with pytest.raises(RetrievalError, match="k = 0"):
        retriever.retrieve(queries, None, 0)
    with pytest.raises(RetrievalError, match="built from other references"):
        Retriever(index, write(tmp_path / "other", ["dafa"]), 12, 0.9)
