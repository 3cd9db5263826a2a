"""Batches: a function of (seed, step), the same for any hosts, with the right memories."""

import itertools

import jax
import numpy as np
import pytest
from data.data_workdir import make_workdir, tiny_config, write_text
from memory.served import serving

from m3jax.data.pipeline import open_pipeline
from m3jax.errors import BankError, TextError
from m3jax.memory.bank import Bank
from m3jax.text.overlap import overlap
from m3jax.text.prepare import prepare_text
from m3jax.text.tokenizer import BOS


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("workdir"), tiny_config())


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("source", ["none", "precomputed", "online"])
def test_batches_from_a_step_equal_the_batches_of_those_steps(workdir, source):
    pipeline = open_pipeline(tiny_config(memory__source=source, memory__dropout=0.3), workdir)
    for offset, batch in enumerate(itertools.islice(pipeline.batches(5), 4)):
        assert_same(batch, open_pipeline(pipeline.config, workdir).batch(5 + offset))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_load_the_whole_batch(workdir, hosts):
    config = tiny_config(memory__dropout=0.3)
    whole = open_pipeline(config, workdir).batch(7)
    rows = np.split(np.arange(4), hosts)
    parts = [open_pipeline(config, workdir).batch(7, slice(r[0], r[-1] + 1)) for r in rows]
    joined = jax.tree.map(lambda axis, *x: np.concatenate(x, axis), whole.row_axes(), *parts)
    assert_same(whole, joined)


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_a_place_of_the_batch_has_rows_of_one_share(workdir, packing):
    config = tiny_config(memory__source="none", data__packing=packing, data__shares=2)
    pipeline = open_pipeline(config, workdir)
    rows, epoch = pipeline.rows, min(np.diff(pipeline.rows.shares)) // 2
    drawn = np.array([pipeline.drawn(step) for step in range(epoch)])
    assert (drawn[:, :2] < rows.shares[1]).all() and (drawn[:, 2:] >= rows.shares[1]).all()
    assert len(np.unique(drawn)) == drawn.size
    np.testing.assert_array_equal(pipeline.drawn(1, np.array([1, 3])), drawn[1, [1, 3]])
    assert_same(pipeline.batch(3, slice(2, 4)).tokens, pipeline.batch(3).tokens[2:])
    other = open_pipeline(tiny_config(memory__source="none", seed=1, data__shares=2), workdir)
    assert not np.array_equal(drawn[0], other.drawn(0))


def test_the_seed_decides_the_order_and_every_row_comes_once_an_epoch(workdir):
    config = tiny_config(memory__source="none")
    pipeline = open_pipeline(config, workdir)
    epoch = len(pipeline.rows) // 4
    first = np.concatenate([pipeline.batch(s).tokens for s in range(epoch)])
    assert len(np.unique(first, axis=0)) == len(first)
    other = open_pipeline(tiny_config(memory__source="none", seed=1), workdir)
    assert not np.array_equal(first[:4], other.batch(0).tokens)
    second = np.concatenate([pipeline.batch(epoch + s).tokens for s in range(epoch)])
    assert not np.array_equal(first, second)


def test_every_seed_of_64_bits_and_every_share_has_an_order_of_its_own(workdir):
    orders = []
    for seed in (0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1):
        config = tiny_config(memory__source="none", seed=seed, data__shares=2)
        pipeline = open_pipeline(config, workdir)
        drawn = np.concatenate([pipeline.drawn(step).reshape(2, -1) for step in range(8)], axis=1)
        orders += (drawn - pipeline.rows.shares[:2, None]).tolist()
    assert len({*map(tuple, orders)}) == len(orders) == 14


def test_targets_are_the_next_tokens(workdir):
    batch = open_pipeline(tiny_config(), workdir).batch(0)
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert (batch.weights[batch.targets == BOS] == 0).all()


@pytest.mark.parametrize("shift", [0, 1])
def test_chunks_read_what_the_retriever_finds_for_their_query(workdir, shift):
    pipeline = open_pipeline(tiny_config(retrieval__shift=shift), workdir)
    batch = pipeline.batch(2)
    ids = batch.reference_ids
    assert ids.shape == (4, 6, 1) and (shift == 0 or (ids[:, 0] == -1).all())
    assert (ids[:, shift:] >= 0).mean() > 0.5
    for row, chunk in itertools.product(range(4), range(shift, 6)):
        low = (chunk - shift) * 10
        text = pipeline.tokenizer.decode(batch.tokens[row, low : low + 10])
        whole = np.append(batch.tokens[row], batch.targets[row, -1])
        assert ids[row, chunk] == pipeline.retriever.retrieve([text], [whole], 1)[0]
    bank = Bank.open(workdir / "bank")
    assert_same(batch.memory, bank.read(ids))


