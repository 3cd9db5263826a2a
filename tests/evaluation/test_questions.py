"""Questions: every reader of files with answers, and the references that answer."""

import json

import pytest

from m3jax.errors import TextError
from m3jax.evaluation.needle import read_needles
from m3jax.evaluation.questions import Question, answering, read_questions, solved
from m3jax.evaluation.task_files import read_task
from m3jax.text.documents import read_documents
from m3jax.text.references import References, write_references
from m3jax.text.squad import read_squad
from m3jax.text.tokenizer import Tokenizer

PROMPTED = {"prompt": "pet of Ida", "answer": " otter"}
# Every form of a record with an answer: reader, the record, the field of the answer.
READERS = [
    (read_questions, PROMPTED, "answer"),
    (read_questions, {"question": "Who?", "answer": "Ida"}, "answer"),
    (read_questions, {"context": "The pet is", "continuation": "otter"}, "continuation"),
    (read_needles, {"needle": "Ida has an otter.", **PROMPTED}, "answer"),
    (read_task, PROMPTED, "answer"),
    (read_task, {"question": "Who?", "answer": "Ida"}, "answer"),
    (read_task, {"context": "Who?", "answer": "Ida", "aliases": ["I."]}, "answer"),
    (read_task, {"context": "The pet is", "continuation": "otter"}, "continuation"),
    (read_task, {"context": "1 + 1?", "chain_of_thought": "Two.", "answer": "2"}, "answer"),
    (
        read_task,
        {"context_options": ["Ida ", "Bo"], "continuation": "won", "gold": 0},
        "continuation",
    ),
]


@pytest.fixture
def lines(tmp_path):
    def write(*records, end="\n"):
        path = tmp_path / "asked.jsonl"
        path.write_text("\n".join(map(json.dumps, records)) + end)
        return path

    return write


@pytest.mark.parametrize(("read", "record", "field"), READERS)
def test_every_reader_of_answers_takes_numbers_and_refuses_empty_ones(lines, read, record, field):
    def items(*records, **more):
        found = read(lines(*records, **more))
        return found.docs if read is read_task else found

    text, number = {**record, field: "1914"}, {**record, field: 1914}
    assert items(record, number, end="\n\n \n") == items(record, text)
    for empty in ("", " ", "\n", None, [], [""], True, {}):
        with pytest.raises(TextError, match=r"asked\.jsonl:2: "):
            read(lines(record, {**record, field: empty}))


def test_choices_are_separated_by_one_space(lines):
    record = {"query": "Which? ", "choices": [" x", "y ", 7], "gold": 1}
    (doc,) = read_task(lines(record)).docs
    assert doc["choices"] == ["x", "y", "7"] and doc["text"] == "Which?\nAnswer:"
    (doc,) = read_task(lines({"question": " Who? ", "answer": [" Ida "]})).docs
    assert doc["answers"] == ["Ida"] and doc["text"] == "Question: Who?\nAnswer:"


def test_a_prompt_is_kept_and_a_question_gets_a_template(lines):
    records = [
        {"prompt": "Q: 1\nA:", "answer": [" b", "c"], "aliases": ["d"], "references": ["x#0"]},
        {"question": "Who?", "answer": "Ida"},
        {"context": "The pet is ", "continuation": "otter"},
    ]
    assert read_questions(lines(*records)) == [
        Question("Q: 1\nA:", " b", ("x#0",), ("b", "c", "d"), "Q: 1\nA:"),
        Question("Question: Who?\nAnswer:", " Ida\n", (), ("Ida",), "Who?"),
        Question("The pet is", " otter", (), ("otter",), "The pet is"),
    ]
    (island,) = read_questions(lines({"question": "Who?", "answer": "Ida", "reference": "cape"}))
    assert island.references == ("cape",)
    with pytest.raises(TextError, match="asked.jsonl:1: .*references"):
        read_questions(lines({**PROMPTED, "references": "x#0"}))
    with pytest.raises(TextError, match="asked.jsonl:1: .*multiple choice"):
        read_questions(lines({"question": "Who?", "choices": ["a", "b"], "answer": 1}))


