"""Every form of a task file, and what is refused."""

import importlib
import json
import sys

import pytest

from m3jax.errors import InferenceError, TextError
from m3jax.evaluation.task_files import question_texts, read_task, task_files

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "Ida lives in Oslo.",
                    "qas": [
                        {"question": "Where is Ida?", "answers": [{"text": "Oslo"}]},
                        {"question": "Who is Bo?", "answers": []},
                    ],
                }
            ]
        }
    ]
}

FORMS = [
    (
        {"query": "Question: Which?\n", "choices": ["x", "y"], "gold": 1},
        "choice",
        {"text": "Question: Which?\nAnswer:", "choices": ["x", "y"], "gold": 1},
    ),
    (
        {"context_options": ["Ida ", "Bo"], "continuation": " won.", "gold": 0},
        "schema",
        {"contexts": ["Ida", "Bo"], "continuation": "won.", "gold": 0},
    ),
    (
        {"context": "The sky is ", "continuation": "blue"},
        "continuation",
        {"text": "The sky is", "continuation": " blue"},
    ),
    (
        {"prompt": "home of Ida", "answer": " Oslo", "references": ["a"]},
        "continuation",
        {"text": "home of Ida", "continuation": " Oslo"},
    ),
    (
        {"context": "Question: Who?\nAnswer:", "answer": "Ida", "aliases": ["I.", " "]},
        "open",
        {"question": "Who?", "text": "Question: Who?\nAnswer:", "answers": ["Ida", "I."]},
    ),
    (
        {"question": "who", "answer": ["Ida", "Bo"]},
        "open",
        {"question": "who", "text": "Question: who\nAnswer:", "answers": ["Ida", "Bo"]},
    ),
    (
        {"context": "1 + 1?", "chain_of_thought": "It is two.", "answer": "2"},
        "number",
        {"text": "Question: 1 + 1?\nAnswer:", "target": "It is two.\n#### 2", "answers": ["2"]},
    ),
]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(("record", "kind", "doc"), FORMS)
def test_a_form_is_seen_from_the_fields(tmp_path, record, kind, doc):
    task = read_task(write(tmp_path / "one.jsonl", record, record))
    assert (task.name, task.kind, task.shots) == ("one", kind, None)
    assert task.docs == [doc, doc]


def test_chance_is_that_of_guessing(tmp_path):
    three = {"query": "q", "choices": ["x", "y", "z"], "gold": 1}
    two = {"query": "q", "choices": ["x", "y"], "gold": 1}
    assert read_task(write(tmp_path / "a.jsonl", two, three)).chance == pytest.approx(5 / 12)
    pair = {"context_options": ["x", "y"], "continuation": "z", "gold": 1}
    assert read_task(write(tmp_path / "b.jsonl", pair)).chance == 0.5
    assert (
        read_task(write(tmp_path / "c.jsonl", {"context": "a", "continuation": "b"})).chance is None
    )


def test_mmlu_with_header_or_letters_takes_shots_from_the_file_beside_it(tmp_path):
    test = tmp_path / "law_test.csv"
    test.write_text('question,choice0,choice1,choice2,choice3,answer\n"Who, then?",a,b,c,d,2\n\n')
    (tmp_path / "law_dev.csv").write_text("Which?,p,q,r,s,B\n")
    task = read_task(test)
    assert task.name == "law" and task.chance == 0.25
    text = "Who, then?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    assert task.docs == [{"text": text, "choices": ["A", "B", "C", "D"], "gold": 2}]
    assert task.shots is not None and [doc["gold"] for doc in task.shots] == [1]
    assert task_files([tmp_path]) == [test]


def test_squad_gives_its_questions_without_passages(tmp_path):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(SQUAD))
    (doc,) = read_task(path).docs
    assert doc["answers"] == ["Oslo"] and "lives" not in doc["text"]


