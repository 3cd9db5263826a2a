"""Validation losses against a plain computation, and questions against teacher forcing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.data_workdir import WORLD, make_workdir, tiny_config

from m3jax.config import PREFIX_TOKENS
from m3jax.errors import BankError, InferenceError
from m3jax.evaluation.questions import Question
from m3jax.evaluation.report import losses_table
from m3jax.evaluation.scoring import Answerer
from m3jax.knowledge.memory_writer import check_reader
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.memory.write import write_bank
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.quickstart import people
from m3jax.train.evaluator import MODES, evaluator

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("workdir"), CONFIG)


@pytest.fixture(scope="module")
def params():
    return jax.jit(make_model(CONFIG, PREFIX_TOKENS).init)(jax.random.key(1))


def plain_loss(params, batches, memory_of):
    total, weight = 0.0, 0.0
    read = jax.jit(make_model(CONFIG, PREFIX_TOKENS).logits)
    for batch in batches:
        tokens, memory = jax.tree.map(jnp.asarray, (batch.tokens, memory_of(batch)))
        logits = np.asarray(read(params, tokens, memory), np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = np.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        total -= (chosen * batch.weights).sum()
        weight += batch.weights.sum()
    return total / weight


def test_losses_equal_a_plain_computation(workdir, params):
    evaluate_losses = evaluator(CONFIG, workdir)
    batches = [evaluate_losses.pipeline.batch(s) for s in range(CONFIG.evaluation.batches)]
    figures = evaluate_losses(params)

    def roll(batch):
        keys, values, length = batch.memory
        other, length = np.roll(batch.reference_ids, 1, axis=0), np.roll(length, 1, axis=0).copy()
        for row, own in enumerate(batch.reference_ids):
            length[row][np.isin(other[row], own)] = 0  # memories that the row reads itself
        return ExplicitMemory(np.roll(keys, 1, axis=1), np.roll(values, 1, axis=1), length)

    ways = {"memory": lambda b: b.memory, "none": lambda b: None, "wrong": roll}
    for mode, memory_of in ways.items():
        expected = plain_loss(params, batches, memory_of)
        assert figures[f"loss_{mode}"] == pytest.approx(expected, rel=1e-5)
    assert len({figures[f"loss_{mode}"] for mode in ways}) == 3
    assert figures == evaluate_losses(params)


@pytest.mark.slow
def test_no_row_is_evaluated_twice(workdir, params):
    config = tiny_config(evaluation__batches=1000)
    evaluate_losses = evaluator(config, workdir)
    rows = evaluate_losses.rows
    assert len(evaluate_losses.pipeline.rows) - config.evaluation.batch_size < rows
    assert rows == evaluate_losses.batches * config.evaluation.batch_size
    batches = [evaluate_losses.pipeline.batch(s) for s in range(evaluate_losses.batches)]
    assert len(np.unique(np.concatenate([b.tokens for b in batches]), axis=0)) == rows
    expected = plain_loss(params, batches, lambda b: b.memory)
    assert evaluate_losses(params)["loss_memory"] == pytest.approx(expected, rel=1e-5)


def test_answers_are_those_of_teacher_forcing_with_the_memories(workdir, params):
    pipeline = evaluator(CONFIG, workdir).pipeline
    model, bank = make_model(CONFIG, PREFIX_TOKENS), pipeline.bank
    answerer = Answerer(
        model, params, pipeline.tokenizer, CONFIG.data.sequence_length, batch_size=5
    )
    read = jax.jit(model.logits, static_argnames="window")
    asked = people.questions(WORLD, 0)
    questions = [Question(q.prompt, q.answer, q.references) for q in asked]
    ids = answerer.look_up(questions, pipeline.references)
    correct = answerer.correct(questions, ids, bank)
    for n, question in enumerate(questions[:7]):
        tokens = jnp.array([[1, *pipeline.tokenizer.encode(question.prompt)]], jnp.int32)
        memory = jax.tree.map(jnp.asarray, bank.read(ids[n : n + 1, :1]))
        logits = read(params, tokens, memory, window=1)
        answer = pipeline.tokenizer.encode(question.answer)
        assert len(answer) == 1
        assert correct[n] == (int(np.argmax(logits[0, -1])) == answer[0])
    chosen, attention = answerer.first_choices(questions[:3], ids[:3], bank)
    assert len(chosen) == 3 and attention.shape == (3, 1, 2, 5, 4)
    assert (attention >= 0).all() and (attention.sum((-1, -2)) <= 1 + 1e-6).all()


def test_attention_of_answers_is_that_of_the_slots_of_each_head(workdir, params, tmp_path):
    """Slots that a head does not have get none, those of its tokens some."""
    config = tiny_config(memory__counts="0:1+4")
    pipeline, model = evaluator(CONFIG, workdir).pipeline, make_model(config, PREFIX_TOKENS)
    references = pipeline.references
    options = {"progress": False}
    write_bank(config, model, params, references, tmp_path / "bank", **options)
    bank = Bank.open(tmp_path / "bank")
    tokenizer, length = pipeline.tokenizer, config.data.sequence_length
    answerer = Answerer(model, params, tokenizer, length, batch_size=5)
    questions = [Question(q.prompt, q.answer, q.references) for q in people.questions(WORLD, 0)[:3]]
    ids = answerer.look_up(questions, references)
    chosen, attention = answerer.first_choices(questions, ids, bank)
    assert len(chosen) == 3 and attention.shape == (3, 1, 2, 5, 4)
    tokens = np.asarray(references.lengths)[ids[:, 0]]  # (n, M)
    slot, counts = np.arange(4), np.array([1, 4])
    has = slot < np.minimum(counts[None, :, None, None], tokens[:, None, :, None])
    np.testing.assert_array_equal(attention[:, 0] > 0, has)
    assert (attention.sum((-1, -2)) < 1).all()


def test_each_prompt_chunk_retrieves_with_its_own_text_and_the_answer_inherits(workdir, params):
    pipeline = evaluator(CONFIG, workdir).pipeline
    answerer = Answerer(make_model(CONFIG, PREFIX_TOKENS), params, pipeline.tokenizer, longest=90)
    first, second = WORLD.unseen[:2]
    prompt = "\n".join((first.text, second.text, people.statement(second.name, "pet", "")[:-1]))
    question = Question(prompt, " a very long answer of many more tokens than a chunk has room for")
    ids = answerer.search([question], pipeline.retriever)[0]
    tokens = np.array([1, *pipeline.tokenizer.encode(prompt)])
    for chunk in range((len(tokens) - 1) // 10 + 1):
        text = pipeline.tokenizer.decode(tokens[10 * chunk : 10 * chunk + 10])
        expected = pipeline.retriever.retrieve([text], [tokens[1:]], 5)
        np.testing.assert_array_equal(ids[chunk], expected[0])
    assert len(ids) == (len(tokens) - 1) // 10 + 1
    correct = answerer.correct([question], [np.concatenate([ids, ids[-1:]])], pipeline.bank)
    assert answerer.correct([question], [ids], pipeline.bank) == correct
    answerer.longest = CONFIG.data.sequence_length
    with pytest.raises(InferenceError, match="a prompt of .* do not fit the model's context of 60"):
        answerer.correct([question], [ids], pipeline.bank)


@pytest.mark.parametrize("source", ["precomputed", "online"])
def test_wrong_memories_of_few_rows_are_none_of_their_own(workdir, params, source):
    """A batch that repeats a row, whose neighbour then has the same references."""
    evaluate_losses = evaluator(tiny_config(memory__source=source), workdir)
    batch = evaluate_losses.pipeline.read(np.array([3, 3, 3, 3]))
    assert (batch.reference_ids >= 0).any()
    with_own, none, wrong = (evaluate_losses.sums(params, batch, m)[0] for m in MODES)
    assert wrong == pytest.approx(none, rel=1e-6) and abs(with_own - none) > 1e-6 * none
    evaluate_losses.each = lambda: iter([batch])
    evaluate_losses(params)
    assert evaluate_losses.hidden == 1.0


def test_a_bank_of_another_writer_is_refused(workdir):
    pipeline = evaluator(CONFIG, workdir).pipeline
    read = {"hash": pipeline.bank.binding.writer, "path": "w", "step": 3}
    check_reader(pipeline.bank, {"writer": read}, workdir)
    check_reader(pipeline.bank, {"writer": None}, workdir)
    with pytest.raises(BankError, match="launch/write_bank.py --checkpoint"):
        check_reader(pipeline.bank, {"writer": {**read, "hash": "0" * 32}}, workdir)


def test_the_table_shows_every_mode():
    report = {"checkpoint": "c", "step": 2, "rows": 8, "shift": 1, "retrieval": {}}
    for mode in ("memory", "none", "wrong"):
        report |= {f"loss_{mode}": 2.0, f"accuracy_{mode}": 0.5}
    text = losses_table({**report, "wrong_hidden": 0.25})
    assert "25.0% of the wrong memories were hidden" in text
    assert text.count("2.0000") == 3 and text.count("0.5000") == 3
