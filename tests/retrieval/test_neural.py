"""The encoder as an embedder: the same bits in any company, and an index that goes with it."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from retrieval.encoders import EPSILON, D, change_json, write_encoder
from tolerance import close

from m3jax import config as configs
from m3jax.errors import RetrievalError
from m3jax.mesh import batch_sharding
from m3jax.retrieval import index as index_module
from m3jax.retrieval import neural
from m3jax.retrieval.batches import BUCKETS, rows_of
from m3jax.retrieval.build import build_index
from m3jax.retrieval.embed import load_embedder, make_embedder
from m3jax.retrieval.embedder import Embedder
from m3jax.retrieval.index import Index
from m3jax.retrieval.lexical import LexicalEmbedder
from m3jax.retrieval.neural import NeuralEmbedder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    write_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def embedder(folder):
    return NeuralEmbedder(folder, rows=3)


@pytest.fixture(scope="module")
def texts(sentences):
    rng = np.random.default_rng(5)
    return [text[: int(rng.integers(1, 200))] for text in sentences(70)]


def test_it_is_an_embedder(embedder):
    assert isinstance(embedder, Embedder)
    assert (embedder.name, embedder.dimension, embedder.fitted) == ("bert", D, True)
    before = embedder.fingerprint
    embedder.fit(["anything"])
    assert embedder.fingerprint == before


def test_rows_have_length_one_or_are_zero(embedder):
    rows = embedder.embed(["bado", "", " \n\t", "[SEP]", "kelo minu"])
    assert rows.dtype == np.float32
    close(np.linalg.norm(rows[[0, 3, 4]], axis=1), 1)
    np.testing.assert_array_equal(rows[[1, 2]], 0)
    assert embedder.embed([]).shape == (0, D)
    np.testing.assert_array_equal(embedder.embed(["", " "]), np.zeros((2, D)))


@pytest.mark.slow
def test_same_bits_in_any_order_batch_and_thread(embedder, texts, monkeypatch):
    rows = embedder.embed(texts)
    assert len(np.unique(rows, axis=0)) == len(set(texts)) > 60
    order = np.random.default_rng(0).permutation(len(texts))
    np.testing.assert_array_equal(embedder.embed([texts[i] for i in order]), rows[order])
    alone = [embedder.embed([text])[0] for text in texts[:20]]
    np.testing.assert_array_equal(alone, rows[:20])
    parts = [texts[i : i + 7] for i in range(0, len(texts), 7)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(embedder.embed, parts * 2))
    np.testing.assert_array_equal(np.concatenate(found), np.tile(rows, (2, 1)))
    monkeypatch.setattr(neural, "_BLOCK", 9)
    np.testing.assert_array_equal(embedder.embed(texts), rows)


@pytest.mark.slow
def test_same_bits_on_one_device_and_on_eight(folder, embedder, texts):
    assert embedder._mesh.size == 8
    batch = next(iter(embedder._calls(texts)))[1]
    placed = jax.device_put(batch[0], batch_sharding(embedder._mesh))
    assert {shard.data.shape[0] for shard in placed.addressable_shards} == {3}
    one = NeuralEmbedder(folder, rows=3, devices=jax.local_devices()[:1])
    np.testing.assert_array_equal(one.embed(texts), embedder.embed(texts))
    assert one.fingerprint == embedder.fingerprint
    # Calls of another shape: no promise of the last bits.
    wider = NeuralEmbedder(folder, rows=16, devices=jax.local_devices()[:1])
    close(wider.embed(texts), one.embed(texts))


def test_every_call_has_the_shape_of_its_length(embedder, texts):
    shapes = {}
    for found in (texts, texts[:1], texts[5:30]):
        for rows, (tokens, lengths) in embedder._calls(found):
            size, bucket = tokens.shape
            assert size == 24 and len(lengths) == size and len(rows) <= size
            assert (lengths[: len(rows)] <= bucket).all() and not lengths[len(rows) :].any()
            shapes.setdefault(bucket, set()).add(tokens.shape)
    assert len(shapes) > 3 and all(len(found) == 1 for found in shapes.values())
    assert [rows_of(bucket, 3) for bucket in (16, 512, 768, 1024, 8192)] == [3, 3, 2, 1, 1]
    assert all(bucket % 256 == 0 for bucket in BUCKETS if bucket > 512)
    assert list(BUCKETS) == sorted(set(BUCKETS))


def test_long_texts_are_cut_and_lower_case_is_asked_for(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    long = "bado kelo " * 40
    embedder = NeuralEmbedder(copy)
    assert embedder.max_length == 60
    np.testing.assert_array_equal(*embedder.embed([long, long + "minu"]))
    (copy / "sentence_bert_config.json").unlink()
    assert NeuralEmbedder(copy).max_length == 72  # all positions
    (copy / "tokenizer_config.json").write_text('{"model_max_length": 30}')
    assert NeuralEmbedder(copy).max_length == 30
    (copy / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert NeuralEmbedder(copy).max_length == 72
    long = "bado " * 35
    assert np.isfinite(NeuralEmbedder(copy).embed([long])).all()  # 72 tokens, padded to 96

    roberta = tmp_path / "roberta"
    write_encoder(roberta, "xlm-roberta")
    same = NeuralEmbedder(roberta).embed(["Bado KELO", "bado kelo"])
    assert np.abs(same[0] - same[1]).max() > 0.01
    change_json(roberta / "sentence_bert_config.json", do_lower_case=True, max_seq_length=500)
    lower = NeuralEmbedder(roberta)
    np.testing.assert_array_equal(*lower.embed(["Bado KELO", "bado kelo"]))
    assert lower.max_length == 70  # 72 positions, the first two never used


def test_fingerprint_depends_on_all_that_matters(folder, embedder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert NeuralEmbedder(copy, rows=5).fingerprint == embedder.fingerprint
    assert NeuralEmbedder(copy, "mean").fingerprint == embedder.fingerprint  # as the folder says
    found = {
        embedder.fingerprint,
        NeuralEmbedder(copy, "cls").fingerprint,
        NeuralEmbedder(copy, dtype="bfloat16").fingerprint,
    }
    change_json(copy / "config.json", layer_norm_eps=1e-6)
    found.add(NeuralEmbedder(copy).fingerprint)
    change_json(copy / "config.json", layer_norm_eps=EPSILON)
    change_json(copy / "sentence_bert_config.json", max_seq_length=50)
    found.add(NeuralEmbedder(copy).fingerprint)
    change_json(copy / "sentence_bert_config.json", max_seq_length=60)
    tokenizer = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(tokenizer + " ")
    found.add(NeuralEmbedder(copy).fingerprint)
    (copy / "tokenizer.json").write_text(tokenizer)
    write_encoder(copy, seed=1)
    found.add(NeuralEmbedder(copy).fingerprint)
    assert len(found) == 7


@pytest.fixture
def config(config, folder):
    config.retrieval.embedder, config.retrieval.encoder = "bert", str(folder)
    return configs.validate(config)


def test_config_makes_it(config, folder, embedder):
    made = make_embedder(config)
    assert isinstance(made, NeuralEmbedder)
    assert (made.rows, made.dtype, made.pooling, made.dimension) == (16, "float32", "mean", D)
    assert made.fingerprint == embedder.fingerprint
    config.retrieval.pooling, config.retrieval.encoder_dtype = "cls", "bfloat16"
    config.retrieval.encoder_batch = 2
    made = make_embedder(config)
    assert (made.rows, made.dtype, made.pooling) == (2, "bfloat16", "cls")


def test_saved_and_loaded(embedder, texts, tmp_path):
    embedder.save(tmp_path / "saved")
    loaded = load_embedder(tmp_path / "saved")
    assert loaded.spec == embedder.spec
    np.testing.assert_array_equal(loaded.embed(texts[:9]), embedder.embed(texts[:9]))
    spec = json.loads((tmp_path / "saved" / "embedder.json").read_text())
    del spec["pooling"]
    (tmp_path / "saved" / "embedder.json").write_text(json.dumps(spec))
    with pytest.raises(RetrievalError, match="cannot load.*'pooling'.*build the index again"):
        load_embedder(tmp_path / "saved")


@pytest.fixture(scope="module")
def references(sentences, write, tmp_path_factory):
    return write(tmp_path_factory.mktemp("references"), sentences(60))


def test_an_index_finds_the_right_texts(references, sentences, config, tmp_path):
    build_index(references, make_embedder(config), tmp_path, config)
    index = Index.open(tmp_path, references)
    assert (index.size, index.dimension, index.embedder.name) == (60, D, "bert")
    ids, scores = index.search(index.embedder.embed(sentences(60)), 3)
    np.testing.assert_array_equal(ids[:, 0], np.arange(60))
    close(scores[:, 0], 1)
    assert (scores[:, 1] < 0.9999).all()


def test_an_index_follows_its_encoder_to_another_place(references, folder, config, tmp_path):
    here = shutil.copytree(folder, tmp_path / "here")
    config.retrieval.encoder = str(here)
    build_index(references, make_embedder(config), tmp_path / "index", config)
    fingerprint = Index.open(tmp_path / "index").fingerprint
    embeddings = tmp_path / "index" / "part-00000" / "embeddings-00000.npy"
    written = embeddings.stat().st_mtime_ns

    shutil.move(here, tmp_path / "there")
    with pytest.raises(RetrievalError, match=f"needs the encoder {here}, which is missing; put"):
        Index.open(tmp_path / "index")
    config.retrieval.encoder = str(tmp_path / "there")
    build_index(references, make_embedder(config), tmp_path / "index", config)  # the remedy
    assert embeddings.stat().st_mtime_ns == written
    assert Index.open(tmp_path / "index").fingerprint == fingerprint

    write_encoder(tmp_path / "there", seed=1)
    with pytest.raises(RetrievalError, match="written with another encoder than .*there holds now"):
        Index.open(tmp_path / "index")
    build_index(references, make_embedder(config), tmp_path / "index", config)
    assert Index.open(tmp_path / "index").fingerprint != fingerprint


def test_an_embedder_of_another_width_is_refused(references, config, embedder, tmp_path):
    build_index(references, make_embedder(config), tmp_path, config)
    index = Index.open(tmp_path)
    lexical = LexicalEmbedder(64)
    lexical.fit(["a b"])
    with pytest.raises(RetrievalError, match=rf"shape \(1, 64\); this index needs \(n, {D}\)"):
        index.search(lexical.embed(["a"]), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "load_embedder", lambda folder: lexical)
        with pytest.raises(RetrievalError, match=f"dimension 64, the index has {D}"):
            Index.open(tmp_path)