def test_a_folder_stands_for_its_files_and_names_are_different(tmp_path):
    one = write(tmp_path / "nq_dev.jsonl", {})
    (tmp_path / "notes.txt").write_text("no task")
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / ".hidden" / "other.jsonl", {})
    left_out = {}
    assert task_files([tmp_path], left_out) == [one]
    assert left_out.keys() == {"hidden folders", "files of other endings"}
    with pytest.raises(TextError, match="two task files have the name nq_dev"):
        task_files([tmp_path, one])
    with pytest.raises(TextError, match=r"there is no task file .*gone\.jsonl"):
        task_files([tmp_path / "gone.jsonl"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextError, match="holds no task files"):
        task_files([tmp_path / "empty"])


CHOICE = {"query": "q", "choices": ["x", "y"], "gold": 1}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "holds no examples"),
        ([{"colour": 1}], "fields colour is of no known form"),
        ([[1]], ":1: a JSON list; expected an object"),
        ([CHOICE, {"query": "q"}], r":2: not an example of the form of the file's first, choice"),
        ([{**CHOICE, "gold": 2}], r":1: .*gold = 2 of 2 choices"),
        ([{**CHOICE, "choices": ["x", " "]}], "an empty choice"),
        ([{"context": "a", "continuation": " "}], "an empty continuation"),
        ([{"prompt": "a", "answer": " "}], "an empty answer"),
        ([{"question": "a", "answer": []}], "an empty answer"),
        ([{"context_options": ["a", "b"], "continuation": "", "gold": 0}], "empty continuation"),
    ],
)
def test_other_records_are_refused_by_line(tmp_path, records, message):
    with pytest.raises(TextError, match=message):
        read_task(write(tmp_path / "t.jsonl", *records))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("{")
    with pytest.raises(TextError, match=r"t\.jsonl:1: not valid JSON"):
        read_task(path)
    path = tmp_path / "t.csv"
    path.write_text("q,a,b,c,d\n\n")
    with pytest.raises(TextError, match=r"t.csv:1: .*found 5 columns"):
        read_task(path)
    path.write_text("q,a,b,c,d,E\n")
    with pytest.raises(TextError, match="found 6 columns, answer 'E'"):
        read_task(path)
    path.write_text("")
    with pytest.raises(TextError, match="holds no examples"):
        read_task(path)
    path = tmp_path / "t.json"
    for content, words in {
        "[": "1: not valid JSON",
        "[]": "holds no examples",
        '{"data": [{"paragraphs": 3}]}': "expected the format of SQuAD",
    }.items():
        path.write_text(content)
        with pytest.raises(TextError, match=words):
            read_task(path)
    path.write_text('{"data": []}')
    with pytest.raises(TextError, match="holds no examples"):
        read_task(path)


def test_without_the_harness_the_adapter_says_what_to_install(monkeypatch):
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "m3jax.evaluation.lm_eval.model", raising=False)
    with pytest.raises(InferenceError, match=r"pip install 'm3jax\[eval\]'"):
        importlib.import_module("m3jax.evaluation.lm_eval.model")


def test_what_the_examples_ask(tmp_path):
    """Every form, without answers, choices and the words around a question."""
    squad = {"question": "Who won?", "answers": [{"text": "Denver"}]}
    nested = {"data": [{"paragraphs": [{"context": "They won.", "qas": [squad]}]}]}
    files = {
        "a.jsonl": {"query": "Question: Why red?", "choices": ["it is", "it was"], "gold": 1},
        "b.jsonl": {"context_options": ["Ann ate as", "Bo ate as"], "continuation": "it was cold",
                    "gold": 1},
        "c.jsonl": {"context": "The language of X is", "continuation": "English"},
        "d.jsonl": {"context": "How many eggs?", "chain_of_thought": "2", "answer": "2"},
        "e.jsonl": {"context": "Question: What bird?\nAnswer:", "answer": "Owl", "aliases": []},
        "f.jsonl": {"question": "when did it end", "answer": ["1972"]},
        "g.jsonl": {"prompt": "pet of Tavo", "answer": " otter"},
    }  # fmt: skip
    for name, record in files.items():
        (tmp_path / name).write_text(json.dumps(record) + "\n" + json.dumps(record) + "\n")
    (tmp_path / "h_test.csv").write_text('"Which, then?",one,two,three,four,C\n')
    (tmp_path / "i.json").write_text(json.dumps(nested))
    assert question_texts([tmp_path]) == [
        "Why red?",
        "Bo ate as it was cold",
        "The language of X is",
        "How many eggs?",
        "What bird?",
        "when did it end",
        "pet of Tavo",
        "Which, then?",
        "Who won?",
    ]
    (tmp_path / "g.jsonl").write_text("")
    with pytest.raises(TextError, match="g.jsonl holds no examples"):
        question_texts([tmp_path / "g.jsonl"])
    (tmp_path / "g.jsonl").write_text('{"claim": "x"}\n')
    with pytest.raises(TextError, match="g.jsonl:1: an example with the fields claim is of no"):
        question_texts([tmp_path])
    with pytest.raises(TextError, match="there is no task file"):
        question_texts([tmp_path / "nowhere.jsonl"])


@pytest.mark.parametrize("name", ["missing.csv", "missing.json", "missing.jsonl", "latin.csv"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / "latin.csv").write_bytes("Où?,a,b,c,d,A\n".encode("latin-1"))
    with pytest.raises(TextError, match=name):
        read_task(tmp_path / name)


def test_an_alias_may_be_a_text(tmp_path):
    (tmp_path / "q.jsonl").write_text(
        '{"question": "Who?", "answer": "Ann Lee", "aliases": "A. Lee"}\n'
    )
    assert read_task(tmp_path / "q.jsonl").docs[0]["answers"] == ["Ann Lee", "A. Lee"]
