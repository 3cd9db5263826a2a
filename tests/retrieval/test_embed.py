"""The lexical embedder: cosine of TF-IDF, the same bytes everywhere."""

import collections
import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import processes
import pytest
from tolerance import close

from m3jax.errors import RetrievalError
from m3jax.retrieval import lexical
from m3jax.retrieval.embed import load_embedder, make_embedder
from m3jax.retrieval.lexical import LexicalEmbedder, words


@pytest.fixture
def texts(sentences):
    return sentences(600)


@pytest.fixture
def embedder(texts):
    embedder = LexicalEmbedder(256)
    embedder.fit(texts)
    return embedder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n—…!", []),
        ("The cat's HAT, 2nd_try", ["the", "cat", "s", "hat", "2nd_try"]),
        ("Straße ÉTÉ ﬁn", ["straße", "été", "fin"]),
        ("日本語", ["日", "本", "語", "日本", "本語"]),
        ("x日本!語2", ["x", "日", "本", "日本", "語", "2"]),
        ("한국 カナ", ["한", "국", "한국", "カ", "ナ", "カナ"]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_ascii_words_are_those_of_the_general_path():
    text = "".join(map(chr, range(128))) + " Ab_c9-d\tE'f\x1cg"
    assert words(text) == words(text + " é")[:-1]


def test_rows_have_length_one_or_are_zero(embedder, texts):
    rows = embedder.embed([*texts[:5], "", "!?", "unheardof"])
    assert rows.dtype == np.float32
    close(np.linalg.norm(rows[:5], axis=1), 1)
    np.testing.assert_array_equal(rows[5:], 0)
    assert embedder.embed([]).shape == (0, 256)


def _plain(text, fitted):
    """Weights of words and prefixes by the docstring's formula, without hashing."""
    weights = collections.defaultdict(float)
    for word, tf in collections.Counter(words(text)).items():
        for kind, feature in (("word", word), ("prefix", word[:5])):
            df = sum(
                feature in {w if kind == "word" else w[:5] for w in words(other)}
                for other in fitted
            )
            if df:
                weights[kind, feature] += (1 + math.log(tf)) * math.log((len(fitted) + 1) / df)
    return weights


def test_cosine_is_that_of_unhashed_tf_idf(sentences):
    texts = [f"{text} {text[10:30]} photographs photographers" for text in sentences(12)]
    embedder = LexicalEmbedder(2**16)  # so wide that hardly any buckets collide
    embedder.fit(texts)
    rows = embedder.embed(texts)
    plain = [_plain(text, texts) for text in texts]
    dots = np.array([[sum(a[f] * b.get(f, 0) for f in a) for b in plain] for a in plain])
    norms = np.sqrt(np.diag(dots))
    close(rows @ rows.T, dots / np.outer(norms, norms), 0.02)


def test_a_rare_name_finds_its_text_at_512(sentences):
    texts = sentences(3000, length=40)
    embedder = LexicalEmbedder(512)
    embedder.fit(texts)
    rows = embedder.embed(texts)
    asked = np.arange(0, 3000, 30)
    # The question's other words are common ones, in half of the texts.
    queries = embedder.embed([f"what did name{i}X say to {texts[7].split()[1]}?" for i in asked])
    assert (np.argmax(queries @ rows.T, axis=1) == asked).mean() >= 0.98


def test_same_bytes_in_any_order_batch_and_thread(embedder, texts, monkeypatch):
    rows = embedder.embed(texts)
    fresh = LexicalEmbedder(256)
    fresh.fit(texts[::-1])
    assert fresh.fingerprint == embedder.fingerprint
    np.testing.assert_array_equal(fresh.embed(texts[::-1])[::-1], rows)
    np.testing.assert_array_equal(np.concatenate([fresh.embed([t]) for t in texts[:20]]), rows[:20])

    monkeypatch.setattr(lexical, "_CACHED_WORDS", 100)  # the cache is emptied all the time
    crowded = LexicalEmbedder(256)
    crowded.fit(texts)
    parts = [texts[i : i + 40] for i in range(0, 600, 40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(crowded.embed, parts * 4))
    np.testing.assert_array_equal(np.concatenate(found), np.tile(rows, (4, 1)))


def test_same_bytes_in_another_process(embedder, texts, tmp_path):
    embedder.save(tmp_path)
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = (
        "import json, sys; from m3jax.retrieval.embed import *;"
        "texts = json.load(open(sys.argv[1] + '/texts.json')); fresh = LexicalEmbedder(256);"
        "fresh.fit(texts); loaded = load_embedder(sys.argv[1]);"
        "print(fresh.fingerprint, loaded.fingerprint, loaded.embed(texts[::-1]).tobytes().hex())"
    )
    *fingerprints, data = processes.succeed(["python", "-c", script, tmp_path]).split()
    assert fingerprints == [embedder.fingerprint] * 2
    assert bytes.fromhex(data) == embedder.embed(texts[::-1]).tobytes()


def test_fingerprint_depends_on_texts_and_dimension(embedder, texts):
    other, narrow = LexicalEmbedder(256), LexicalEmbedder(64)
    other.fit(texts[:-1])
    narrow.fit(texts)
    assert len({embedder.fingerprint, other.fingerprint, narrow.fingerprint}) == 3


def test_unfitted_and_wrong_settings_are_refused(config):
    embedder = make_embedder(config)
    assert (embedder.name, embedder.dimension, embedder.fitted) == ("lexical", 64, False)
    with pytest.raises(RetrievalError, match="call fit"):
        embedder.embed(["x"])
    with pytest.raises(RetrievalError, match="config.retrieval.dimension"):
        LexicalEmbedder(7)
    config.retrieval.embedder = "psychic"
    with pytest.raises(RetrievalError, match="'psychic' is unknown; this version has lexical"):
        make_embedder(config)
    config.retrieval.embedder = "attention"
    with pytest.raises(RetrievalError, match="'attention' is unknown.*lexical, bert.*rerank"):
        make_embedder(config)


def test_damaged_folder_is_refused(embedder, tmp_path):
    with pytest.raises(RetrievalError, match="no readable embedder.json"):
        load_embedder(tmp_path)
    embedder.save(tmp_path)
    spec = json.loads((tmp_path / "embedder.json").read_text())
    assert load_embedder(tmp_path).fingerprint == spec["fingerprint"]
    data = bytearray((tmp_path / "document_frequency.npy").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "document_frequency.npy").write_bytes(data)
    with pytest.raises(RetrievalError, match="damaged or of another version"):
        load_embedder(tmp_path)
    (tmp_path / "document_frequency.npy").unlink()
    with pytest.raises(RetrievalError, match="build the index again"):
        load_embedder(tmp_path)
    (tmp_path / "embedder.json").write_text(json.dumps({**spec, "name": "psychic"}))
    with pytest.raises(RetrievalError, match="'psychic', which is unknown"):
        load_embedder(tmp_path)


def test_an_unfitted_embedder_is_not_extended():
    with pytest.raises(RetrievalError, match="learnt nothing yet; call fit"):
        LexicalEmbedder(64).extended(["a text"])
