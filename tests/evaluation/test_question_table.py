"""Questions under every condition: what the model reads, its measures by plain loops."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.data_workdir import make_workdir, tiny_config, write_text
from tolerance import close

from m3jax.config import PREFIX_TOKENS
from m3jax.errors import InferenceError
from m3jax.evaluation import question_table
from m3jax.evaluation.bootstrap import SAMPLES, interval, resampled_means
from m3jax.evaluation.other_references import draw_others
from m3jax.evaluation.question_table import CONDITIONS, evaluate_questions, questions_table
from m3jax.evaluation.questions import Question, answering, read_questions
from m3jax.evaluation.scoring import Scorer
from m3jax.evaluation.squad_metrics import f1
from m3jax.inference import session as session_module
from m3jax.inference.session import Session
from m3jax.knowledge.memory_writer import Writer
from m3jax.make_model import make_model
from m3jax.text.overlap import overlap
from m3jax.text.tokenizer import BOS

NAMES = ("ada", "bo", "cy", "di", "eli", "fay", "gus", "hal")
CITIES = ("rome", "oslo", "lima", "bonn", "cairo", "delhi", "kyiv", "quito")
CHUNK, K = 10, 3


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    """A passage about every person; two questions about each."""
    paragraphs = []
    for name, city in zip(NAMES, CITIES, strict=True):
        text = f"home of {name} is {city} ."
        asked = [f"where is {name} ?", f"{name} lives where ?"]
        answers = [{"text": city, "answer_start": text.index(city)}, {"text": f"in {city}"}]
        qas = [{"question": question, "answers": answers} for question in asked]
        paragraphs.append({"context": text, "qas": qas})
    path = tmp_path_factory.mktemp("squad") / "people.json"
    path.write_text(json.dumps({"data": [{"title": "p", "paragraphs": paragraphs}]}))
    return path


@pytest.fixture(scope="module")
def session(tmp_path_factory, squad):
    config = tiny_config(
        stage="continual",
        memory__reference_length=20,
        memory__per_prompt_chunk=K,
        data__sequence_length=120,
    )
    folder = tmp_path_factory.mktemp("table")
    documents, _ = write_text(folder)
    workdir = make_workdir(folder / "run", config, (documents, str(squad)))
    params = jax.jit(make_model(config, PREFIX_TOKENS).init)(jax.random.key(7))
    with pytest.MonkeyPatch.context() as patch:
        meta = {"step": 3, "writer": None}
        patch.setattr(session_module, "restore_params", lambda *_, **__: (params, meta))
        return Session(config, workdir)


@pytest.fixture(scope="module")
def questions(squad):
    return read_questions(squad)


SHOTS = [Question("Question: where is Zoe ?\nAnswer:", " paris\n")]
SOLVED = "Question: where is Zoe ?\nAnswer: paris\n\n"


@pytest.fixture(scope="module")
def measured(session, questions):
    """The report, and what was scored and generated under each condition, in their order."""
    seen = {"pairs": [], "ids": [], "texts": []}
    score, proceed = Scorer.score, question_table.continue_prompts

    def scored(self, pairs, ids=None, bank=None, **more):
        seen["pairs"].append(pairs)
        seen["ids"].append(ids)
        return score(self, pairs, ids, bank, **more)

    def continued(*arguments, **more):
        texts = proceed(*arguments, **more)
        seen["texts"].append(texts)
        return texts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "score", scored)
        patch.setattr(question_table, "continue_prompts", continued)
        report = evaluate_questions(session, questions, shots=SHOTS, new_tokens=4, batch_size=4)
    return report, {name: dict(zip(CONDITIONS, of, strict=True)) for name, of in seen.items()}


@pytest.mark.slow
def test_measures_of_the_same_inputs_are_kept(session, questions, tmp_path, monkeypatch):
    kept, asked = tmp_path / "measures.json", []
    answer = question_table._Reader.answer

    def counted(self, name, *rest):
        asked.append(name)
        return answer(self, name, *rest)

    def measure(conditions, **options):
        asked.clear()
        options = {"new_tokens": 2, "batch_size": 4, "kept": kept, **options}
        return evaluate_questions(session, questions, conditions, **options)

    monkeypatch.setattr(question_table._Reader, "answer", counted)
    first = measure(["none"])
    both = measure(["none", "memory_found"])
    assert asked == ["memory_found"]
    assert both["conditions"]["none"] == first["conditions"]["none"]
    assert measure(["none", "memory_found"]) == both and not asked  # recall and all
    with monkeypatch.context() as patch:
        patch.setattr(session.retriever.index, "fingerprint", "another index")
        measure(["none", "memory_found"])
        assert asked == ["memory_found"]
    data = kept.read_bytes()
    for change in ({"k": 2}, {"seed": 1}, {"new_tokens": 1}, {"shots": SHOTS}, {"overlap": 1.0}):
        kept.write_bytes(data)
        measure(["none"], **change)
        assert asked == ["none"], change
    kept.write_bytes(data.replace(b"0.", b"1.", 1))  # damaged: measured again
    assert measure(["none"])["conditions"]["none"] == first["conditions"]["none"]
    assert asked == ["none"]


@pytest.mark.slow
def test_every_condition_is_measured(session, questions, measured):
    report, _ = measured
    assert list(report["conditions"]) == list(CONDITIONS)
    assert (report["questions"], report["groups"], report["shots"]) == (16, 8, 1)
    table = questions_table(report)
    for name, of in report["conditions"].items():
        assert of["cut"] == 0 and f"| {CONDITIONS[name].label} |" in table
        for measure in ("exact_match", "f1", "first", "nats", "worth"):
            assert of[measure]["low"] <= of[measure]["mean"] <= of[measure]["high"]
    assert report["conditions"]["none"]["worth"]["mean"] == 0
    assert report["conditions"]["text"]["worth"]["mean"] == 1
    assert "16 questions about 8 passages, 1 solved examples, 3 references together" in table


@pytest.mark.slow
def test_what_is_read_is_what_the_condition_says(session, questions, measured):
    _, seen = measured
    references, decode = session.references, session.tokenizer.decode
    named = [answering(question, references)[0] for question in questions]
    queries = [question.query for question in questions]
    found = session.retriever.retrieve(queries, session.tokenizer.encode_batch(queries), K)

    def check(which, n, read):
        holds = [questions[n].right[0] in text for text in references.texts(read)]
        if which == "given":
            assert read == [named[n]]
        if which == "among":
            assert read[0] == named[n] and len(set(read)) == K and holds == [True, False, False]
        if which == "wrong":
            assert len(set(read)) == K and not any(holds) and not set(read) & {*found[n]}
        if which in ("found", "best"):
            assert read == [i for i in found[n][: 1 if which == "best" else K] if i >= 0]

    for name, condition in CONDITIONS.items():
        for n, question in enumerate(questions):
            pair = seen["pairs"][name][n]
            text = decode(pair.context)
            assert pair.context[0] == BOS and text.endswith(SOLVED + question.prompt)
            assert decode(pair.continuation) == question.answer
            front = text.removesuffix(SOLVED + question.prompt)
            parts = front.split("\n\n")[:-1]
            as_text = [references.texts(references.live).index(part) for part in parts][::-1]
            ids = seen["ids"][name]
            assert (ids is None) == (not condition.memory) and (parts != []) == bool(condition.text)
            check(condition.text, n, as_text)
            if ids is not None:
                assert ids[n].shape[0] == 1  # every chunk reads the same
                check(condition.memory, n, ids[n][0][ids[n][0] >= 0].tolist())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "text_among", "memory_found"])
def test_figures_are_those_of_plain_loops(session, questions, measured, name):
    report, seen = measured
    read, nats, first = jax.jit(session.model.logits, static_argnames="window"), [], []
    for n, (context, answer) in enumerate(seen["pairs"][name]):
        both = np.concatenate([context, answer])
        row = np.zeros((1, -(-len(both) // CHUNK) * CHUNK), np.int32)
        row[0, : len(both)] = both
        memory = None
        if seen["ids"][name] is not None:
            ids = np.repeat(seen["ids"][name][n][None], row.shape[1] // CHUNK, axis=1)
            memory = jax.tree.map(jnp.asarray, session.bank.read(ids))
        logits = np.asarray(read(session.params, jnp.array(row), memory, window=1), np.float64)[0]
        logits = logits[len(context) - 1 : len(both) - 1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats.append(-logprobs[np.arange(len(answer)), answer].mean())
        first.append((logits.argmax(-1) == answer).all())
        greedy = session.tokenizer.decode(logits[:1, : session.tokenizer.size].argmax(-1))
        if "\n" not in greedy:
            assert seen["texts"][name][n].startswith(greedy)
    of = report["conditions"][name]
    close([of["nats"]["mean"], of["first"]["mean"]], [np.mean(nats), np.mean(first)])
    lines = [text.partition("\n")[0] for text in seen["texts"][name]]
    shares = [f1(line, q.right) for line, q in zip(lines, questions, strict=True)]
    assert of["f1"]["mean"] == pytest.approx(np.mean(shares))


@pytest.mark.slow
def test_memories_written_when_read_are_those_of_the_bank(
    session, questions, measured, monkeypatch
):
    writer = Writer(session.params, session.checkpoint, 3, "")
    monkeypatch.setattr(session_module, "restore_writer", lambda *_: writer)
    cold = evaluate_questions(
        *(session, questions, ["memory_found"]),
        **{"shots": SHOTS, "new_tokens": 4, "batch_size": 4, "cold": True},
    )
    assert session.cold_memories.written > 1
    of, bank = (r["conditions"]["memory_found"] for r in (cold, measured[0]))
    for measure in ("nats", "f1", "first"):
        assert of[measure]["mean"] == pytest.approx(bank[measure]["mean"], rel=2e-3)


def test_the_question_filters_what_it_finds(session, questions):
    """In both directions: its words may all be in a longer reference."""
    told = session.references.texts(session.references.live)
    asked = [Question(text.split(" is ")[0], " x") for text in told]
    found = [evaluate_questions(session, asked, ["text_found"], overlap=limit, new_tokens=0)
             for limit in (1.0, 0.6)]  # fmt: skip
    assert found[0]["dropped"] == 0 and found[1]["dropped"] > 0.1
    assert (
        f"{found[1]['dropped']:.1%} of the references found that overlap with it"
        in questions_table(found[1])
    )
    read = question_table._References(session, asked, K, 0.6, 0).found
    for question, ids in zip(asked, read, strict=True):
        query = session.tokenizer.encode(question.query)
        for i in ids[ids >= 0]:
            reference = session.references[i].tokens
            assert max(overlap(query, reference), overlap(reference, query)) <= 0.6


@pytest.mark.slow
def test_long_prompts_are_counted_and_keep_their_end(session, questions):
    long = Question("word " * 150 + "pet of ada", " otter")
    for new in (0, 4):
        report = evaluate_questions(session, [long, questions[0]], ["none"], new_tokens=new)
        assert report["conditions"]["none"]["cut"] == 1
    assert "up to 1 prompts lost their beginning" in questions_table(report)
    with pytest.raises(InferenceError, match="continuation of 150 tokens"):
        evaluate_questions(session, [Question("a", " b" * 150)], ["none"])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_questions_have_wrong_memories_of_their_own(session, questions, count):
    """Where rolling the questions would give each its own, or the same passage's."""
    read = question_table._References(session, questions[:count], K, 1.0, 0)
    for n in range(count):
        assert len(set(read.wrong[n].tolist())) == K and (read.wrong[n] >= 0).all()
        assert not set(read.wrong[n].tolist()) & {*read.named[n], *read.found[n].tolist()}


