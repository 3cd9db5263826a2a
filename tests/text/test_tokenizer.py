"""Tokenizer: exact round trips, character spans, determinism, and words as single tokens."""

import numpy as np
import processes
import pytest

from m3jax.errors import TextError
from m3jax.text import tokenizer as module
from m3jax.text.tokenizer import BOS, END, PAD, REFERENCE, SPECIAL_TOKENS, Tokenizer

TEXTS = [
    "The cat sat on the mat. The dog sat on the cat.\n\nAnna likes the mat.",
    "日本語のテキスト。中文也行。 Ünïcödé, 😀👨‍👩‍👧 and e\u0301",
    " ".join(SPECIAL_TOKENS) * 20 + "".join(SPECIAL_TOKENS) * 20 + "Reference:" * 20,
    "x\n\ny  \n \n" * 9,
]
STRANGE = [
    "",
    " ",
    "\n",
    "\x00\x01\x1c\x7f\u200b\ufeff\ufffd",
    "<s>Reference:</s><pad><reference>",
    " <s> </s>\t\r\n  x  \n\n ",
    "😀é日e\u0301\U0010ffff",
    "never seen Ж",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, vocabulary=600, min_frequency=2)


def _random_text(rng, size):
    alphabet = list("ab .,'\n\n\t1<s>/é日😀\u3000\x1c\xa0")
    return "".join(rng.choice(alphabet, size))


def test_special_tokens_are_the_first_entries(tokenizer):
    assert (PAD, BOS, REFERENCE, END) == (0, 1, 2, 3)
    assert tokenizer.prefix.tolist() == [BOS, REFERENCE] and tokenizer.prefix.dtype == np.int32
    assert tokenizer.decode([BOS, REFERENCE, *tokenizer.encode("cat"), END, PAD]) == "cat"


@pytest.mark.parametrize("text", [*TEXTS, *STRANGE])
def test_round_trip_without_special_tokens(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32 and tokens.ndim == 1
    assert not np.isin(tokens, [PAD, BOS, REFERENCE, END]).any()
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("text", [*TEXTS, *STRANGE])
def test_spans_cover_the_characters_of_each_token(tokenizer, text):
    tokens, spans = tokenizer.encode_with_offsets(text)
    np.testing.assert_array_equal(tokens, tokenizer.encode(text))
    assert spans.shape == (len(tokens), 2)
    covered = 0
    for token, (start, end) in zip(tokens, spans, strict=True):
        assert start <= covered <= end <= len(text) and start < end  # no gap
        piece = tokenizer.decode([token])
        assert "\ufffd" in piece or piece == text[start:end]
        covered = max(covered, end)
    assert covered == len(text)


def test_long_texts_are_cut_where_tokens_do_not_change(tokenizer, monkeypatch):
    rng = np.random.default_rng(0)
    texts = [_random_text(rng, 3000) for _ in range(30)]
    texts += ["x" * 100, "\n" * 100, "x\n" * 100]
    whole = [tokenizer.encode_with_offsets(text) for text in texts]
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert sum(1 for _ in module._blocks(texts[0])) > 50
    for text, batched, (tokens, spans) in zip(
        texts, tokenizer.encode_batch(texts), whole, strict=True
    ):
        np.testing.assert_array_equal(tokenizer.encode(text), tokens)
        np.testing.assert_array_equal(batched, tokens)
        np.testing.assert_array_equal(tokenizer.encode_with_offsets(text)[1], spans)


@pytest.mark.parametrize("min_frequency", [1, 2])
def test_large_vocabulary_makes_every_word_one_token(min_frequency):
    rng = np.random.default_rng(1)
    syllables = ["ba", "ke", "lo", "mi", "nu", "ra", "so", "ti"]
    names = sorted({"".join(rng.choice(syllables, 4)).capitalize() for _ in range(300)})
    texts = [f"lang of {name} Spanish ." for name in names for _ in range(min_frequency)]
    tokenizer = Tokenizer.train(texts, vocabulary=100_000, min_frequency=min_frequency)
    assert tokenizer.size < 5000
    for name in names:
        assert len(tokenizer.encode(f" {name}")) == 1, name
    assert len(tokenizer.encode(texts[0])) == 5


def test_stops_at_the_vocabulary_and_has_all_bytes():
    smallest = Tokenizer.train(TEXTS, vocabulary=260, min_frequency=2)
    assert smallest.size == 260
    assert smallest.decode(smallest.encode(TEXTS[1])) == TEXTS[1]
    assert Tokenizer.train(TEXTS, 270, 2).size == 270
    with pytest.raises(TextError, match="text.vocabulary ≥ 260"):
        Tokenizer.train(TEXTS, vocabulary=259, min_frequency=2)
    with pytest.raises(TextError, match="no text"):
        Tokenizer.train([], vocabulary=300, min_frequency=2)


def test_trains_on_a_limited_number_of_bytes():
    read = []

    def texts():
        for text in ["aé bb " * 10, "cc dd " * 100, "ee ff " * 10]:
            read.append(text)
            yield text

    limited = Tokenizer.train(texts(), 400, 2, most_bytes=100)
    assert len(read) == 2
    same = Tokenizer.train(["aé bb " * 10, ("cc dd " * 100)[:30]], 400, 2)
    assert limited.fingerprint == same.fingerprint
    # A character that the limit cuts in two is left out: "éé" is never seen.
    assert len(Tokenizer.train(["é" * 9], 300, 1, most_bytes=3).encode("é" * 9)) == 9


def test_training_is_deterministic_across_processes():
    script = (
        "from m3jax.text.tokenizer import Tokenizer\n"
        f"texts = [t * 3 for t in {TEXTS!r}]\n"
        "print(Tokenizer.train(texts, 700, 1).fingerprint)"
    )
    here = Tokenizer.train([t * 3 for t in TEXTS], 700, 1).fingerprint
    for _ in range(2):
        assert processes.succeed(["python", "-c", script]).strip() == here


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    loaded = Tokenizer.load(tmp_path / "t")
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.size == tokenizer.size
    for text in [*TEXTS, *STRANGE]:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
    assert {p.name for p in (tmp_path / "t").iterdir()} == {"tokenizer.json", "manifest.json"}


def test_missing_or_damaged(tokenizer, tmp_path):
    with pytest.raises(TextError, match=r"tokenizer\.json is missing; run launch/prepare"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    good = path.read_bytes()
    for bad in [good[:-10], good.replace(b"merges", b"merged"), good.replace(b'"a"', b'"b"', 1)]:
        path.write_bytes(bad)
        with pytest.raises(TextError, match=r"tokenizer\.json is damaged"):
            Tokenizer.load(tmp_path)
    path.write_bytes(good)
    (tmp_path / "manifest.json").write_bytes(b"{")
    with pytest.raises(TextError, match="damaged"):
        Tokenizer.load(tmp_path)


def test_decode_refuses_unknown_tokens(tokenizer):
    with pytest.raises(TextError, match="token 100000 is outside"):
        tokenizer.decode([5, 100_000])
