"""Measures answer recall@k: shares of questions whose retrieved references hold an answer."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.evaluation.squad_metrics import normalise
from m3jax.knowledge.versions import open_references, open_retriever, open_version
from m3jax.text.jsonl import read_records
from m3jax.text.references import ReferenceReader
from m3jax.text.tokenizer import Tokenizer

_BLOCK = 4096  # references read at a time
_QUERIES = 256
_SEPARATORS = {ord(character): " " for character in string.punctuation + "’‘“”–—"}
_TEMPLATE = re.compile(r"^\s*Question:\s*(.*?)\s*(?:\n\s*Answer:\s*)?$", re.DOTALL)


@dataclass(frozen=True)
class OpenQuestion:
    """Question with the strings that answer it."""

    question: str
    answers: tuple[str, ...]


def read_open_questions(path: str | Path) -> list[OpenQuestion]:
    """Questions from JSON lines.

    `question` (or `context`, or `prompt`, where `Question: … Answer:` is left out); `answer`, a
    string or a list, and `aliases`, a list, if there are any.

    Raises:
      TextError: a line is something else, or there is none.
    """

    def parse(record: Any) -> OpenQuestion:
        name = next(field for field in ("question", "context", "prompt") if field in record)
        answers = record["answer"]
        answers = [answers] if isinstance(answers, str) else list(answers)
        answers += record.get("aliases", [])
        return OpenQuestion(_TEMPLATE.sub(r"\1", record[name]), tuple(answers))

    return read_records(path, parse, "questions", "a JSON object with question and answer")


def words(text: str) -> list[str]:
    """Splits a text into words in SQuAD's normal form; punctuation separates words."""
    return normalise(text.translate(_SEPARATORS)).split()


class AnswerFinder:
    """Finds answers in texts, as runs of whole words."""

    def __init__(self, answers: Sequence[str]) -> None:
        """Indexes answers by their first word; answers without a word never occur."""
        self._by_first: dict[str, list[tuple[str, ...]]] = {}
        for run in {tuple(words(answer)) for answer in answers}:
            if run:
                self._by_first.setdefault(run[0], []).append(run)

    def find(self, text: str) -> set[tuple[str, ...]]:
        """Returns the answers in a text, as words."""
        text_words = words(text)
        runs: set[tuple[str, ...]] = set()
        for place, word in enumerate(text_words):
            for run in self._by_first.get(word, ()):
                if run not in runs and tuple(text_words[place : place + len(run)]) == run:
                    runs.add(run)
        return runs


def hit_rates(
    config: ConfigDict,
    workdir: str | Path,
    questions: str | Path,
    *,
    at: Sequence[int] = (1, 5),
    version: int | None = None,
) -> dict[str, Any]:
    """Measures the shares of questions with an answer in one of the first k references.

    Args:
      config: a validated config.
      workdir: prepared folder.
      questions: see `read_open_questions`.
      at: how many references count, ascending.
      version: of the knowledge; default the current one.

    Returns:
      `questions`, `references`, `embedder`; `answerable`: questions with an answer in a reference,
      the most that retrieval could find; `hits@k` for every k, of these, and `hits@k_of_all`.
    """
    opened = open_version(workdir, version)
    tokenizer = Tokenizer.load(Path(workdir) / "tokenizer")
    references = open_references(config, opened, tokenizer)
    candidates = max(*at, config.retrieval.candidates if config.retrieval.rerank else 1)
    retriever = open_retriever(config, opened, references, 1.0, candidates)
    embedder = retriever.index.embedder
    open_questions = read_open_questions(questions)
    answerable = answerable_questions(references, [question.answers for question in open_questions])
    rank = np.full(len(open_questions), np.inf)
    for start in tqdm(range(0, len(open_questions), _QUERIES), desc="questions", unit="block"):
        part = open_questions[start : start + _QUERIES]
        ids = retriever.retrieve([question.question for question in part], None, max(at))
        for row, question in enumerate(part):
            finder, ids_read = AnswerFinder(question.answers), ids[row][ids[row] >= 0]
            hits = [bool(finder.find(text)) for text in references.texts(ids_read)]
            if any(hits):
                rank[start + row] = hits.index(True)
    ranked = f", best of {candidates} by its bank" if config.retrieval.rerank else ""
    report: dict[str, Any] = {
        "questions": len(open_questions),
        "references": len(references),
        "embedder": f"{embedder.name}, {embedder.dimension}{ranked}",
        "answerable": int(answerable.sum()),
    }
    for k in at:
        inside = rank < k
        report[f"hits@{k}"] = float(inside[answerable].mean()) if answerable.any() else 0.0
        report[f"hits@{k}_of_all"] = float(inside.mean())
    return report


def answerable_questions(
    references: ReferenceReader, answers: Sequence[Sequence[str]]
) -> Bool[np.ndarray, " n"]:
    """Tells for each question if an answer occurs in any reference in use.

    Args:
      references: the knowledge base; all of it is read.
      answers: of each of n questions.
    """
    present = _present(references, AnswerFinder([answer for every in answers for answer in every]))
    return np.array([any(tuple(words(answer)) in present for answer in every) for every in answers])


def _present(references: ReferenceReader, finder: AnswerFinder) -> set[tuple[str, ...]]:
    """Returns the answers that occur in any reference in use."""
    present: set[tuple[str, ...]] = set()
    ids = references.live
    with tqdm(total=len(ids), desc="answers in references", unit="ref") as bar:
        for start in range(0, len(ids), _BLOCK):
            part = ids[start : start + _BLOCK]
            for text in references.texts(part):
                present |= finder.find(text)
            bar.update(len(part))
    return present


def hit_rates_table(report: dict[str, Any]) -> str:
    """Returns the report as a Markdown table."""
    ranks = [name for name in report if name.startswith("hits@") and not name.endswith("_of_all")]
    head = ["embedder", "references", "questions", "answerable", *ranks]
    cells = [report["embedder"], *(str(report[name]) for name in head[1:4])]
    cells += [f"{report[name]:.3f}" for name in ranks]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), cells))
