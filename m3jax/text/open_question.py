"""Open questions with their answers, and the template in which they are asked and trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m3jax.text.jsonl import answer_text

QUESTION = "Question: "
ANSWER = "\nAnswer:"


def open_question(question: str, answers: Sequence[Any]) -> dict[str, Any]:
    """Makes an open question; replaces a template `Question: … Answer:` around it.

    Blank answers are left out, unless all are.
    """
    question = question.strip().removesuffix("Answer:").strip()
    question = question.removeprefix(QUESTION.strip()).strip()
    right = [answer_text(answer).strip() for answer in answers if str(answer).strip()]
    if not right or not question:
        raise ValueError("an empty question, or no answer")
    return {"question": question, "text": QUESTION + question + ANSWER, "answers": right}


def open_record(record: dict[str, Any]) -> dict[str, Any]:
    """Makes an open question of `question` (or `context`), `answer` and `aliases`, if any.

    Raises KeyError, TypeError, AttributeError or ValueError for another form.
    """
    answer = record["answer"]
    aliases = record.get("aliases", [])
    told = answer if isinstance(answer, list) else [answer]
    if not any(str(text).strip() for text in told):
        raise ValueError("an empty answer")
    answers = told + (aliases if isinstance(aliases, list) else [aliases])
    return open_question(record["question"] if "question" in record else record["context"], answers)
