"""Distractors: which references a chunk reads beside the right one, and never as a distractor."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from data.data_workdir import make_workdir, tiny_config, write_text

from m3jax.data.distractors import draw_distractors
from m3jax.data.pipeline import open_pipeline
from m3jax.errors import TextError
from m3jax.memory.bank import Bank
from m3jax.text.overlap import overlap

FOUND, STORED = "search", "stored"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("workdir"), tiny_config())


def config_of(ids=STORED, **changes):
    """Five memories a chunk, three of them distractors."""
    given = {"memory__per_chunk": 5, "memory__distractors": 3, "retrieval__ids": ids, **changes}
    packing = {"data__packing": "document"} if ids == STORED else {}
    return tiny_config(**packing, **given)


def without(config):
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.memory.distractors = 0
    return config


def no_overlap(ids):
    return np.zeros(len(ids), bool)


def draw(seed=0, right=((7,), (3,), (-1,)), live=40, share=0.5, count=4, overlapping=no_overlap):
    random, right = np.random.default_rng(seed), np.array(right)
    found = np.array([[7, 3, 1, -1, -1], [1, 2, 4, 5, 6], [8, 9, 1, 2, 4]])[: len(right)]
    hard = random.random((len(right), count)) < share
    drawn = draw_distractors(right, found, np.arange(live), hard, overlapping, random)
    return drawn, hard.sum(axis=1)


def test_a_row_draws_the_next_best_found_then_any_others_and_never_the_right_ones():
    occurred = [set(), set()]
    for seed in range(300):
        drawn, hard = draw(seed)
        assert (drawn[2] == -1).all()  # nothing is right for it
        for chunk, near in enumerate(([1], [1, 2, 4, 5])):
            found = near[: hard[chunk]]
            assert drawn[chunk, : len(found)].tolist() == found
            assert len(set(drawn[chunk])) == 4 and not {-1, 3, 7} & set(drawn[chunk].tolist())
            occurred[chunk] |= set(drawn[chunk].tolist())
    assert occurred == [set(range(40)) - {3, 7}] * 2
    assert draw(share=1.0)[0][1].tolist() == [1, 2, 4, 5]
    easy = np.concatenate([draw(seed, share=0.0)[0][:2].ravel() for seed in range(300)])
    counts = np.delete(np.bincount(easy, minlength=40), [3, 7])
    assert 30 < counts.min() <= counts.max() < 100  # 63 on average


def test_few_references_leave_places_empty_and_overlapping_ones_are_not_drawn():
    for seed in range(20):
        for chunk in draw(seed, live=4, share=0.0)[0][:2].tolist():
            assert sorted(chunk[:3]) == [0, 1, 2] and chunk[3] == -1
    odd = {i for s in range(50) for i in draw(s, share=0.0, overlapping=lambda x: x % 2 == 0)[0][0]}
    assert odd == set(range(1, 40, 2)) - {3, 7}


@pytest.mark.parametrize("ids", [FOUND, STORED])
def test_right_memories_are_those_without_distractors(workdir, ids):
    config = config_of(ids)
    pipeline, plain = open_pipeline(config, workdir), open_pipeline(without(config), workdir)
    seen = set()
    for step in range(6):
        batch, right = pipeline.batch(step), plain.batch(step)
        np.testing.assert_array_equal(batch.reference_ids[..., :2], right.reference_ids[..., :2])
        np.testing.assert_array_equal(batch.tokens, right.tokens)
        for row in batch.reference_ids:
            own, wrong = row[:, :2][row[:, :2] >= 0], row[:, 2:]
            assert not set(own.tolist()) & set(wrong.ravel().tolist())
            reads = (row[:, :2] >= 0).any(axis=1)
            assert (wrong[reads] >= 0).all() and (wrong[~reads] == -1).all()
            assert all(len(set(chunk)) == 3 for chunk in wrong[reads].tolist())
            seen |= set(wrong.ravel().tolist())
        bank = Bank.open(workdir / "bank").read(batch.reference_ids)
        jax.tree.map(np.testing.assert_array_equal, batch.memory, bank)
    assert len(seen) > 40


def test_hard_distractors_are_the_next_best_found(workdir):
    pipeline = open_pipeline(config_of(memory__hard_distractors=1.0), workdir)
    hits = 0
    for row, chunks in zip(pipeline.drawn(2), pipeline.batch(2).reference_ids, strict=True):
        item, right = pipeline.rows[int(row)], set(chunks[:, :2].ravel().tolist())
        for chunk, query, text in item.queries(0):  # its own text, whatever retrieval.shift is
            if chunks[chunk, 0] < 0:
                continue
            near = pipeline.retriever.retrieve([pipeline.tokenizer.decode(query)], [text], 8)[0]
            expected = [i for i in near.tolist() if i >= 0 and i not in right][:3]
            assert chunks[chunk, 2 : 2 + len(expected)].tolist() == expected
            hits += len(expected)
    assert hits > 20


def test_a_row_reads_no_distractor_that_it_contains(workdir):
    limit = {"retrieval__overlap_train": 0.3, "retrieval__shift": 0}
    pipeline = open_pipeline(config_of(FOUND, memory__hard_distractors=0.0, **limit), workdir)
    batch = pipeline.batch(0)
    whole = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
    drawn = [
        overlap(row, tokens[tokens > 0])
        for row, ids in zip(whole, batch.reference_ids[..., 2:], strict=True)
        for tokens in pipeline.references.tokens(ids[ids >= 0])
    ]
    assert len(drawn) > 20 and 0 < max(drawn) <= 0.3


@pytest.mark.parametrize("ids", [FOUND, STORED])
def test_distractors_depend_on_seed_and_step_alone(workdir, ids):
    """Neither on hosts, threads, earlier batches nor the step that a run begins at."""
    config = config_of(ids, memory__dropout=0.3)
    whole = open_pipeline(config, workdir).batch(7)
    for hosts in (2, 4):
        parts = [open_pipeline(config, workdir).batch(7, r) for r in np.split(np.arange(4), hosts)]
        joined = jax.tree.map(lambda axis, *x: np.concatenate(x, axis), whole.row_axes(), *parts)
        jax.tree.map(np.testing.assert_array_equal, whole, joined)
    resumed = next(itertools.islice(open_pipeline(config, workdir).batches(5), 2, None))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    pipeline = open_pipeline(config_of(ids), workdir)
    pipeline._orders = [np.arange(32) % 4]  # the same rows in every step
    steps = np.stack([pipeline.batch(step).reference_ids for step in range(8)])
    assert (steps[..., :2] == steps[:1, ..., :2]).all()
    reads = steps[0, ..., 0] >= 0
    rows = steps[:, reads][..., 2:]
    assert (np.sort(rows[1:]) != np.sort(rows[:-1])).any(axis=-1).mean() > 0.9
    other = open_pipeline(config_of(ids, memory__dropout=0.3, seed=1), workdir)
    assert not np.array_equal(other.batch(7).reference_ids, whole.reference_ids)


def test_memories_with_positions_of_their_own_are_in_random_order(workdir):
    pipeline = open_pipeline(config_of(), workdir)
    ordered = np.stack([pipeline.batch(step).reference_ids for step in range(8)])
    pipeline = open_pipeline(config_of(memory__spacing=8), workdir)
    shuffled = np.stack([pipeline.batch(step).reference_ids for step in range(8)])
    np.testing.assert_array_equal(np.sort(shuffled, axis=-1), np.sort(ordered, axis=-1))
    reads = ordered[..., 0] >= 0
    right = shuffled[reads] == ordered[reads][:, :1]
    assert right.any(axis=0).all() and right.any(axis=1).all()
    counts = pipeline.report()
    assert counts["chunks"] - counts["chunks_without_reference"] == reads.sum()


def test_hidden_chunks_read_no_distractors_either_and_validation_reads_none(workdir):
    config = config_of(memory__dropout=0.5)
    pipeline = open_pipeline(config, workdir)
    for step in range(4):
        ids = pipeline.batch(step).reference_ids
        assert (ids[pipeline._hidden(step)] == -1).all() and (ids[..., 2:] >= 0).any()
    validation = open_pipeline(config, workdir, split="validation")
    assert (validation.batch(0).reference_ids[..., 1:] == -1).all()
    assert validation.retriever is None


def test_online_batches_carry_the_tokens_of_distractors(workdir):
    pipeline = open_pipeline(config_of(memory__source="online"), workdir)
    batch = pipeline.batch(1)
    ids = batch.reference_ids
    np.testing.assert_array_equal(ids, open_pipeline(config_of(), workdir).batch(1).reference_ids)
    read = ids >= 0
    tokens = pipeline.references.tokens(ids[read])
    np.testing.assert_array_equal(batch.reference_tokens[read], tokens)


# -- questions as rows -----------------------------------------------------------------------------
def test_questions_are_rows_whose_chunks_read_their_reference(tmp_path):
    lines = Path(write_text(tmp_path)[1]).read_text().splitlines()
    people = [json.loads(line) for line in lines]
    records = []
    for person in people:
        relation, _, name, value = person["text"].split("\n")[0].split()
        question = f"What is the {relation} of {name}, {person['id']}?"
        records.append({"question": question, "answer": [value, "?"], "reference": person["id"]})
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = config_of(text__validation_share=0.3, memory__hard_distractors=1.0)
    texts = str(tmp_path / "asked.jsonl"), str(tmp_path / "knowledge.jsonl")
    pipeline = open_pipeline(config, make_workdir(tmp_path / "run", config, texts))
    decode, batch = pipeline.tokenizer.decode, pipeline.batch(0)
    asked = {f"Question: {r['question']}\nAnswer:": r for r in records}
    for row in range(4):
        scored = batch.weights[row] > 0
        prompt = decode(batch.tokens[row, 1 : 1 + int(scored.argmax())])
        record = asked[prompt]
        assert decode(batch.targets[row][scored]) == f" {record['answer'][0]}\n"
        chunks = -(-(int(scored.nonzero()[0][-1]) + 2) // 10)
        assert chunks > 1  # a question longer than a chunk
        ids = batch.reference_ids[row]
        assert set(ids[:chunks, 0]) == {pipeline.references.find(f"{record['reference']}#0")}
        assert (ids[:chunks, 2:] >= 0).all() and (ids[chunks:] == -1).all()
        for chunk in range(chunks):  # searched without the answer, where there is more than it
            low = 10 * chunk
            part, no_loss = batch.tokens[row, low : low + 10], [low > 0] * 10
            no_loss[low == 0 :] = batch.weights[row, max(low - 1, 0) : low + 9] == 0
            query = decode(part[no_loss] if np.any(no_loss) else part)
            near = pipeline.retriever.retrieve([query], [batch.tokens[row]], 8)[0].tolist()
            near = [i for i in near if i >= 0 and i != ids[0, 0]][:3]
            assert ids[chunk, 2 : 2 + len(near)].tolist() == near and (chunk or near)


def test_a_document_of_several_references_is_not_one(tmp_path):
    config = config_of(text__validation_share=0.3, memory__reference_length=5)
    write_text(tmp_path)
    asked = [{"question": f"{n}?", "answer": n, "reference": "person-1"} for n in range(40)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    texts = str(tmp_path / "asked.jsonl"), str(tmp_path / "knowledge.jsonl")
    pipeline = open_pipeline(config, make_workdir(tmp_path / "run", config, texts))
    with pytest.raises(TextError, match=r"'person-1' has \d references; name .* person-1#0 … "):
        pipeline.batch(0)
