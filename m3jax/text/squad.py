"""Reads files in the format of SQuAD: passages, and questions with answers in them."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from m3jax.errors import TextError
from m3jax.text.jsonl import decode


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


def read_squad(path: str | os.PathLike[str]) -> list[Passage]:
    """Reads the passages of a file; articles of one title count as one article.

    Raises `TextError` if the file cannot be read or has another format.
    """
    passages: list[Passage] = []
    numbers = Counter[str]()
    try:
        for article in json.loads(decode(Path(path).read_bytes()))["data"]:
            title = article.get("title", "")
            for paragraph in article["paragraphs"]:
                name = f"{title}:{numbers[title]}"
                numbers[title] += 1
                questions = tuple(_question(question) for question in paragraph["qas"])
                passages.append(Passage(name, title, paragraph.get("context", ""), questions))
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise TextError(
            f"{path}: expected the format of SQuAD, data → paragraphs → qas with question and"
            f" answers ({error!r})"
        ) from error
    return passages


def _question(question: dict[str, Any]) -> PassageQuestion:
    answers = question["answers"]
    texts = tuple(answer["text"] for answer in answers)
    start = int(answers[0].get("answer_start", -1)) if answers else -1
    return PassageQuestion(question["question"], texts, start)
