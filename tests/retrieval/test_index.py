"""The index: exact and ScaNN search, and what a folder may go through."""

import inspect
import shutil
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
from tolerance import close

from m3jax.errors import RetrievalError
from m3jax.retrieval import build as build_module
from m3jax.retrieval import index as index_module
from m3jax.retrieval import search, tune
from m3jax.retrieval.build import build_index
from m3jax.retrieval.index import Index
from m3jax.retrieval.lexical import LexicalEmbedder
from m3jax.retrieval.search import Searcher, import_scann

needs_scann = pytest.mark.skipif(import_scann() is None, reason="ScaNN has no wheel here")


@pytest.fixture(scope="module")
def texts(sentences):
    return [*sentences(298), "twin zofa", "twin zofa"]


@pytest.fixture(scope="module")
def references(texts, write, tmp_path_factory):
    return write(tmp_path_factory.mktemp("references"), texts)


@pytest.fixture
def build(references, config, tmp_path):
    """Builds in `tmp_path/name` with exact search up to `exact_below` references."""

    def build(name="index", exact_below=1000, references=references):
        config.retrieval.exact_below = exact_below
        build_index(references, LexicalEmbedder(64), tmp_path / name, config)
        return tmp_path / name

    return build


def _slow(queries, rows, k):
    """Sorted by (−score, id) in a loop."""
    ids, scores = np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf, np.float32)
    for i, query in enumerate(queries):
        score = [np.float32(np.sum(query.astype(np.float64) * row)) for row in rows]
        best = sorted(range(len(rows)), key=lambda j: (-score[j], j))[:k]
        ids[i, : len(best)], scores[i, : len(best)] = best, [score[j] for j in best]
    return ids, scores


def _shard(rows, size, monkeypatch):
    monkeypatch.setattr(search, "SHARD_ROWS", size)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@pytest.mark.parametrize("size", [7, 300])
