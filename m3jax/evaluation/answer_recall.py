"""How often retrieval finds a reference that holds the answer to a question."""

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
    """A question and the strings that answer it."""

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
    """Which answers occur in a text, as a run of whole words."""

    def __init__(self, answers: Sequence[str]) -> None:
        """Makes one for these answers; those without a word are never found."""
        self._by_first: dict[str, list[tuple[str, ...]]] = {}
        for run in {tuple(words(answer)) for answer in answers}:
            if run:
                self._by_first.setdefault(run[0], []).append(run)

    def found(self, text: str) -> set[tuple[str, ...]]:
        """The answers in a text, as words."""
        here = words(text)
        runs: set[tuple[str, ...]] = set()
        for place, word in enumerate(here):
            for run in self._by_first.get(word, ()):
                if run not in runs and tuple(here[place : place + len(run)]) == run:
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
    """Shares of questions for which one of the first references found holds an answer.

    Args:
      config: a validated config.
      workdir: prepared folder.
      questions: see `read_open_questions`.
      at: how many references count, ascending.
      version: of the knowledge; default the current one.

    Returns:
      `questions`, `references`, `embedder`; `answerable`: questions with an answer in a reference,
      which is what retrieval could find; `hits@k` for every k, of those, and `hits@k_of_all`.
    """
    opened = open_version(workdir, version)
    tokenizer = Tokenizer.load(Path(workdir) / "tokenizer")
    references = open_references(config, opened, tokenizer)
    candidates = max(*at, config.retrieval.candidates if config.retrieval.rerank else 1)
    retriever = open_retriever(config, opened, references, 1.0, candidates)
    embedder = retriever.index.embedder
    asked = read_open_questions(questions)
    answerable = answerable_questions(references, [one.answers for one in asked])
    rank = np.full(len(asked), np.inf)
    for start in tqdm(range(0, len(asked), _QUERIES), desc="questions", unit="block"):
        part = asked[start : start + _QUERIES]
        ids = retriever.retrieve([one.question for one in part], None, max(at))
        for row, one in enumerate(part):
            finder, found = AnswerFinder(one.answers), ids[row][ids[row] >= 0]
            hits = [bool(finder.found(text)) for text in references.texts(found)]
            if any(hits):
                rank[start + row] = hits.index(True)
    ranked = f", best of {candidates} by its bank" if config.retrieval.rerank else ""
    report: dict[str, Any] = {
        "questions": len(asked),
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
    """Whether one of a question's answers occurs in any reference in use.

    Args:
      references: the knowledge base; all of it is read.
      answers: of each of n questions.
    """
    present = _present(references, AnswerFinder([one for every in answers for one in every]))
    return np.array([any(tuple(words(one)) in present for one in every) for every in answers])


def _present(references: ReferenceReader, finder: AnswerFinder) -> set[tuple[str, ...]]:
    """The answers that occur in any reference in use."""
    present: set[tuple[str, ...]] = set()
    ids = references.live
    with tqdm(total=len(ids), desc="answers in references", unit="ref") as bar:
        for start in range(0, len(ids), _BLOCK):
            part = ids[start : start + _BLOCK]
            for text in references.texts(part):
                present |= finder.found(text)
            bar.update(len(part))
    return present


def hit_rates_table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    ranks = [name for name in report if name.startswith("hits@") and not name.endswith("_of_all")]
    head = ["embedder", "references", "questions", "answerable", *ranks]
    cells = [report["embedder"], *(str(report[name]) for name in head[1:4])]
    cells += [f"{report[name]:.3f}" for name in ranks]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), cells))
