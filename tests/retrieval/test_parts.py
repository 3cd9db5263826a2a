"""Indices of several parts, and indices without embeddings."""

import shutil
import sys
from unittest import mock

import numpy as np
import pytest
from tolerance import close

from m3jax.errors import RetrievalError
from m3jax.files import read_sealed, write_sealed
from m3jax.retrieval import build as build_module
from m3jax.retrieval import tune
from m3jax.retrieval.build import build_index
from m3jax.retrieval.index import Index, part_ranges
from m3jax.retrieval.lexical import LexicalEmbedder
from m3jax.retrieval.search import SPARE, import_scann, merge

needs_scann = pytest.mark.skipif(import_scann() is None, reason="ScaNN has no wheel here")


@pytest.fixture(scope="module")
def texts(sentences):
    twins = sentences(201, seed=3)
    return [*twins, *twins[:40], "twin zofa", *sentences(60, seed=5), "twin zofa"]


@pytest.fixture(scope="module")
def references(texts, write, tmp_path_factory):
    return write(tmp_path_factory.mktemp("references"), texts)


@pytest.fixture
def build(references, config, tmp_path):
    def build(name, parts=1, keep=True, exact_below=1000):
        config.retrieval.index_parts, config.retrieval.keep_embeddings = parts, keep
        config.retrieval.exact_below = exact_below
        build_index(references, LexicalEmbedder(64), tmp_path / name, config)
        return tmp_path / name

    return build


def equal(a, b):
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one, other)


def test_ranges_are_a_partition_into_nearly_equal_lengths():
    for size, parts in [(1, 1), (7, 3), (100, 7), (8, 8)]:
        ranges = part_ranges(size, parts)
        assert [i for part in ranges for i in part] == list(range(size))
        assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize("parts", [2, 5, pytest.param(300, marks=pytest.mark.slow)])
def test_parts_find_what_the_whole_finds_bit_for_bit(parts, build, texts):
    whole, split = Index.open(build("whole")), Index.open(build("split", parts))
    assert whole.fingerprint != split.fingerprint and split.parts == tuple(range(parts))
    queries = whole.embedder.embed([text[:40] for text in texts])
    for k in (1, 5, 310):
        equal(split.search(queries, k), whole.search(queries, k))


def test_hosts_with_some_parts_find_together_what_one_finds(build, texts, tmp_path):
    folder = build("index", 4)
    whole = Index.open(folder)
    hosts = []
    for here in ([0, 2], [3, 1]):
        host = tmp_path / f"host{here[0]}"
        shutil.copytree(folder, host)
        for part in set(range(4)) - set(here):
            shutil.rmtree(host / f"part-{part:05d}")
        hosts.append(Index.open(host, parts=here))
        missing = min(set(range(4)) - set(here))
        with pytest.raises(RetrievalError, match=f"part-{missing:05d} is missing.*without this"):
            Index.open(host)
    assert hosts[0].fingerprint == whole.fingerprint
    queries = whole.embedder.embed(texts[::3])
    found = [host.search(queries, 20) for host in hosts]
    ids, scores = hosts[1].search(queries, 400)
    np.testing.assert_array_equal(np.isneginf(scores), ids < 0)
    assert (ids[:, -1] == -1).all()
    assert not set(found[0][0].ravel()) & set(found[1][0].ravel()) - {-1}
    equal(merge(found), whole.search(queries, 20))
    equal(merge(found[::-1]), whole.search(queries, 20))


def test_merging_ranks_ties_by_id_and_puts_unfilled_places_last():
    first = np.array([[7, 9, -1]]), np.array([[0.5, 0.25, -np.inf]], np.float32)
    second = np.array([[3, 4, -1]]), np.array([[0.5, 0.125, -np.inf]], np.float32)
    ids, scores = merge([first, second])
    assert ids.tolist() == [[3, 7, 9]] and scores.tolist() == [[0.5, 0.5, 0.25]]
    ids, scores = merge([(part[:, 1:], score[:, 1:]) for part, score in (first, second)])
    assert ids.tolist() == [[9, 4]]
    ids, scores = merge([(part[:, 2:], score[:, 2:]) for part, score in (first, second)])
    assert ids.tolist() == [[-1]] and np.isneginf(scores).all()


def test_wrong_parts_are_refused(build, references, config, tmp_path):
    folder = build("index", 3)
    for parts in ([3], [-1], []):
        with pytest.raises(RetrievalError, match=r"parts 0 … 2, not all of \["):
            Index.open(folder, parts=parts)
    config.retrieval.index_parts = len(references) + 1
    with pytest.raises(RetrievalError, match="there are only 303 references; set it to 303"):
        build_index(references, LexicalEmbedder(64), tmp_path / "more", config)


@needs_scann
def test_parts_of_scann_find_at_least_what_the_whole_does(build, texts, config, monkeypatch):
    settings = {"leaves": 16, "block": 4, "sample": 1000}
    monkeypatch.setattr(build_module, "scann_settings", lambda references: settings)
    config.retrieval.recall = 0.7
    whole, split = (Index.open(build(f"index{n}", n, exact_below=0)) for n in (1, 3))
    queries = whole.embedder.embed([text[:50] for text in texts])
    exact = whole.search_exactly(queries, 5 + SPARE)
    recalls = [tune.recall_at_k(index.search(queries, 5)[0], exact) for index in (whole, split)]
    assert recalls[0] < 0.99 and recalls[1] >= recalls[0] - 0.02
    assert split.recall is not None and 0.7 <= split.recall <= 1


