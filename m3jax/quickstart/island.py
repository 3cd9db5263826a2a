"""Reads the encyclopedia of Pellory, an invented island, with questions that only its text answers.

Files in `island/`: `articles.jsonl`, documents for `launch/prepare.py --knowledge`, each a
paragraph that names its subject and fits in 128 tokens; `questions.jsonl`, open questions for every
command of `launch/evaluate.py` that takes questions; `edits.jsonl`, articles with one fact changed,
for `launch/edit_bank.py replace`; `deletions.json`, ids for `launch/edit_bank.py delete`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3jax.reading import read_json, read_records
from m3jax.text.documents import Document, read_documents

FOLDER = Path(__file__).parent / "island"


@dataclass(frozen=True)
class IslandQuestion:
    """Question that only the article with the id `reference` answers.

    `answers` are all accepted answers; the first is quoted from the article. For the `kind` fact a
    model's weights have no answer; for contradiction they have another one.
    """

    question: str
    answers: tuple[str, ...]
    reference: str
    kind: str


@dataclass(frozen=True)
class Island:
    """Articles, edited articles, ids of articles to delete (none edited), and questions.

    `edited_questions` are those whose answer the edits change, with the new answer.
    """

    articles: tuple[Document, ...]
    questions: tuple[IslandQuestion, ...]
    edits: tuple[Document, ...]
    edited_questions: tuple[IslandQuestion, ...]
    deletions: tuple[str, ...]


def read_island() -> Island:
    """Reads all files of the encyclopedia; each edit changes the answer of one question."""
    edits, form = FOLDER / "edits.jsonl", "a line of the island"
    new = read_records(edits, lambda edit: _question(*edit["questions"]), "edits", form)
    return Island(
        articles=tuple(read_documents(str(FOLDER / "articles.jsonl"))),
        questions=tuple(read_records(FOLDER / "questions.jsonl", _question, "questions", form)),
        edits=tuple(read_documents(str(edits))),
        edited_questions=tuple(new),
        deletions=tuple(read_json(FOLDER / "deletions.json")),
    )


def _question(record: Any) -> IslandQuestion:
    answers = record["answer"], *record["aliases"]
    return IslandQuestion(record["question"], answers, record["reference"], record["kind"])