def test_exact_search_is_the_plain_loop(size, monkeypatch):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 8)).astype(np.float32)
    rows[20:30] = rows[3]  # ties
    rows[33] = 0
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    queries = np.concatenate([rows, rng.standard_normal((30, 8)).astype(np.float32)])
    searcher = Searcher(_shard(rows, size, monkeypatch))
    for k in (1, 5, 40, 43):
        for got, expected in zip(searcher.search(queries, k), _slow(queries, rows, k), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_references_find_themselves_and_columns_stay_unfilled(build, references, texts):
    index = Index.open(build(), references)
    assert (index.size, index.kind, index.dimension) == (300, "exact", 64)
    ids, scores = index.search(index.embedder.embed(texts), 302)
    np.testing.assert_array_equal(ids[:299, 0], np.arange(299))
    assert ids[299, :2].tolist() == [298, 299]  # the twins' tie goes to the lower id
    close(scores[:, 0], 1)
    assert (np.diff(scores[:, :300]) <= 0).all()
    np.testing.assert_array_equal(ids[:, 300:], -1)
    np.testing.assert_array_equal(scores[:, 300:], -np.inf)
    ids, scores = index.search(np.zeros((0, 64), np.float32), 3)
    assert ids.shape == scores.shape == (0, 3)


@needs_scann
def test_scann_equals_exact_search_where_it_computes_every_score(build, texts):
    exact, scann = Index.open(build("a")), Index.open(build("b", exact_below=0))
    assert (exact.kind, scann.kind) == ("exact", "scann")
    assert exact.fingerprint != scann.fingerprint
    queries = exact.embedder.embed([text[:60] for text in texts])
    for k in (5, 310):
        for a, b in zip(exact.search(queries, k), scann.search(queries, k), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture
def train(monkeypatch, config):
    """Makes small indices train and search as large ones do: "codes" or "leaves"."""

    def train(kind):
        settings = {"leaves": 20, "block": 4, "sample": 1000}
        settings = search.ALL_CODES if kind == "codes" else settings
        monkeypatch.setattr(build_module, "scann_settings", lambda references: settings)
        config.retrieval.recall = 0.5

    return train


KINDS = ["exact", "every score", "codes", "leaves"]


@needs_scann
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_query_finds_the_same_in_any_batch(kind, keep, build, texts, train, config):
    if kind in ("codes", "leaves"):
        train(kind)
    config.retrieval.keep_embeddings = keep
    index = Index.open(build(exact_below=1000 if kind == "exact" else 0))
    queries = index.embedder.embed([text[:50] for text in texts])
    ids, scores = index.search(queries, 6)
    more = index.search(queries[:5], 310)  # than there are, or than are in the leaves searched
    np.testing.assert_array_equal(np.isneginf(more[1]), more[0] < 0)
    assert (more[0][:, -1] < 0).all()
    order = np.random.default_rng(0).permutation(len(texts))
    parts = np.split(order, [1, 2, 5, 70, 71, 200])
    shuffled = [index.search(queries[part], 6) for part in parts]
    np.testing.assert_array_equal(np.concatenate([p[0] for p in shuffled]), ids[order])
    np.testing.assert_array_equal(np.concatenate([p[1] for p in shuffled]), scores[order])


@needs_scann
@pytest.mark.slow
def test_recall_of_the_approximate_search(sentences, tmp_path, monkeypatch):
    texts = sentences(22_000, length=60)
    embedder = LexicalEmbedder(128)
    embedder.fit(texts)
    rows = embedder.embed(texts)

    def questions(first):
        # Each shares a stretch of 30 words with its reference, and 15 with another.
        pairs = zip(texts[first : first + 400], texts[first + 1000 : first + 1400], strict=True)
        return embedder.embed([f"{a[-150:]} {b[:75]}" for a, b in pairs])

    scann, settings = import_scann(), search.scann_settings(len(rows))
    assert settings["leaves"] == 148
    fitted = tune.fit(scann, rows, questions(5000), settings, tmp_path / "scann", 0.97)
    searcher = scann.load_searcher(str(tmp_path / "scann"))
    approximate = Searcher(_shard(rows, 22_000, monkeypatch), searcher, fitted["effort"])
    exact = Searcher([rows]).search(questions(0), 5 + search.SPARE)
    assert tune.recall_at_k(approximate.search(questions(0), 5)[0], exact) >= 0.95


@needs_scann
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["every score", "codes", "leaves"])
def test_two_builds_have_the_same_bytes(kind, keep, build, train, config):
    if kind != "every score":
        train(kind)
    config.retrieval.keep_embeddings = keep
    a, b = build("a", exact_below=0), build("b", exact_below=0)
    names = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file())
    assert Path("part-00000/scann/scann_assets.pbtxt") in names
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_a_finished_build_is_left_alone_and_another_replaces_it(build, references, write, tmp_path):
    folder = build()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    build()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    other = write(tmp_path / "other", ["some other text", "and one more"])
    first = Index.open(folder).fingerprint
    build(references=other)
    assert Index.open(folder, other).size == 2
    assert len(list(folder.rglob("embeddings-*"))) == 1
    build()
    assert Index.open(folder, references).fingerprint == first