@needs_scann
@pytest.mark.parametrize("leaves", [0, 16])
def test_an_index_without_embeddings(leaves, build, texts, config, monkeypatch):
    if leaves:
        settings = {"leaves": leaves, "block": 2, "sample": 1000}
        monkeypatch.setattr(build_module, "scann_settings", lambda references: settings)
        config.retrieval.recall = 0.6
    folder = build("without", 2, keep=False, exact_below=0)
    assert not list(folder.rglob("embeddings-*")) and not list(folder.rglob("dataset.npy"))
    index, kept = Index.open(folder), Index.open(build("with", 2, exact_below=0))
    queries = index.embedder.embed(texts)
    ids, scores = index.search(queries, 5)
    exact = kept.search_exactly(queries, 300)
    nearest = tuple(part[:, : 5 + SPARE] for part in exact)
    assert tune.recall_at_k(ids, nearest) >= (0.6 if leaves else 0.9)
    every = np.full((len(texts), len(texts)), np.nan)
    np.put_along_axis(every, exact[0], exact[1], axis=1)  # all but the three last of each
    found = ids >= 0
    error = (scores - np.take_along_axis(every, np.where(found, ids, 0), axis=1))[found]
    assert np.isfinite(error).sum() > 1000
    close(error[np.isfinite(error)], 0.0, 0.004, size=1.0)  # scores of rows of length one
    assert (np.diff(scores, axis=1) <= 0).all()
    tied = scores[:, 1:] == scores[:, :-1]
    assert (ids[:, 1:] > ids[:, :-1])[tied & found[:, 1:]].all()
    with pytest.raises(RetrievalError, match=r"keeps no embeddings.*is [01]\.\d+.*keep_embeddings"):
        index.search_exactly(queries, 5)
    ids, scores = index.search(queries[:2], 400)  # more than there are
    assert ids.shape == (2, 400) and (ids[:, -1] == -1).all() and np.isneginf(scores[:, -1]).all()
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(RetrievalError, match="keeps no embeddings.*pip install scann"):
        Index.open(folder)


@needs_scann
def test_embeddings_are_removed_after_the_index_is_finished(build, monkeypatch):
    stopped = mock.patch.object(build_module, "write_manifest", side_effect=KeyboardInterrupt)
    with stopped, pytest.raises(KeyboardInterrupt):
        build("index", 2, keep=False, exact_below=0)
    embedded = mock.Mock(side_effect=AssertionError("embedded again"))
    with mock.patch.object(build_module, "embedding_files", return_value=[]):  # killed in between
        folder = build("index", 2, keep=False, exact_below=0)
    assert len(list(folder.rglob("embeddings-*"))) == 2
    Index.open(folder)
    monkeypatch.setattr(build_module, "_embed", embedded)
    build("index", 2, keep=False, exact_below=0)
    assert not list(folder.rglob("embeddings-*"))
    Index.open(folder)


def test_exact_indices_keep_their_embeddings(build):
    folder = build("index", 2, keep=False)
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    Index.open(folder)
    build("index", 2, keep=True)  # the same index
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == kept


def test_another_number_of_parts_replaces_the_index(build, texts):
    folder = build("index", 5)
    expected = Index.open(folder).search(Index.open(folder).embedder.embed(texts[:9]), 4)
    for old in (folder / "embeddings-00000.npy", folder / "scann" / "dataset.npy"):  # format 1
        old.parent.mkdir(exist_ok=True)
        old.write_bytes(b"old")
    index = Index.open(build("index", 2))
    equal(index.search(index.embedder.embed(texts[:9]), 4), expected)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "embedder",
        "part-00000",
        "part-00001",
    ]
    assert not list(folder.glob("embeddings-*"))


def test_an_older_format_and_another_dimension_are_named(build):
    folder = build("index")
    manifest = read_sealed(folder / "manifest.json")
    changed = {**manifest, "identity": {**manifest["identity"], "format": 1}}
    write_sealed(folder / "manifest.json", changed)
    with pytest.raises(RetrievalError, match="of format 1; this version reads 2; run launch/prep"):
        Index.open(folder)
    changed = {**manifest, "identity": {**manifest["identity"], "dimension": 32}}
    write_sealed(folder / "manifest.json", changed)
    with pytest.raises(RetrievalError, match="makes vectors of dimension 64, the index has 32"):
        Index.open(folder)


class _Wide(LexicalEmbedder):
    def embed(self, texts):
        return np.ones((len(texts), 1), np.float32)


def test_an_embedder_of_another_dimension_than_it_says_is_named(references, config, tmp_path):
    with pytest.raises(RetrievalError, match=r"has dimension 64, but 303 texts.*\(303, 1\)"):
        build_index(references, _Wide(64), tmp_path / "index", config)
