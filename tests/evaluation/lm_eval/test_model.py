"""The adapter for lm-evaluation-harness: scores, queries, modes, filter; tasks scored by hand."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.data_workdir import WORLD, make_workdir, tiny_config
from tolerance import close, error

from m3jax.config import PREFIX_TOKENS
from m3jax.errors import InferenceError
from m3jax.evaluation.task_files import read_task
from m3jax.inference import session as session_module
from m3jax.inference.generate import Generator
from m3jax.inference.memory_retrieval import MemoryRetriever
from m3jax.inference.rag import rag_prompts
from m3jax.inference.session import Session
from m3jax.make_model import make_model
from m3jax.memory.write import write_bank
from m3jax.text.references import References
from m3jax.text.tokenizer import BOS

pytestmark = pytest.mark.parity  # needs lm-eval, which the extra `parity` brings
CHUNK = 10


@pytest.fixture(scope="module")
def session(tmp_path_factory, require):
    require("lm_eval")
    config = tiny_config(stage="continual")
    workdir = make_workdir(tmp_path_factory.mktemp("harness") / "run", config)
    params = jax.jit(make_model(config, PREFIX_TOKENS).init)(jax.random.key(5))
    with pytest.MonkeyPatch.context() as patch:
        meta = {"step": 3, "writer": None}
        patch.setattr(session_module, "restore_params", lambda *_, **__: (params, meta))
        return Session(config, workdir)


@pytest.fixture(scope="module")
def make(session):
    from m3jax.evaluation.lm_eval.model import HarnessModel

    models = {}

    def made(mode, **options):
        """One model for each, so that its programs are compiled once."""
        key = (mode, *sorted(options.items()))
        if key not in models:
            models[key] = HarnessModel(session, mode, batch_size=4, **options)
        return models[key]

    return made


def requests(kind, *arguments, questions=None):
    from lm_eval.api.instance import Instance

    return [
        Instance(kind, {}, one, 0, ("t", n if questions is None else questions[n], 1))
        for n, one in enumerate(arguments)
    ]


def spy_on(model, monkeypatch):
    """What the model's retriever is asked: queries, and texts to filter against."""
    asked = []
    retrieve = model.retriever.retrieve

    def noted(queries, against, k):
        asked.extend((q, None if against is None else against[i]) for i, q in enumerate(queries))
        return retrieve(queries, against, k)

    monkeypatch.setattr(model.retriever, "retrieve", noted)
    return asked


