"""Questions with answers: reading their files, solved examples, the references that answer them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3jax.errors import TextError
from m3jax.reading import only_field, read_records
from m3jax.text.open_question import answer_text, open_question, open_record
from m3jax.text.references import References
from m3jax.text.squad import Passage, read_squad


@dataclass(frozen=True)
class Question:
    r"""Question whose `answer` is the text that should follow `prompt`.

    Attributes:
      prompt: text up to the answer; of an open question `Question: …\nAnswer:`.
      answer: the first right answer as text to score, with the space or line end around it.
      references: keys of the references that answer it, or ids of their documents.
      answers: all right answers, for exact match and F1; empty = `answer` alone.
      text: the question alone, without template, which searches references; "" = `prompt`.
      passage: the passage that answers it, and the character where its answer begins, −1 =
        unknown; None if a file names none.
    """

    prompt: str
    answer: str
    references: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    text: str = ""
    passage: tuple[Passage, int] | None = None

    @property
    def right(self) -> tuple[str, ...]:
        """Accepted answers."""
        return self.answers or (self.answer.strip(),)

    @property
    def query(self) -> str:
        """Text that searches references."""
        return self.text or self.prompt


def read_questions(path: str | Path) -> list[Question]:
    """Reads questions from rows (`reading.rows`), whose forms may be mixed, or SQuAD's .json.

    * `prompt`, `answer`: the answer is scored as it is written, right behind the prompt;
    * `context`, `continuation`: the continuation follows a space;
    * `question` (or `context`), `answer`: an open question, asked with a template.

    An answer is a text, a number, or a list of accepted ones, the first of which is scored;
    `aliases` are accepted, too. `references` are the keys of the references that answer it, or ids
    of their documents; `reference` is a single one.
    Questions of SQuAD without an answer are left out.

    Raises:
      TextError: the file cannot be read or is empty, or a record is of another form, or without a
        question or an answer.
    """
    passages = read_squad(path)
    if passages is not None:
        return _of_squad(path, passages)

    def parse(record: dict[str, Any]) -> Question:
        if "choices" in record:
            raise ValueError("a question of multiple choice")
        name = only_field(record, "question", "context", "prompt")
        answer = record[only_field(record, "answer", "continuation")]
        aliases = {"aliases": record.get("aliases", [])}
        doc = open_record({"question": record[name], "answer": answer, **aliases})
        first, keys = doc["answers"][0], []
        if {"reference", "references"} & record.keys():
            keys = record[only_field(record, "references", "reference")]
            keys = [keys] if "reference" in record else keys
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise TypeError("references is no list of keys")
        prompt, scored = doc["text"], f" {first}\n"
        if name == "prompt":
            answers = answer if isinstance(answer, list) else [answer]
            prompt, scored = record[name], answer_text(next(t for t in answers if str(t).strip()))
        elif "continuation" in record:
            prompt, scored = record[name].rstrip(), f" {first}"
        return Question(prompt, scored, tuple(keys), tuple(doc["answers"]), doc["question"])

    form = "an object with `question` (or `context`, `prompt`) and `answer`"
    return read_records(path, parse, "questions", form)


def _of_squad(path: str | Path, passages: Sequence[Passage]) -> list[Question]:
    questions = []
    for passage in passages:
        for item in passage.questions:
            if not item.answers:
                continue
            try:
                doc = open_question(item.text, item.answers)
            except (TypeError, AttributeError, ValueError) as error:
                raise TextError(f"{path}, passage {passage.id!r}: {error} ({item})") from error
            answers = tuple(doc["answers"])
            scored, place = f" {answers[0]}\n", (passage, item.start)
            question = Question(doc["text"], scored, (), answers, doc["question"], place)
            questions.append(question)
    if not questions:
        raise TextError(f"{path} holds no question with an answer")
    return questions


def solved(examples: Sequence[Question]) -> str:
    """Returns solved examples as text in front of a question, with an empty line after each."""
    return "".join(f"{(q.prompt + q.answer).rstrip()}\n\n" for q in examples)


def answering(question: Question, references: References) -> list[int]:
    """Returns the ids of the references that answer a question, as its file names them.

    Of a passage that was cut into several references, it is the one in which the answer begins, or
    all of them if the file does not say where it begins. None if the file names nothing.

    Raises:
      TextError: a named reference or passage is not in the knowledge base.
    """
    if question.passage is None:
        of_each = (references.ids_of(k) or [references.find(k)] for k in question.references)
        return list(itertools.chain.from_iterable(of_each))
    passage, start = question.passage
    ids = references.of_document(passage.id)
    pieces = references.read(ids)
    if not ids or any(passage.text[p.start : p.end] != p.text for p in pieces):
        state = "another text under its name" if ids else "nothing under its name"
        raise TextError(
            f"passage {passage.id!r} is not in the knowledge base {references.folder}, which has"
            f" {state}; prepare with the file of questions as --knowledge"
        )
    if start < 0:
        return ids
    chosen = [i for i, piece in zip(ids, pieces, strict=True) if piece.start <= start < piece.end]
    if not chosen:
        raise TextError(
            f"character {start} of passage {passage.id!r}, where an answer begins, is in none of"
            " its references"
        )
    return chosen
