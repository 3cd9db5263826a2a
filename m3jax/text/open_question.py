"""Open questions with their answers, and the template in which they are asked and trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m3jax.reading import only_field

QUESTION = "Question: "
ANSWER = "\nAnswer:"


def answer_text(value: Any, what: str = "answer") -> str:
    """Returns an answer as text: a number as it is written, any other text unchanged.

    Raises `TypeError` for another type, `ValueError` for an empty or blank text; messages call the
    value `what`.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise TypeError(f"{what}: {type(value).__name__} in place of a text or a number")
    if not value.strip():
        raise ValueError(f"an empty {what}")
    return value


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
    return open_question(record[only_field(record, "question", "context")], answers)
