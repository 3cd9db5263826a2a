"""Measures answer recall@k: the share of questions whose k retrieved references hold an answer."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.errors import InferenceError
from m3jax.evaluation.questions import read_questions
from m3jax.evaluation.report import search_note
from m3jax.evaluation.squad_metrics import normalise
from m3jax.knowledge.versions import open_references, open_retriever, open_version
from m3jax.mirror import Mirror
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer

_BLOCK = 4096  # references read at once
_QUERIES = 256
_SEPARATORS = {ord(character): " " for character in string.punctuation + "’‘“”–—"}


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
        """Returns the answers that occur in a text, each as a tuple of words."""
        text_words = words(text)
        return {
            run
            for place, word in enumerate(text_words)
            for run in self._by_first.get(word, ())
            if tuple(text_words[place : place + len(run)]) == run
        }


def hit_rates(
    config: ConfigDict,
    workdir: str | Path,
    questions: str | Path,
    *,
    at: Sequence[int] = (1, 5),
    version: int | None = None,
) -> dict[str, Any]:
    """Measures the share of questions with an answer in one of the first k references (recall@k).

    Args:
      config: a validated config.
      workdir: prepared folder.
      questions: file of questions with answers, see `evaluation.questions.read_questions`.
      at: values of k, ascending.
      version: version of the knowledge; default the current one.

    Returns:
      `questions`, `references`, `embedder`; `answerable`: number of questions with an answer in any
      reference, the most that retrieval could answer; for every k `hits@k`, the share of these, and
      `hits@k_of_all`, the share of all questions.

    Raises:
      TextError: the file has no questions, or one of another form or without an answer.
    """
    read = read_questions(questions)
    texts, answers = [q.query for q in read], [q.right for q in read]
    opened = open_version(workdir, version)
    Mirror.of(workdir).fetch("tokenizer")
    tokenizer = Tokenizer.load(Path(workdir) / "tokenizer")
    references = open_references(config, opened, tokenizer)
    candidates = max(at)
    if config.retrieval.rerank:  # as many as generation ranks
        candidates = config.retrieval.candidates
        if max(at) > candidates:
            raise InferenceError(
                f"the best {max(at)} of {candidates} candidates that config.retrieval.rerank"
                " orders; set config.retrieval.candidates at least as high"
            )
    retriever = open_retriever(config, opened, references, 1.0, candidates)
    embedder = retriever.index.embedder
    answerable = answerable_questions(references, answers)
    rank = np.full(len(texts), np.inf)
    for start in tqdm(range(0, len(texts), _QUERIES), desc="questions", unit="block"):
        ids = retriever.retrieve(texts[start : start + _QUERIES], None, max(at))
        for number, row in enumerate(ids, start):
            finder = AnswerFinder(answers[number])
            hits = [bool(finder.find(text)) for text in references.texts(row[row >= 0])]
            if any(hits):
                rank[number] = hits.index(True)
    ranked = f", {candidates} candidates ranked" if config.retrieval.rerank else ""
    report: dict[str, Any] = {
        "questions": len(texts),
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
    references: References, answers: Sequence[Sequence[str]]
) -> Bool[np.ndarray, " n"]:
    """Returns for each question whether any live reference contains one of its answers.

    Args:
      references: the knowledge base; all live references are read.
      answers: accepted answers of each of n questions.
    """
    finder = AnswerFinder([answer for every in answers for answer in every])
    present: set[tuple[str, ...]] = set()
    ids = references.live
    for start in tqdm(range(0, len(ids), _BLOCK), desc="answers in references", unit="block"):
        present.update(*map(finder.find, references.texts(ids[start : start + _BLOCK])))
    return np.array([any(tuple(words(answer)) in present for answer in every) for every in answers])


def hit_rates_table(report: dict[str, Any]) -> str:
    """Returns the report of `hit_rates` as a Markdown table."""
    ranks = [name for name in report if name.startswith("hits@") and not name.endswith("_of_all")]
    head = ["embedder", "references", "questions", "answerable", *ranks]
    cells = [report["embedder"], *(str(report[name]) for name in head[1:4])]
    cells += [f"{report[name]:.3f}" for name in ranks]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), cells)]
    return "\n".join([*lines, "", search_note("the question alone", "it", 1.0)])