@needs_scann
def test_a_folder_can_be_moved(build, texts, tmp_path, monkeypatch):
    folder = build(exact_below=0)
    expected = Index.open(folder).search(Index.open(folder).embedder.embed(texts[:9]), 4)
    shutil.move(folder, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    moved = Index.open("moved")
    found = moved.search(moved.embedder.embed(texts[:9]), 4)
    np.testing.assert_array_equal(found, expected)


@needs_scann
def test_without_scann_its_index_is_searched_exactly(build, texts, references, monkeypatch):
    folder = build(exact_below=0)
    index = Index.open(folder)
    queries = index.embedder.embed(texts)
    expected = index.search(queries, 5)
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.warns(UserWarning, match="cannot be imported here; searching exactly"):
        fallen = Index.open(folder, references)
    for a, b in zip(fallen.search(queries, 5), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert Index.open(build("new", exact_below=0)).kind == "exact"


@needs_scann
@pytest.mark.parametrize("keep", [True, False])
def test_a_flipped_byte_or_missing_file_is_named(keep, build, references, train, config):
    train("leaves")
    config.retrieval.index_parts, config.retrieval.keep_embeddings = 2, keep
    folder = build(exact_below=0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.name for path in files if path.parts[-2] == "scann" or "emb" in path.name}
    # Codes of both copies, clusters and their members; embeddings in 32 bits or in 8, not both.
    assert {"hashed_dataset.npy", "hashed_dataset_soar.npy", "serialized_partitioner.pb"} < names
    assert ("embeddings-00000.npy" in names) == keep == ("int8_dataset.npy" not in names)
    for path in files:
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(RetrievalError, match=f"{path} is damaged.*run launch/prepare.py"):
            Index.open(folder, references)
        path.unlink()
        with pytest.raises(RetrievalError, match=f"{path} is missing.*run launch/prepare.py"):
            Index.open(folder, references)
        path.write_bytes(data)
    Index.open(folder, references)
    next(folder.glob("part-00001/scann/*.npy")).write_bytes(b"no array")
    build(exact_below=0)  # the remedy
    Index.open(folder, references)


def test_other_references_are_refused(build, write, references, texts, tmp_path):
    folder = build()
    fewer = write(tmp_path / "fewer", texts[:-1])
    with pytest.raises(RetrievalError, match="ids 0 … 299, but there are only 299 references"):
        Index.open(folder, fewer)
    changed = write(tmp_path / "changed", [*texts[:-1], "another"])
    with pytest.raises(RetrievalError, match="built from other references.*prepare.py again"):
        Index.open(folder, changed)


class _Empty:
    """Takes the place of references, which cannot be written without any."""

    fingerprint = "none"

    def __len__(self):
        return 0


def test_an_empty_knowledge_base_is_refused(config, tmp_path):
    with pytest.raises(RetrievalError, match="the knowledge base is empty"):
        inspect.unwrap(build_index)(_Empty(), LexicalEmbedder(64), tmp_path, config)
    assert not list(tmp_path.iterdir())


def test_wrong_queries_are_refused(build):
    index = Index.open(build())
    with pytest.raises(RetrievalError, match="k = 0"):
        index.search(np.zeros((1, 64), np.float32), 0)
    with pytest.raises(RetrievalError, match=r"shape \(1, 32\); this index needs \(n, 64\)"):
        index.search(np.zeros((1, 32), np.float32), 1)


@needs_scann
@pytest.mark.slow
@pytest.mark.parametrize("keep", ["keep", "drop"])
def test_a_build_killed_at_any_moment_ends_as_an_undisturbed_one(keep, references, tmp_path):
    script = Path(__file__).with_name("killed_builds.py")
    lines = processes.succeed(["python", script, references.folder, tmp_path, keep]).splitlines()
    kept = [int(line.split()[2]) for line in lines]
    assert len(kept) == 15 and min(kept) == 0 and max(kept) == 6
    undisturbed = tmp_path / "undisturbed"
    names = sorted(p.relative_to(undisturbed) for p in undisturbed.rglob("*") if p.is_file())
    for i in range(len(kept)):
        for name in names:
            same = (tmp_path / str(i) / name).read_bytes() == (undisturbed / name).read_bytes()
            assert same, (lines[i], name)


def test_shards_hold_all_rows_in_order(build, texts, monkeypatch):
    for module in (search, build_module, index_module):
        monkeypatch.setattr(module, "SHARD_ROWS", 128)
    folder = build()
    assert len(list(folder.rglob("embeddings-*.npy"))) == 3
    index = Index.open(folder)
    ids, _ = index.search(index.embedder.embed(texts), 1)
    np.testing.assert_array_equal(ids[:299, 0], np.arange(299))