def test_solved_examples_read_as_the_question_that_follows(lines):
    shots = [
        {"question": "What is the capital of France?", "answer": "Paris"},
        {"question": "In what year did it begin?", "answer": 1914},
    ]
    text = solved(read_questions(lines(*shots)))
    assert text == (
        "Question: What is the capital of France?\nAnswer: Paris\n\n"
        "Question: In what year did it begin?\nAnswer: 1914\n\n"
    )


CONTEXT = "Ida lives in Oslo with an otter . Bo lives in Rome since 1914 and has no pet at all ."
ASKED = [("Where is Ida?", "Oslo"), ("Where is Bo?", "Rome"), ("Since when?", "1914")]


@pytest.fixture
def squad(tmp_path):
    def asked(question, answer):
        answers = [{"text": answer, "answer_start": CONTEXT.index(answer)}, {"text": "x"}]
        return {"question": question, "answers": answers}

    unanswered = {"question": "Who is Al?", "answers": []}
    paragraphs = [
        {"context": "Al is here .", "qas": [unanswered]},
        {"context": CONTEXT, "qas": [asked(*one) for one in ASKED]},
    ]
    path = tmp_path / "squad.json"
    article = {"title": "People", "paragraphs": paragraphs[1:]}
    data = [{"title": "People", "paragraphs": paragraphs[:1]}, article]
    path.write_text(json.dumps({"data": data}))
    return path


def test_passages_become_documents_and_their_questions_find_the_piece(squad, tmp_path):
    tokenizer = Tokenizer.train([CONTEXT] * 3, 400, 2)
    passages = read_squad(squad)
    assert [passage.id for passage in passages] == ["People:0", "People:1"]
    documents = list(read_documents(str(squad)))
    assert [(d.id, d.text, d.title, d.source) for d in documents] == [
        (p.id, p.text, "People", "squad.json") for p in passages
    ]
    write_references(documents, tokenizer, tmp_path / "references", 8)
    references = References(tmp_path / "references")
    assert len(references.of_document("People:1")) > 1
    questions = read_questions(squad)
    assert [q.query for q in questions] == [question for question, _ in ASKED]
    assert [q.right for q in questions] == [(answer, "x") for _, answer in ASKED]
    for question, (_, answer) in zip(questions, ASKED, strict=True):
        (found,) = answering(question, references)
        assert answer in references[found].text
    # Without the place of the answer, all pieces; of other references, none.
    squad.write_text(squad.read_text().replace("answer_start", "start"))
    assert answering(read_questions(squad)[0], references) == references.of_document("People:1")
    squad.write_text(squad.read_text().replace("Ida lives", "Eva lives"))
    with pytest.raises(TextError, match="'People:1' is not in .*another text"):
        answering(read_questions(squad)[0], references)
    squad.write_text(squad.read_text().replace("People", "Persons"))
    with pytest.raises(TextError, match="'Persons:1' is not in .*nothing.*--knowledge"):
        answering(read_questions(squad)[0], references)
    named = Question("a", "b", ("People:0", "People:1#0"))
    assert answering(named, references) == [
        *references.of_document("People:0"),
        references.of_document("People:1")[0],
    ]
    with pytest.raises(TextError, match="no reference has the key 'People:7'"):
        answering(Question("a", "b", ("People:7",)), references)
    assert answering(Question("a", "b", ("People:1#1",)), references) == [
        references.of_document("People:1")[1]
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("Where is Ida?", " "), "an empty question"),
        (('"Oslo"', '""'), None),  # the alias is left
        (('"Oslo"', "7"), None),
        (('"data"', '"dat"'), "item 1: expected an object .* it has: dat"),
        (('"qas"', '"qa"'), "expected the format of SQuAD"),
    ],
)
def test_other_files_of_this_format_are_refused(squad, change, message):
    squad.write_text(squad.read_text().replace(*change))
    if message is None:
        assert len(read_questions(squad)) == 3
        return
    with pytest.raises(TextError, match=rf"squad\.json.*{message}"):
        read_questions(squad)
