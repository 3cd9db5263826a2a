"""The token corpus: what is read is what was written, and damage is named."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from m3jax.errors import TextError
from m3jax.text import records
from m3jax.text.corpus import Corpus, encode_documents, write_corpus
from m3jax.text.documents import Document
from m3jax.text.tokenizer import BOS, END, Tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "日本", "é😀", "again", "."]


def _documents(n=23, seed=0):
    rng = np.random.default_rng(seed)
    return [Document(f"d{i}", " ".join(rng.choice(WORDS, 5 + i * 7 % 40))) for i in range(n)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([d.text for d in _documents()], 320, 2)


def _write(documents, tokenizer, folder, shards):
    return write_corpus(encode_documents(documents, tokenizer), tokenizer, folder, shards)


@pytest.fixture
def folder(tokenizer, tmp_path):
    _write(_documents(), tokenizer, tmp_path / "corpus", 4)
    return tmp_path / "corpus"


def test_documents_come_back_in_order(tokenizer, folder):
    corpus, documents = Corpus(folder), _documents()
    corpus.verify()
    assert len(corpus) == len(documents) and corpus.lengths.dtype == np.int64
    for i, (document, item) in enumerate(zip(documents, corpus, strict=True)):
        expected = [BOS, *tokenizer.encode(document.text), END]
        np.testing.assert_array_equal(item.tokens, expected)
        assert item.tokens.dtype == np.int32 and item.weights is None and item.references == ()
        assert item.id == document.id and corpus.lengths[i] == len(expected)
    assert corpus.manifest["tokens"] == corpus.lengths.sum()
    assert corpus.tokenizer_fingerprint == tokenizer.fingerprint
    assert len(list(folder.glob("*.array_record"))) == 4
    with pytest.raises(IndexError, match="no record 23"):
        corpus[23]
    with pytest.raises(IndexError):
        corpus[-1]


def test_summary(tokenizer, folder):
    corpus, texts = Corpus(folder), [d.text for d in _documents()]
    tokens, size = int(corpus.lengths.sum()), sum(len(t.encode()) for t in texts)
    counts = f"23 documents, {tokens} tokens, {sum(map(len, texts))} characters"
    assert corpus.info() == f"{counts}, {size / tokens:.2f} bytes per token"


def test_fingerprint_is_of_the_content_not_of_the_files(tokenizer, folder, tmp_path):
    _write(iter(_documents()), tokenizer, tmp_path / "again", 4)
    _write(_documents(), tokenizer, tmp_path / "one", 1)
    _write(_documents()[::-1], tokenizer, tmp_path / "reversed", 4)
    other = Tokenizer.train(["a b c"], 300, 2)
    _write(_documents(), other, tmp_path / "tokenizer", 4)
    names = ["again", "one", "reversed", "tokenizer"]
    prints = [Corpus(tmp_path / name).fingerprint for name in names]
    mine = Corpus(folder).fingerprint
    assert prints[:2] == [mine, mine] and len({mine, *prints}) == 3


def test_weights_belong_to_the_token_as_a_target(tokenizer, tmp_path):
    text = "the cat 😀 sat on the mat"
    spans = ((0, 3), (9, 9), (8, 9), (20, 24))
    documents = [
        Document("a", text, no_loss=spans),
        Document("b", text, references=("k#0", "", "k#1")),
        Document("c", text, no_loss=((0, len(text)),)),
    ]
    _write(documents, tokenizer, tmp_path, 2)
    first, second, third = Corpus(tmp_path)
    tokens, offsets = tokenizer.encode_with_offsets(text)
    touched = [any(s < b and a < e for a, b in spans if a < b) for s, e in offsets]
    expected = [1.0, *(0.0 if t else 1.0 for t in touched), 1.0]
    assert 0 < sum(touched) < len(tokens)
    np.testing.assert_array_equal(first.weights, expected)
    assert first.weights.dtype == np.float32
    assert second.weights is None and second.references == ("k#0", "", "k#1")
    np.testing.assert_array_equal(third.weights, [1] + [0] * len(tokens) + [1])
    np.testing.assert_array_equal(first.tokens, second.tokens)
    with pytest.raises(TextError, match="'bad'.*outside its 2 characters"):
        _write([Document("bad", "ab", no_loss=((0, 3),))], tokenizer, tmp_path, 1)


def test_fewer_documents_than_shards_and_none(tokenizer, tmp_path):
    _write(_documents(2), tokenizer, tmp_path, 9)
    corpus = Corpus(tmp_path)
    assert [d.id for d in corpus] == ["d0", "d1"]
    with pytest.raises(TextError, match="no documents"):
        _write([], tokenizer, tmp_path, 4)
    with pytest.raises(TextError, match="no finished corpus"):
        Corpus(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_large_vocabulary_takes_four_bytes():
    assert records.dtype_of_tokens(65536) == np.uint16
    assert records.dtype_of_tokens(65537) == np.uint32


def test_rewriting_leaves_no_old_shards(tokenizer, folder):
    _write(_documents(5, seed=1), tokenizer, folder, 2)
    assert len(list(folder.glob("*.array_record"))) == 2
    assert len(list(Corpus(folder))) == 5


@pytest.mark.parametrize("name", ["records-00002.array_record", "lengths.bin"])
def test_truncated_and_missing_files_are_named(folder, name):
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(TextError, match=rf"{name} has \d+ bytes; expected .*launch/prepare\.py"):
        Corpus(folder)
    path.unlink()
    with pytest.raises(TextError, match=rf"{name} is missing; .*launch/prepare\.py"):
        Corpus(folder)


def test_flipped_bytes_are_found(folder):
    path = folder / "records-00001.array_record"
    data = bytearray(path.read_bytes())
    used = next(i for i in range(100, len(data)) if data[i : i + 8] == bytes(8)) - 60
    data[used] ^= 0x10
    path.write_bytes(data)
    corpus = Corpus(folder)
    with pytest.raises(TextError, match=r"records-00001\.array_record is damaged"):
        corpus.verify()
    for i in range(0, 23, 4):
        assert len(corpus[i].tokens) == corpus.lengths[i]  # the other shards are well
    with pytest.raises(TextError, match=r"records-00001\.array_record is damaged"):
        for i in range(1, 23, 4):
            corpus[i]


def test_damaged_manifest_and_wrong_kind(folder):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    for bad in ["{", "[]", json.dumps(content | {"tokens": 1}), json.dumps({"checksum": "x"})]:
        path.write_text(bad)
        with pytest.raises(TextError, match=r"manifest\.json is damaged"):
            Corpus(folder)
    path.write_text(json.dumps(content))
    with pytest.raises(TextError, match="holds a corpus, format 1; expected a references"):
        records.Records(folder, "references")


def test_interrupted_writing_leaves_nothing_that_opens(tokenizer, folder):
    def broken():
        yield from _documents(3)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        _write(broken(), tokenizer, folder, 2)
    with pytest.raises(TextError, match="no finished corpus"):
        Corpus(folder)
    assert not list(folder.glob("*.tmp"))


def test_full_disk_is_reported(tokenizer, tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, options):
            open(path, "wb").close()

        def write(self, payload):
            raise RuntimeError("write() failed: No space left on device")

        def is_open(self):
            return False

    monkeypatch.setattr(records.array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match=r"records-00000.*could not be written.*No space left"):
        _write(_documents(), tokenizer, tmp_path, 2)
    assert not list(tmp_path.iterdir())


def test_several_threads_read_at_once(folder):
    corpus = Corpus(folder)
    expected = [corpus[i].tokens for i in range(len(corpus))]
    fresh = Corpus(folder)
    order = np.random.default_rng(0).integers(0, 23, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for i, item in zip(order, pool.map(fresh.__getitem__, order), strict=True):
            np.testing.assert_array_equal(item.tokens, expected[i])


def test_the_end_of_a_text_that_was_cut_is_not_learnt(tokenizer, tmp_path):
    text = "the cat sat on a mat"
    documents = [
        Document("whole", text, no_loss=((0, 3),)),
        Document("cut", text, no_loss=((0, 3), (len(text), len(text)))),
    ]
    _write(documents, tokenizer, tmp_path / "corpus", 1)
    whole, cut = Corpus(tmp_path / "corpus")
    np.testing.assert_array_equal(whole.tokens, cut.tokens)
    assert whole.weights[-1] == 1 and cut.weights[-1] == 0
    np.testing.assert_array_equal(whole.weights[:-1], cut.weights[:-1])


def test_a_flipped_bit_of_the_lengths_is_refused(folder):
    path = folder / "lengths.bin"
    data = bytearray(path.read_bytes())
    data[3] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(
        TextError, match=r"lengths\.bin is damaged .*restore it from a copy, or move"
    ):
        Corpus(folder)


def test_exchanged_shards_are_refused_when_a_record_is_read(tokenizer, tmp_path):
    same = [Document(str(i), f"word {i}") for i in range(4)]  # records of the same size
    _write(same, tokenizer, tmp_path, 2)
    first, second = sorted(tmp_path.glob("*.array_record"))
    contents = first.read_bytes(), second.read_bytes()
    assert len(contents[0]) == len(contents[1])
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(TextError, match="is damaged .a record is not the one that was written"):
        Corpus(tmp_path)[2]
