"""Rows against the token stream they are cut from."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from m3jax.data.rows import Rows
from m3jax.errors import TextError
from m3jax.text.corpus import Corpus
from m3jax.text.tokenizer import BOS, END


class FakeCorpus(Corpus):
    """Token documents in memory, in three shards."""

    shards = 3

    def __init__(self, documents):
        self.documents, self.folder = documents, Path("corpus/validation")
        self.lengths = np.array([len(document.tokens) for document in documents])

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, i):
        return self.documents[i]


def corpus(*lengths: int) -> FakeCorpus:
    random = np.random.default_rng(0)
    documents = []
    for number, length in enumerate(lengths):
        inner = random.integers(4, 99, length - 2)
        weights = random.integers(0, 2, length).astype(np.float32) if number % 2 else None
        keys = tuple(f"{number}-{chunk}" for chunk in range(length // 4))
        tokens = np.array([BOS, *inner, END], np.int32)
        documents.append(SimpleNamespace(tokens=tokens, weights=weights, references=keys))
    return FakeCorpus(documents)


def expected_weights(documents: FakeCorpus) -> np.ndarray:
    weights = [np.ones(len(d.tokens)) if d.weights is None else d.weights for d in documents]
    return np.concatenate(weights) * (np.concatenate([d.tokens for d in documents]) != BOS)


@pytest.mark.parametrize("lengths", [(5, 3, 40, 2, 9), (41,), (10, 10, 10, 11)])
def test_concatenated_rows_are_the_stream_cut_every_t_tokens(lengths):
    documents = corpus(*lengths)
    rows = Rows(documents, 8, 4, "concat")
    stream = np.concatenate([d.tokens for d in documents])
    weights = expected_weights(documents)
    assert len(rows) == (len(stream) - 1) // 8
    for r in range(len(rows)):
        np.testing.assert_array_equal(rows[r].inputs, stream[8 * r : 8 * r + 8])
        np.testing.assert_array_equal(rows[r].targets, stream[8 * r + 1 : 8 * r + 9])
        np.testing.assert_array_equal(rows[r].weights, weights[8 * r + 1 : 8 * r + 9])


def test_document_rows_begin_with_their_document_and_are_padded():
    documents = corpus(6, 9, 10, 18)
    rows = Rows(documents, 8, 4, "document")
    assert len(rows) == 1 + 1 + 2 + 3
    np.testing.assert_array_equal(rows[0].inputs, [*documents[0].tokens, 0, 0])
    ((text, first),) = rows[0].texts
    np.testing.assert_array_equal(text, documents[0].tokens)  # the filter compares no padding
    assert first == 0
    np.testing.assert_array_equal(rows[0].weights, [1, 1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(rows[1].targets, documents[1].tokens[1:])
    np.testing.assert_array_equal(rows[3].inputs[:2], documents[2].tokens[8:])
    assert rows[3].inputs[2:].sum() == 0 and rows[3].weights[1:].sum() == 0
    assert rows[4].references == ("3-0", "3-1") and rows[5].references == ("3-2", "3-3")


def test_a_last_star_repeats_a_key_for_all_further_chunks():
    documents = corpus(18, 6, 18)
    documents.documents[0].references = ("a", "*")
    documents.documents[1].references = ("", "b", "*")
    documents.documents[2].references = ("a", "b", "*")
    rows = Rows(documents, 8, 4, "document")
    keys = [rows[i].references for i in range(len(rows))]
    a, b, ab = ("a",) * 2, ("b",) * 2, ("a", "b")
    assert keys == [a, a, ("a",), ("", "b"), ab, b, ("b",)]


def test_a_corpus_too_small_for_a_row_is_refused():
    with pytest.raises(TextError, match="corpus/validation has 5 tokens.*sequence_length"):
        Rows(corpus(5), 8, 4, "concat")


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_rows_of_a_share_have_only_documents_of_its_shards(packing):
    documents = corpus(*range(6, 30), 3, 2)
    rows = Rows(documents, 8, 4, packing, 2)
    first, second = (
        [i for i in range(26) if i % 3 % 2 == share] for share in range(2)
    )  # of the shards 0 and 2, and of shard 1
    for low, high, numbers in ((0, 1, first), (1, 2, second)):
        dealt = FakeCorpus([documents[i] for i in numbers])
        alone, start = Rows(dealt, 8, 4, packing), int(rows.shares[low])
        assert rows.shares[high] - start == len(alone)
        for r in range(len(alone)):
            for row, expected in zip(rows[start + r], alone[r], strict=True):
                np.testing.assert_equal(row, expected)
        every = np.arange(len(alone))
        documents_of = np.array(numbers)[alone.document_of(every)]
        np.testing.assert_array_equal(rows.document_of(start + every), documents_of)
    assert len(rows) == rows.shares[2]


def test_a_share_without_shards_or_rows_is_refused():
    with pytest.raises(TextError, match=r"has 3 shards, too few for config.data.shares = 4"):
        Rows(corpus(9, 9, 9, 9), 8, 4, "concat", 4)
    with pytest.raises(TextError, match=r"one row of 8 in each of 3 shares; .*config.data.shares"):
        Rows(corpus(20, 20, 3), 8, 4, "concat", 3)