def test_wrong_memories_hold_no_answer_though_nothing_was_found(session):
    """Of all eight references, the only one left out is that of the city."""
    unknown = [Question("xyzzy", " oslo"), Question("xyzzy", " Lima.")]
    read = question_table._References(session, unknown, 8, 1.0, 0)
    assert (read.found == -1).all()
    for ids, city in zip(read.wrong, ("oslo", "lima"), strict=True):
        texts = session.references.texts(ids[ids >= 0])
        assert len(set(texts)) == 7 and not any(city in text for text in texts)


def test_others_are_not_own_serve_and_may_be_too_few():
    live = np.array([2, 3, 5, 7, 11])
    drawn = draw_others(live, [[3, 3, -1], [], [2, 3, 5, 7, 11]], 3, seed=1)
    assert set(drawn[0]) <= {2, 5, 7, 11} and len(set(drawn[0])) == 3
    assert set(drawn[1]) <= set(live) and (drawn[2] == -1).all()
    np.testing.assert_array_equal(draw_others(live, [[3]], 3, seed=1)[0], drawn[0])
    odd = draw_others(live, [[]], 3, 1, lambda number, ids: [i % 2 == 0 for i in ids])
    assert odd.tolist() == [[2, -1, -1]]
    many = draw_others(np.arange(20), [[0]] * 4000, 1, seed=3)
    counts = np.bincount(many.ravel(), minlength=20)
    assert counts[0] == 0 and (counts[1:] > 130).all() and (counts[1:] < 300).all()


