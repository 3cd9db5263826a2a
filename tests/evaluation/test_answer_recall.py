"""Hit rates on references whose answers are known."""

import dataclasses
import json
from pathlib import Path

import pytest
from data.data_workdir import WORLD, make_workdir, tiny_config

from m3jax.errors import TextError
from m3jax.evaluation.answer_recall import (
    AnswerFinder,
    hit_rates,
    hit_rates_table,
    words,
)
from m3jax.evaluation.questions import read_questions
from m3jax.evaluation.task_files import read_task

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workdir(tmp_path_factory.mktemp("hits"), CONFIG)


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_answers_are_runs_of_whole_words() -> None:
    finder = AnswerFinder(["The Dalaï Lama", "art", "New York"])
    assert finder.find("He met a dalaï-lama in new Yorkshire.") == {("dalaï", "lama")}
    assert finder.find("New new york, the art of it") == {("new", "york"), ("art",)}
    assert finder.find("party") == set() == AnswerFinder(["the", "?"]).find("the ? the")
    assert words("L’été, a 3rd!") == ["l", "été", "3rd"]


def test_hits_are_counted_among_answerable_questions(workdir: Path, tmp_path: Path) -> None:
    person = WORLD.people[0]
    name, line = person.name, person.text.splitlines()[0]
    relation, value = line.split()[0], line.split()[-1]
    asked = [
        {"question": f"{relation} of {name}", "answer": [value, "nothing"]},  # found first
        {"context": f"Question: {relation} of {name}\nAnswer:", "answer": "x", "aliases": [value]},
        {"question": name, "answer": "not in any reference"},
        {"question": "word that nobody knows", "answer": value},  # answerable, never found
    ]
    report = hit_rates(CONFIG, workdir, write(tmp_path / "asked.jsonl", asked), at=(1, 3))
    assert (report["questions"], report["answerable"]) == (4, 3)
    assert report["hits@1"] == report["hits@3"] == pytest.approx(2 / 3)
    assert report["hits@3_of_all"] == 0.5
    assert "| 0.667 |" in hit_rates_table(report) and "lexical" in hit_rates_table(report)


def test_forms_of_one_file_are_read_record_by_record(workdir: Path, tmp_path: Path) -> None:
    person = WORLD.people[0]
    relation, *_, value = person.text.splitlines()[0].split()
    text = f"{relation} of {person.name}"
    asked = [
        {"prompt": text, "answer": ["x", value]},
        {"prompt": f"Question: {text}\nAnswer: ", "answer": "x", "aliases": [value]},
        {"context": text, "chain_of_thought": "so", "answer": 7, "aliases": [value]},
        {"context": text, "continuation": f" {value}"},
        {"question": text, "answer": value},
    ]
    path = write(tmp_path / "asked.jsonl", asked)
    read = read_questions(path)
    assert [question.query for question in read] == [text] * 5
    told = [("x", value), ("x", value), ("7", value), (value,), (value,)]
    assert [question.right for question in read] == told
    report = hit_rates(CONFIG, workdir, path, at=(1,))
    assert (report["questions"], report["answerable"], report["hits@1"]) == (5, 5, 1.0)
    squad = {"question": text, "answers": [{"text": value}]}
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": [{"qas": [squad]}]}]}))
    (asked_of_squad,) = read_questions(tmp_path / "squad.json")
    assert dataclasses.replace(asked_of_squad, passage=None) == read[4]


def test_a_line_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    question = "who sang \x85 and \u2028 ?"
    record = json.dumps({"question": question, "answer": "x"}, ensure_ascii=False)
    (tmp_path / "asked").write_text(f"{record}\n{record}\n", encoding="utf-8")
    assert [doc["question"] for doc in read_task(tmp_path / "asked").docs] == [question] * 2


def test_unusable_questions_are_refused(workdir: Path, tmp_path: Path) -> None:
    good, no_question, no_answer = {"prompt": "a", "answer": "b"}, {"answer": "a"}, {"prompt": "a"}
    choice = {"query": "who", "choices": ["a", "b"], "gold": 0}
    counted = {"question": "who", "choices": ["a", "b"], "answer": 1}
    cases: list[tuple[list, str]] = [([], "holds no questions"), ([{**good, "answer": []}], ":1: ")]
    both = {"question": "who", "prompt": "a", "answer": "b"}
    for wrong in (
        both,
        no_question,
        no_answer,
        choice,
        counted,
        ["question"],
        7,
        {**good, "answer": None},
    ):
        cases.append(([good, wrong], ":2: .*expected an object with `question`"))
    for records, message in cases:
        with pytest.raises(TextError, match=f"asked.*{message}"):
            hit_rates(CONFIG, workdir, write(tmp_path / "asked", records))