def plain(session, context, continuation, ids=None):
    """Sum of log-probabilities by the logits of the whole row; `ids` of each chunk."""
    tokens = [BOS, *session.tokenizer.encode(context)]
    scored = session.tokenizer.encode(continuation).tolist()
    both = [*tokens, *scored]
    T = -(-(len(both) - 1) // CHUNK) * CHUNK
    row = np.zeros((1, T), np.int32)
    row[0, : len(both) - 1] = both[:-1]
    memory = None
    if ids is not None:
        read = np.stack([ids[min(c, len(ids) - 1)] for c in range(T // CHUNK)])
        memory = jax.tree.map(jnp.asarray, session.bank.read(read[None]))
    logits = session.model.logits(session.params, jnp.array(row), memory, window=1)
    logprobs = np.asarray(jax.nn.log_softmax(logits[0], axis=-1), np.float64)
    return logprobs[np.arange(len(tokens) - 1, len(both) - 1), scored].sum()


def chunks_found(session, context):
    tokens = np.array([BOS, *session.tokenizer.encode(context)])
    parts = [tokens[low : low + CHUNK] for low in range(0, len(tokens), CHUNK)]
    return session.retriever.retrieve([session.tokenizer.decode(p) for p in parts], None, 5)


CONTEXTS = [
    f"{WORLD.unseen[0].text} The home of {WORLD.unseen[0].name} and of {WORLD.unseen[1].name} is",
    f"{WORLD.unseen[2].text} The pet of {WORLD.unseen[2].name} is",
]
ARGUMENTS = [(c, f" {end}") for c in CONTEXTS for end in ("zebra quartz", "wolf")]
OF = [0, 0, 1, 1]


def test_log_likelihoods_are_those_of_the_plain_model(session, make):
    arguments = [*ARGUMENTS, ("", " wolf"), ("a b  ", "c")]
    found = make("none").loglikelihood(requests("loglikelihood", *arguments), disable_tqdm=True)
    split = [*ARGUMENTS, ("", " wolf"), ("a b", "  c")]  # space belongs to what follows
    expected = [plain(session, *one) for one in split]
    close([x for x, _ in found], expected)


def test_a_continuation_reads_the_memories_of_its_context_and_is_in_no_query(
    session, make, monkeypatch
):
    model = make("memory", overlap=1.0)
    asked = spy_on(model, monkeypatch)
    given = requests("loglikelihood", *ARGUMENTS, questions=OF)
    found = model.loglikelihood(given, disable_tqdm=True)
    ids = [chunks_found(session, context) for context in CONTEXTS]
    expected = [plain(session, *one, ids[n]) for one, n in zip(ARGUMENTS, OF, strict=True)]
    close([x for x, _ in found], expected)
    without = make("none").loglikelihood(given, disable_tqdm=True)
    assert error([x for x, _ in without], expected) > 1e-5
    assert "".join(query for query, _ in asked) == "".join(CONTEXTS)  # each once, and nothing else
    assert all(against is None for _, against in asked)


@pytest.mark.parametrize("count", [2, 4])
def test_wrong_memories_are_none_of_the_question(session, make, monkeypatch, count):
    """Of one question, too, and of two with the same words."""
    model = make("wrong", overlap=1.0)
    read = []
    score = model.scorer.score
    monkeypatch.setattr(
        model.scorer, "score", lambda p, ids, *a, **k: read.extend(ids) or score(p, ids, *a, **k)
    )
    for arguments, of in ((ARGUMENTS[:count], OF[:count]), ([ARGUMENTS[0]] * 2, [0, 1])):
        read.clear()
        given = requests("loglikelihood", *arguments, questions=of)
        found = model.loglikelihood(given, disable_tqdm=True)
        for (context, _), ids in zip(arguments, read, strict=True):
            assert ids.shape == (1, 5) and len(set(ids[0].tolist())) == 5 and (ids >= 0).all()
            assert not set(ids[0].tolist()) & set(chunks_found(session, context).ravel().tolist())
        expected = [plain(session, *one, ids) for one, ids in zip(arguments, read, strict=True)]
        close([x for x, _ in found], expected)
        same = [of.index(question) for question in of]
        assert all((read[n] == read[first]).all() for n, first in enumerate(same))


def test_references_that_the_context_contains_are_dropped(session, make, monkeypatch):
    own = session.references.find(WORLD.unseen[0].reference)
    text = session.references.texts(np.array([own]))[0]
    context = f"{text} The home of {WORLD.unseen[0].name} is"
    given = requests("loglikelihood", (context, " wolf"), (CONTEXTS[1], " wolf"))
    read = {}
    for limit in (1.0, 2 / 3):
        model = make("memory", overlap=limit)
        before = model.retriever.report()["dropped"]
        asked = spy_on(model, monkeypatch)
        model.loglikelihood(given, disable_tqdm=True)
        read[limit] = model.retriever.report()["dropped"] - before
        of_context = [against for query, against in asked if query in context]
        if limit < 1:
            whole = session.tokenizer.encode(context)
            assert all(np.array_equal(against, whole) for against in of_context)
        ids = model.scorer.retrieve(
            [np.array([BOS, *session.tokenizer.encode(context)], np.int32)],
            model.retriever,
            None if limit == 1 else [session.tokenizer.encode(context)],
        )
        assert (own in ids[0]) == (limit == 1)
    assert read[1.0] == 0 < read[2 / 3]


def test_rag_puts_references_in_front_and_cuts_from_the_left(session, make, monkeypatch):
    model = make("rag", references=1, overlap=1.0)
    asked = spy_on(model, monkeypatch)
    before = dict(model.counts)
    context = "pet of Mozi"
    found = model.loglikelihood(requests("loglikelihood", (context, " wolf")), disable_tqdm=True)
    (shown,), ids = rag_prompts(session.retriever, [context], 1)
    np.testing.assert_array_equal(ids, session.retriever.retrieve([context], None, 1))
    tokens = session.tokenizer.encode(shown)
    room = 60 - len(session.tokenizer.encode(" wolf"))
    assert len(tokens) <= room  # else take another question
    assert found[0][0] == pytest.approx(plain(session, shown, " wolf"), rel=1e-5)
    assert asked == [(context, None)] and model.counts["truncated"] == before["truncated"]
    many = make("rag", references=5, overlap=1.0)
    many.loglikelihood(requests("loglikelihood", (context, " wolf")), disable_tqdm=True)
    assert many.counts == {"requests": 1, "truncated": 1}
    pair = many._pair(range(3, 103), [7, 8])
    assert pair.context.tolist() == [BOS, *range(45, 103)]
    with pytest.raises(InferenceError, match="continuation of 61 tokens"):
        many._pair([5], [7] * 61)


def test_rolling_scores_every_token_once_with_memories_of_the_chunk_before(
    session, make, monkeypatch
):
    text = " ".join(person.text for person in WORLD.unseen[:10])
    tokens = session.tokenizer.encode(text)
    assert 60 < len(tokens) < 120  # a row and a part of one
    given = requests("loglikelihood_rolling", (text,), ("wolf",))
    found = make("none").loglikelihood_rolling(given, disable_tqdm=True)
    first = session.tokenizer.decode(tokens[:60])
    last = np.array([tokens[len(tokens) - 61 : -1]], np.int32)
    logits = session.model.logits(session.params, jnp.array(last), None, window=1)
    logprobs = np.asarray(jax.nn.log_softmax(logits[0], axis=-1), np.float64)
    rest = len(tokens) - 60
    expected = plain(session, "", first) + logprobs[np.arange(60 - rest, 60), tokens[60:]].sum()
    close(found, [expected, plain(session, "", "wolf")])

    model = make("memory", overlap=1.0)
    asked = spy_on(model, monkeypatch)
    with_memory = model.loglikelihood_rolling(given, disable_tqdm=True)
    assert with_memory[0] != pytest.approx(expected, rel=1e-5)
    assert with_memory[1] == pytest.approx(found[1], rel=1e-5)  # its one chunk reads nothing
    rows = [np.array([BOS, *tokens[:59]]), last[0]]
    queries = [
        session.tokenizer.decode(r[c : c + CHUNK]) for r in rows for c in range(0, 50, CHUNK)
    ]
    assert [query for query, _ in asked] == queries
    with pytest.raises(InferenceError, match="no question to search with"):
        make("rag", references=1, overlap=1.0).loglikelihood_rolling(given)


PROMPTS = [f"the pet of {WORLD.unseen[0].name} and the home", f"food of {WORLD.unseen[1].name}"]


@pytest.mark.parametrize("mode", ["none", "memory", "wrong"])
def test_texts_are_those_of_the_generator_up_to_a_stop_string(session, make, mode):
    model = make(mode, overlap=1.0)
    settings = {"until": [], "max_gen_toks": 12}
    given = requests("generate_until", *((prompt, settings) for prompt in PROMPTS))
    found = model.generate_until(given)
    memory_retriever = None
    if mode != "none":
        memory_retriever = MemoryRetriever(session.retriever, session.bank, session.tokenizer, 5)
    generator = Generator(
        session.model,
        session.params,
        session.tokenizer,
        memory_retriever,
        longest=session.config.data.sequence_length,
    )
    references = None
    if mode == "wrong":
        rows = [[BOS, *session.tokenizer.encode(prompt)] for prompt in PROMPTS]
        drawn = model._retrieve([np.array(row, np.int32) for row in rows], [("t", 0), ("t", 1)])
        references = [[ids[0]] * 8 for ids in drawn]
    expected = generator.generate(PROMPTS, 12, references=references)
    assert found == [one.text for one in expected]
    stop = found[0][3:5]
    given = requests("generate_until", *((p, {**settings, "until": [stop]}) for p in PROMPTS))
    cut = model.generate_until(given)
    assert cut == [text.partition(stop)[0] for text in found] and cut[0] != found[0]


def test_long_prompts_are_cut_and_sampling_is_refused(session, make):
    model = make("none")
    before = model.counts["truncated"]
    long = " ".join(person.text for person in WORLD.unseen[:6])
    fitting = model._fitting([long, "short"], 20)
    assert long.endswith(fitting[0]) and fitting[1] == "short"
    assert len(session.tokenizer.encode(fitting[0])) == 20
    assert model.counts["truncated"] == before + 1
    given = requests("generate_until", ("a", {"do_sample": True, "temperature": 0.7}))
    with pytest.raises(InferenceError, match="sampling"):
        model.generate_until(given)
    assert model._new_tokens({}) == 30  # half of the context


def test_modes_that_do_not_fit_are_refused(session, make):
    with pytest.raises(InferenceError, match="mode 'some'; known: none, memory"):
        make("some")
    with pytest.raises(InferenceError, match="compressed.*write_bank.py"):
        make("compressed")
    assert make("explicit").mode == "memory"
    from m3jax.evaluation.lm_eval.model import HarnessModel

    early = copy.copy(session)
    early.config = tiny_config()
    with pytest.raises(InferenceError, match="mode 'wrong' with a config of the stage 'warmup'"):
        HarnessModel(early, "wrong")


def test_compressed_memories_come_from_their_bank(session, make, tmp_path):
    config = tiny_config(stage="continual", writer__compression="int8")
    write_bank(
        config,
        make_model(config, PREFIX_TOKENS),
        jax.jit(make_model(config, PREFIX_TOKENS).init)(jax.random.key(0)),
        References(session.workdir / "references"),
        tmp_path / "bank",
        progress=False,
    )
    given = requests("loglikelihood", *ARGUMENTS)
    plainly = make("memory", overlap=1.0).loglikelihood(given, disable_tqdm=True)
    model = make("compressed", overlap=1.0, bank=str(tmp_path / "bank"))
    found = model.loglikelihood(given, disable_tqdm=True)
    assert [x for x, _ in found] != [x for x, _ in plainly]
    close([x for x, _ in found], [x for x, _ in plainly], 1e-3)


# Tasks, with answers that are known beforehand.


@pytest.fixture(scope="module")
def oracle(require):
    """A model that prefers what it was told, and says what it was asked."""
    require("lm_eval")
    from lm_eval.api.model import TemplateLM

    from m3jax.evaluation.lm_eval.model import HarnessModel

    class Oracle(HarnessModel):
        def __init__(self, likes=(), says=()):
            TemplateLM.__init__(self)
            self.likes, self.says, self.asked = likes, list(says), []

        def loglikelihood(self, requests, disable_tqdm=False):
            self.asked += [request.args for request in requests]
            scores = [any(like in c + t for like in self.likes) for c, t in self.asked]
            return [(float(score) - 2, score) for score in scores]

        def generate_until(self, requests, disable_tqdm=False):
            self.asked += [request.args for request in requests]
            return self.says

    return Oracle


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def scores(model, path, shots=0, limit=None):
    from m3jax.evaluation.lm_eval.run import measures_of, run_task

    task = read_task(path)
    samples = run_task(model, task, shots, limit)
    return [[sample[name] for sample in samples] for name in measures_of(task.kind)]


def test_choices(oracle, tmp_path):
    records = [
        {"query": "Question: sky?", "choices": ["red", "blue"], "gold": 1},
        {"query": "Question: sun?", "choices": ["red", "yellow"], "gold": 0},
        {"query": "Question: sea?", "choices": ["red", "blue"], "gold": 0},
    ]
    model = oracle(likes=("blue", "yellow"))
    found = scores(model, write(tmp_path / "t.jsonl", *records))
    assert found[0] == [1, 0, 0]
    assert model.asked[0] == ("Question: sky?\nAnswer:", " red")
    model = oracle(likes=("blue", "yellow"))
    assert scores(model, tmp_path / "t.jsonl", limit=2)[0] == [1, 0]
    model = oracle(likes=())
    assert scores(model, tmp_path / "t.jsonl", shots=2)[0] == [0, 1, 1]  # the first of equals
    for name, other, last in (("sky", "sun", 0), ("sun", "sky", 2), ("sea", "sky", 4)):
        context = model.asked[last][0]
        assert context.endswith(f"Question: {name}?\nAnswer:") and context.count(name) == 1
        assert f"Question: {other}?\nAnswer: " in context


def test_mmlu(oracle, tmp_path):
    (tmp_path / "law_test.csv").write_text("Who?,a,b,c,d,C\nWhich?,a,b,c,d,0\n")
    (tmp_path / "law_dev.csv").write_text("Where?,p,q,r,s,B\n")
    model = oracle(likes=("Answer: C",))
    assert scores(model, tmp_path / "law_test.csv", shots=1)[0] == [1, 0]
    shot = "Where?\nA. p\nB. q\nC. r\nD. s\nAnswer: B\n\n"
    assert model.asked[0] == (f"{shot}Who?\nA. a\nB. b\nC. c\nD. d\nAnswer:", " A")


def test_schemas(oracle, tmp_path):
    records = [
        {"context_options": ["Ida so Ida", "Ida so Bo"], "continuation": "won.", "gold": 1},
        {"context_options": ["Ida as Ida", "Ida as Bo"], "continuation": "lost.", "gold": 0},
    ]
    model = oracle(likes=("Bo won", "Bo lost"))
    path = write(tmp_path / "t.jsonl", *records)
    assert scores(model, path) == [[1, 0]]
    assert model.asked[:2] == [("Ida so Ida", " won."), ("Ida so Bo", " won.")]
    model = oracle(likes=("Bo won",))
    scores(model, path, shots=1)
    assert model.asked[1] == ("Ida as Ida lost.\n\nIda so Bo", " won.")


def test_continuations(oracle, tmp_path):
    records = [
        {"context": "The sky is", "continuation": "blue"},
        {"context": "The sun is", "continuation": "red"},
    ]
    model = oracle(likes=("is blue",))
    assert scores(model, write(tmp_path / "t.jsonl", *records)) == [[1, 0]]
    assert model.asked[0] == ("The sky is", " blue")
    model = oracle(likes=())
    scores(model, tmp_path / "t.jsonl", shots=1)
    assert model.asked[0] == ("The sun is red\n\nThe sky is", " blue")
    records = [{"prompt": "home of Ida", "answer": " Oslo"}]
    assert scores(oracle(likes=("Ida Oslo",)), write(tmp_path / "q.jsonl", *records)) == [[1]]


def test_open_questions(oracle, tmp_path):
    records = [
        {"question": "who", "answer": ["Ida Berg", "Ida"]},
        {"question": "where", "answer": "North Oslo"},
        {"question": "what", "answer": "Cat"},
    ]
    model = oracle(says=["The Ida Berg.", "Oslo", "dog"])
    exact, overlap = scores(model, write(tmp_path / "t.jsonl", *records))
    assert exact == [1, 0, 0] and overlap == pytest.approx([1, 2 / 3, 0])
    assert model.asked[0][0] == "Question: who\nAnswer:" and model.asked[0][1]["until"] == ["\n"]
    data = {"question": "who", "answers": [{"text": "Ida"}]}
    squad = {"data": [{"paragraphs": [{"context": "…", "qas": [data]}]}]}
    (tmp_path / "s.json").write_text(json.dumps(squad))
    assert scores(oracle(says=["ida"]), tmp_path / "s.json") == [[1], [1]]


def test_numbers(oracle, tmp_path):
    record = {"context": "1 + 1?", "chain_of_thought": "Two.", "answer": "1,002"}
    model = oracle(says=["So 7 and\n#### 1002 of 5", "1002 or 1003"])
    path = write(tmp_path / "t.jsonl", record, {**record, "context": "2 + 2?"})
    assert scores(model, path, shots=1) == [[1, 0]]
    assert model.asked[1][0] == (
        "Question: 1 + 1?\nAnswer: Two.\n#### 1,002\n\nQuestion: 2 + 2?\nAnswer:"
    )


def test_the_table_has_every_mode_filter_and_the_answerable_subset(session, tmp_path):
    from m3jax.evaluation.lm_eval.run import columns, evaluate_tasks, tasks_table

    person = WORLD.unseen[0]
    answer = dict(person.facts)["home"] if "home" in dict(person.facts) else person.facts[0][1]
    tasks = [
        read_task(
            write(
                tmp_path / "open.jsonl",
                {"question": f"home of {person.name}", "answer": [answer]},
                {"question": "who", "answer": ["Nobody Known"]},
            )
        ),
        read_task(
            write(
                tmp_path / "sky.jsonl",
                {"query": "sky of Mozi", "choices": ["red", "blue"], "gold": 0},
                {"query": "home of Mozi", "choices": ["red", "blue"], "gold": 1},
            )
        ),
    ]
    wanted = columns(["none", "memory", "rag"], [1.0, 0.8])
    report = evaluate_tasks(session, tasks, wanted, batch_size=4)
    titles = ["none", "memory, no filter", "memory, ≤ 0.8", "rag, no filter", "rag, ≤ 0.8"]
    assert report["columns"] == titles
    found = report["tasks"]["open"]
    assert found["answerable"] == 1 and found["examples"] == 2 and found["chance"] is None
    assert set(found["scores"]["none"]) == {
        *("exact_match", "f1", "exact_match_answerable", "f1_answerable")
    }
    assert set(report["dropped"]) == set(titles[1:])
    text = tasks_table(report).splitlines()
    assert text[0] == f"| task | measure | examples | chance | {' | '.join(titles)} |"
    assert [line.split(" | ")[1:4] for line in text[2:7]] == [
        ["exact match", "2", "–"],
        ["exact match of the answerable", "1", "–"],
        ["F1", "2", "–"],
        ["F1 of the answerable", "1", "–"],
        ["accuracy", "2", "0.500"],
    ]
    mean = np.mean(
        [found["scores"]["none"]["exact_match"], report["tasks"]["sky"]["scores"]["none"]["acc"]]
    )
    assert text[7].startswith(f"| **average** |  |  |  | {mean:.3f} |")
    assert [line.split("; ")[1] for line in text[-2:]] == [
        "no reference is dropped for overlap",
        "references found that overlap with the question, or it with them, above 0.8 were dropped",
    ]
    assert text[8].startswith("| references dropped | share |  |  | – | 0.0% |")
    assert text[9].startswith("| contexts cut | share |  |  | 0.0% |")
    other = copy.copy(session)
    other.params = jax.tree.map(lambda x: -x, session.params)
    by_stage = columns(["warmup", "none"], [0.8])
    assert [one.title for one in by_stage] == ["warmup", "none"]
    report = evaluate_tasks(session, tasks, by_stage, batch_size=4, warmup=other)
    alone = evaluate_tasks(other, tasks, columns(["none"], []), batch_size=4)
    for name, task in report["tasks"].items():
        assert task["scores"]["warmup"] == alone["tasks"][name]["scores"]["none"]
    with pytest.raises(InferenceError, match="--warmup_config"):
        evaluate_tasks(session, tasks, by_stage)
    with pytest.raises(InferenceError, match="1 examples for 2 shots"):
        evaluate_tasks(session, tasks, wanted, shots=2)
    with pytest.raises(InferenceError, match="mode 'some'"):
        columns(["some"], [])
    with pytest.raises(InferenceError, match="overlap limit 1.5"):
        columns(["rag"], [1.5])
