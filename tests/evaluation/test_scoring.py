"""Scores of continuations: equal to the plain model, with memories that the contexts find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.data_workdir import make_workdir, tiny_config
from tolerance import close, error

from m3jax.config import PREFIX_TOKENS
from m3jax.evaluation.scoring import Pair, Scorer, as_rows
from m3jax.knowledge.versions import open_bank, open_references, open_retriever, open_version
from m3jax.make_model import make_model
from m3jax.retrieval.retriever import Retriever
from m3jax.text.tokenizer import BOS, Tokenizer

CONFIG = tiny_config()
CHUNK = 10


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("scoring") / "run", CONFIG)


@pytest.fixture(scope="module")
def scorer(workdir):
    model = make_model(CONFIG, PREFIX_TOKENS)
    params = jax.jit(model.init)(jax.random.key(5))
    return Scorer(
        model,
        params,
        Tokenizer.load(workdir / "tokenizer"),
        CONFIG.data.sequence_length,
        batch_size=4,
    )


@pytest.fixture
def knowledge(workdir, scorer):
    version = open_version(workdir)
    references = open_references(CONFIG, version, scorer.tokenizer)
    return open_retriever(CONFIG, version, references, 2 / 3), open_bank(version, references)


def make_pairs(*lengths):
    """Random tokens of contexts (with BOS) and continuations of some lengths."""
    random = np.random.default_rng(0)
    return [
        Pair(np.array([BOS, *random.integers(5, 600, a - 1)], np.int32), random.integers(5, 600, b))
        for a, b in lengths
    ]


def plain(scorer, pair, memory=None):
    """Log-probability and first choices with the logits of the whole row."""
    model, params = scorer.model, scorer.params
    both = np.concatenate([pair.context, pair.continuation])
    row = np.zeros((1, -(-(len(both) - 1) // CHUNK) * CHUNK), np.int32)
    row[0, : len(both) - 1] = both[:-1]
    read = jax.jit(model.logits, static_argnames="window")
    logits = np.asarray(read(params, jnp.array(row), memory, window=1))[0]
    logits = logits[len(pair.context) - 1 : len(both) - 1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = logprobs[np.arange(len(pair.continuation)), pair.continuation]
    return chosen.sum(), bool((logits.argmax(-1) == pair.continuation).all())


def test_scores_are_those_of_the_plain_logits(scorer):
    pairs = make_pairs((1, 1), (3, 40), (12, 9), (25, 2), (9, 2), (10, 1))
    best = plain_first(scorer, pairs[0])
    pairs.append(Pair(pairs[0].context, best))
    scores = scorer.score(pairs)
    expected = [plain(scorer, pair) for pair in pairs]
    close(scores.logprob, [x for x, _ in expected])
    assert scores.greedy.tolist() == [x for _, x in expected]
    assert scores.greedy.tolist() == [False] * 6 + [True]


def plain_first(scorer, pair):
    row = np.zeros((1, CHUNK), np.int32)
    row[0, : len(pair.context)] = pair.context
    read = jax.jit(scorer.model.logits, static_argnames="window")
    logits = read(scorer.params, jnp.array(row), None, window=1)
    return np.argmax(np.asarray(logits)[0, len(pair.context) - 1 : len(pair.context)], -1)


@pytest.mark.slow
def test_a_continuation_reads_what_the_last_chunk_of_its_context_found(scorer, knowledge):
    _, bank = knowledge
    pairs = make_pairs((12, 15), (4, 3))
    ids = [np.array([[0, 1, 2, 3, 4], [5, 6, 7, 8, -1]]), np.array([[9, 10, 11, -1, -1]])]
    scores = scorer.score(pairs, ids, bank)
    for n, read in enumerate(([ids[0][0], ids[0][1], ids[0][1]], [ids[1][0]])):
        memory = jax.tree.map(jnp.asarray, bank.read(np.stack(read)[None]))
        assert scores.logprob[n] == pytest.approx(plain(scorer, pairs[n], memory)[0], rel=1e-5)
    assert error(scorer.score(pairs).logprob, scores.logprob) > 1e-5


class Spy(Retriever):
    """Notes what it is asked."""

    def __init__(self):
        self.asked = []

    def retrieve(self, queries, against, k):
        self.asked += [(q, None if against is None else against[i]) for i, q in enumerate(queries)]
        return np.arange(len(queries) * k).reshape(len(queries), k)


@pytest.mark.parametrize("shift", [0, 1])
def test_chunks_search_with_their_own_text_or_with_that_of_the_chunk_before(scorer, shift):
    spy, tokenizer = Spy(), scorer.tokenizer
    rows = [np.array([BOS, *range(20, 44)], np.int32), np.array([BOS], np.int32)]
    against = [np.array([1, 2]), np.array([3])]
    found = scorer.retrieve(rows, spy, against, shift=shift)
    chunks = [rows[0][low : low + CHUNK] for low in (0, 10, 20)]
    expected = [tokenizer.decode(chunk) for chunk in (chunks[:-1] if shift else chunks)]
    assert [query for query, _ in spy.asked] == expected
    assert all(text is against[0] for _, text in spy.asked)
    assert [one.shape for one in found] == [(3, 5), (1, 5)]
    assert (found[1] == -1).all() and (found[0][0] == -1).all() == bool(shift)
    np.testing.assert_array_equal(found[0][shift:], np.arange(15 - 5 * shift).reshape(-1, 5))


def test_rows_have_few_lengths():
    lengths = [as_rows(make_pairs((n, 1)), CHUNK, 240).tokens.shape[1] for n in range(1, 261)]
    assert sorted(set(lengths)) == [10, 20, 30, 40, 60, 80, 120, 160, 240, 250, 260]
    assert all(length >= n for n, length in enumerate(lengths, 1))
    rows = as_rows(make_pairs((3, 5), (1, 1)), CHUNK)
    assert rows.place[0, :5].tolist() == [2, 3, 4, 5, 6] and rows.real.sum() == 6
    assert rows.place.shape == (2, 8)