def test_a_served_bank_gives_the_same_batches_and_its_cache_is_counted(workdir):
    config = tiny_config(memory__cache_bytes=1 << 24)
    with serving(workdir / "bank") as server:
        pipeline = open_pipeline(config, workdir, bank=server.url)
        batch = pipeline.batch(2)
        assert_same(batch, open_pipeline(tiny_config(), workdir).batch(2))
        asked = len(np.unique(batch.reference_ids)) - (-1 in batch.reference_ids)
        assert asked > 3 and pipeline.report()["cache_misses"] == asked
        sent = len(server.sent)
        pipeline.batch(2)
        assert len(server.sent) == sent and pipeline.report()["cache_hits"] == asked
    opened = open_pipeline(config, workdir)
    for _ in range(2):
        opened.batch(2)
    assert opened.report()["cache_hits"] == asked
    assert open_pipeline(tiny_config(), workdir).report()["cache_misses"] == 0


@pytest.mark.parametrize(("split", "limit"), [("train", 0.9), ("validation", 0.3)])
def test_no_row_reads_a_reference_it_contains(workdir, split, limit):
    options = {"retrieval__shift": 0, "evaluation__shift": 0, "retrieval__overlap_evaluation": 0.3}
    pipeline = open_pipeline(tiny_config(**options), workdir, split=split)
    batch = pipeline.batch(0)
    whole = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
    overlaps = []
    for row, ids in zip(whole, batch.reference_ids, strict=True):
        for found in ids[ids >= 0]:
            tokens = pipeline.references.tokens(np.array([found]))[0]
            overlaps.append(overlap(row, tokens[tokens > 0]))
    assert max(overlaps) <= limit
    assert split == "validation" or max(overlaps) > 0.3  # or the limits could not be told apart
    assert pipeline.report()["dropped"] > 0


def test_stored_ids_are_those_of_the_document(workdir):
    config = tiny_config(retrieval__ids="stored", data__packing="document")
    pipeline = open_pipeline(config, workdir)
    batch = pipeline.batch(1)
    order = pipeline.drawn(1)
    for row, ids in zip(order, batch.reference_ids, strict=True):
        keys = pipeline.rows[int(row)].references
        expected = [pipeline.references.find(key) for key in keys] or [-1] * 6
        assert ids.ravel().tolist() == expected


def test_online_batches_carry_the_tokens_of_the_same_references(workdir):
    found = open_pipeline(tiny_config(), workdir).batch(3).reference_ids
    pipeline = open_pipeline(tiny_config(memory__source="online"), workdir)
    batch = pipeline.batch(3)
    np.testing.assert_array_equal(batch.reference_ids, found)
    tokens = batch.reference_tokens
    np.testing.assert_array_equal(tokens[found >= 0], pipeline.references.tokens(found[found >= 0]))
    assert (tokens[found < 0] == 0).all()


@pytest.mark.slow
def test_dropout_hides_its_share_of_chunks_in_training_only(workdir):
    config = tiny_config(memory__dropout=0.5, retrieval__shift=0)
    dropped, plain = (open_pipeline(c, workdir) for c in (config, tiny_config(retrieval__shift=0)))
    ids = np.stack([dropped.batch(s).reference_ids for s in range(20)])
    all_ids = np.stack([plain.batch(s).reference_ids for s in range(20)])
    hidden = (ids < 0) & (all_ids >= 0)
    assert 0.4 < hidden.sum() / (all_ids >= 0).sum() < 0.6
    np.testing.assert_array_equal(ids[~hidden], all_ids[~hidden])
    assert not np.array_equal(dropped._hidden(0), dropped._hidden(1))
    validation = open_pipeline(config, workdir, split="validation")
    assert validation.dropout == 0 and validation.shift == 1


def test_parts_of_another_run_are_refused(workdir, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    config = tiny_config(text__vocabulary=300)
    prepare_text(config, other, *write_text(other), say=lambda line: None)
    with pytest.raises(BankError, match="tokenizer|references"):
        mixed = tmp_path / "mixed"
        mixed.mkdir()
        for name in ("tokenizer", "corpus", "references"):
            (mixed / name).symlink_to(other / name)
        stored = tiny_config(retrieval__ids="stored", data__packing="document")
        open_pipeline(stored, mixed, bank=workdir / "bank")
    with pytest.raises(BankError, match="kept_tokens = 4, here 3"):
        open_pipeline(tiny_config(memory__kept_tokens=3), workdir)
    with pytest.raises(TextError, match="another tokenizer"):
        wrong = tmp_path / "wrong"
        wrong.mkdir()
        (wrong / "tokenizer").symlink_to(workdir / "tokenizer")
        (wrong / "corpus").symlink_to(other / "corpus")
        open_pipeline(tiny_config(memory__source="none"), wrong)
    with pytest.raises(TextError, match="reference_length"):
        open_pipeline(tiny_config(memory__reference_length=5), workdir)