def test_conditions_that_cannot_be_are_refused(session, questions):
    plain = [Question("where is ada ?", " rome")]
    named = {"text", "text_among", "memory", "memory_among"}
    assert set(question_table._chosen(session, plain, [])) == set(CONDITIONS) - named
    for conditions, message in (
        (["some"], "known: none, text"),
        (["memory"], "names no reference"),
    ):
        with pytest.raises(InferenceError, match=message):
            evaluate_questions(session, plain, conditions)
    config = session.config
    try:
        session.config = tiny_config(memory__source="none", model__prefix="always")
        with pytest.raises(InferenceError, match="reads no memories"):
            evaluate_questions(session, questions, ["wrong"])
    finally:
        session.config = config


def test_intervals_are_of_whole_groups():
    random = np.random.default_rng(0)
    of_group = np.repeat(random.normal(size=100), 5)
    groups = np.repeat(np.arange(100), 5).tolist()
    own, alone = resampled_means(of_group, groups), resampled_means(of_group, range(500))
    assert own.shape == (SAMPLES,)
    assert own.std() == pytest.approx(of_group[::5].std() / 10, rel=0.1)
    assert alone.std() == pytest.approx(of_group.std() / 500**0.5, rel=0.1)
    low, high = interval(own)
    assert (high - low) / own.std() == pytest.approx(2 * 1.96, rel=0.1)
    np.testing.assert_array_equal(
        own, resampled_means(of_group, [f"{group:03}" for group in groups])
    )
    uneven = resampled_means(np.array([1.0, 1.0, 0.0]), ["a", "a", "b"])
    assert sorted(set(np.round(uneven, 6))) == [0.0, round(2 / 3, 6), 1.0]
