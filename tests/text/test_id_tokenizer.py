"""Texts of token numbers: nothing is lost, and nothing else is taken."""

import numpy as np
import pytest

from m3jax.errors import TextError
from m3jax.text.documents import Document
from m3jax.text.reference_splitter import cut_references
from m3jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from m3jax.text.tokenizer_import import id_tokenizer

NAMED = ["0", "1", "7", "2"]  # 7 is exchanged with 2, and 2 with 3


def made(size: int = 300) -> tuple[Tokenizer, np.ndarray]:
    text, order, _ = id_tokenizer(size, NAMED, SPECIAL_TOKENS)
    return Tokenizer(text), order


def test_every_token_comes_back_with_the_number_that_the_model_gives_it() -> None:
    tokenizer, order = made()
    assert tokenizer.size == 300 and order[:8].tolist() == [0, 1, 7, 2, 4, 5, 6, 3]
    np.testing.assert_array_equal(np.sort(order), np.arange(300))
    ids = np.random.default_rng(0).integers(4, 300, 1000)
    text = tokenizer.decode(ids)
    assert text.split() == [f"t{order[i]}" for i in ids]
    np.testing.assert_array_equal(tokenizer.encode(text), ids)
    again, spans = tokenizer.encode_with_offsets(text)
    np.testing.assert_array_equal(again, ids)
    assert [text[low:high] for low, high in spans] == text.split()
    assert tokenizer.decode([1, 4, 3]) == "t4"  # special tokens are no text


@pytest.mark.parametrize("text", ["t17 Once", "<s>", "t300", "t7", "t17."])
def test_other_words_are_refused(text: str) -> None:
    """Among them the numbers of special tokens, which no text may hold."""
    with pytest.raises(TextError, match="words like t17 only"):
        made()[0].encode(text)
    with pytest.raises(TextError, match="words like t17 only"):
        made()[0].encode_with_offsets(text)


def test_references_are_cut_between_numbers() -> None:
    tokenizer, _ = made()
    ids = np.random.default_rng(1).integers(8, 300, 50)
    pieces = cut_references(Document("d", tokenizer.decode(ids)), tokenizer, 16)
    assert [len(piece.tokens) for piece in pieces] == [16, 16, 16, 2]
    np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in pieces]), ids)


@pytest.mark.parametrize(
    ("named", "words"),
    [(None, "none"), (["0", "1", "2"], "0, 1, 2"), (["0", "1", "1", "2"], "different"),
     (["<s>", "1", "2", "3"], "<s>"), (["0", "1", "2", "300"], "no token 300")],
)  # fmt: skip
def test_four_numbers_must_be_named(named: list[str] | None, words: str) -> None:
    with pytest.raises(TextError, match=words):
        id_tokenizer(300, named, SPECIAL_TOKENS)
