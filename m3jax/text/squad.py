"""Reads files in the format of SQuAD: passages, and questions with answers in them."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, NamedTuple

from m3jax.errors import TextError
from m3jax.reading import ending, read_json, reason_of


class PassageQuestion(NamedTuple):
    """Question about a passage.

    Attributes:
      text: the question.
      answers: accepted answers; none if the passage does not answer it.
      start: character of the passage where the first answer begins; −1 if the file does not say.
    """

    text: str
    answers: tuple[str, ...]
    start: int


class Passage(NamedTuple):
    """Passage with its questions; `id` is `<title of its article>:<number of the passage in it>`.

    A file of other questions about the same passages gives them the same ids.
    """

    id: str
    title: str
    text: str
    questions: tuple[PassageQuestion, ...]


def read_squad(path: str | os.PathLike[str]) -> list[Passage] | None:
    """Reads the passages of a file; articles of one title count as one article.

    Returns None for a file of another form: of another ending than .json, or without `data`. Raises
    `TextError` if the file cannot be read or its `data` have another format.
    """
    if ending(path) != ".json":
        return None
    content = read_json(path)
    if not isinstance(content, dict) or "data" not in content:
        return None
    passages: list[Passage] = []
    numbers = Counter[str]()
    place = "data"
    try:
        for number, article in enumerate(content["data"]):
            place, title = f"article {number}", article.get("title", "")
            for paragraph in article["paragraphs"]:
                name = f"{title}:{numbers[title]}"
                place = f"passage {name!r}"
                numbers[title] += 1
                questions = tuple(_question(question) for question in paragraph["qas"])
                passages.append(Passage(name, title, paragraph.get("context", ""), questions))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise TextError(
            f"{path}: {place}: expected the format of SQuAD, data → paragraphs → qas with question"
            f" and answers ({reason_of(error, {})})"
        ) from error
    return passages


def _question(question: dict[str, Any]) -> PassageQuestion:
    answers = question["answers"]
    texts = tuple(answer["text"] for answer in answers)
    start = int(answers[0].get("answer_start", -1)) if answers else -1
    return PassageQuestion(question["question"], texts, start)
