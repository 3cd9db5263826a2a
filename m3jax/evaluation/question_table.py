r"""Asks questions under several conditions: what the model reads decides how it answers.

| condition | the model reads |
|---|---|
| `none` | the question |
| `text`, `memory` | the references that answer it, as text or as memories |
| `text_among`, `memory_among` | the same among others, k in all, the right ones nearest as text |
| `text_found`, `memory_found` | the k references that the question finds, the best nearest |
| `both_found` | their memories, and the best one's text as well |
| `wrong` | memories of k others |

Texts stand in front of solved examples and question, an empty line behind each. Memories are read
by every token of the row. Others are drawn at random from references that hold none of the answers
and that the question neither names nor finds. The question alone is searched; references that
overlap with it are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from m3jax.checkpoint import identity_of
from m3jax.config import to_json
from m3jax.errors import InferenceError
from m3jax.evaluation.answer_recall import AnswerFinder
from m3jax.evaluation.batches import continue_prompts
from m3jax.evaluation.bootstrap import interval, resampled_means
from m3jax.evaluation.other_references import draw_others
from m3jax.evaluation.questions import Question, answering, solved
from m3jax.evaluation.report import search_note
from m3jax.evaluation.scoring import Scorer, fit
from m3jax.evaluation.squad_metrics import exact_match, f1
from m3jax.files import digest, read_sealed, write_sealed
from m3jax.inference.generate import Generator
from m3jax.inference.memory_retrieval import MemoryRetriever
from m3jax.inference.session import Session
from m3jax.memory.reader import MemoryReader
from m3jax.retrieval.retriever import Retriever
from m3jax.text.tokenizer import END
from m3jax.train.metrics import retrieval_shares


class Condition(NamedTuple):
    """References that the model reads as `text` and as `memory`: attributes of `_References`."""

    label: str
    text: str = ""
    memory: str = ""


CONDITIONS = {
    "none": Condition("nothing"),
    "text": Condition("the reference as text", text="given"),
    "text_among": Condition("the text among others", text="among"),
    "text_found": Condition("texts found", text="found"),
    "memory": Condition("its memory", memory="given"),
    "memory_among": Condition("its memory among others", memory="among"),
    "memory_found": Condition("memories found", memory="found"),
    "both_found": Condition("memories found, the best text too", text="best", memory="found"),
    "wrong": Condition("memories of others", memory="wrong"),
}
MEASURES = {
    "exact_match": "exact match",
    "f1": "F1",
    "first": "first choice",
    "nats": "nats a token",
    "worth": "of the text's worth",
}


def evaluate_questions(
    session: Session,
    questions: Sequence[Question],
    conditions: Sequence[str] = (),
    *,
    shots: Sequence[Question] = (),
    k: int | None = None,
    overlap: float | None = None,
    new_tokens: int = 32,
    batch_size: int = 16,
    seed: int = 0,
    cold: bool = False,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Scores and generates the answers to questions under every condition.

    Args:
      session: checkpoint and knowledge.
      questions: see `evaluation.questions.read_questions`.
      conditions: of `CONDITIONS`; default all that the questions and the config allow.
      shots: solved examples in front of every question.
      k: references read together; default `memory.per_prompt_chunk`.
      overlap: references found that overlap more than this with the question, or the question with
        them, are dropped; 1 drops none; default `retrieval.overlap_evaluation`.
      new_tokens: most tokens of a generated answer; 0 generates none.
      batch_size: rows that the device works on together.
      seed: of the draws of other references, and of the bootstrap.
      cold: whether memories are written when they are first read, so that no bank is needed.
      kept: file that gets the measures of every question, condition by condition; a call with the
        same inputs takes from it what is finished.

    Returns:
      `questions`, `groups` (passages, or questions without one), `k`, `shots`, `overlap`; with a
      search, `dropped`: share of the references found that were dropped for overlap, and `recall`:
      share of the questions that find a reference that answers them (None if no file names it);
      `conditions`: of each, `cut`: number of prompts that lost their beginning, because they are
      longer than `data.sequence_length`, and of each measure `mean` and 95 % confidence limits
      `low` and `high`: `exact_match` and `f1` of the generated answer up to its first line end;
      `nats`: mean over questions of the answer's negative log-probability a token; `first`: share
      of answers all of whose tokens are the model's first choice; `worth`: (none − nats) /
      (none − nats with text), if both are measured.

    Raises:
      InferenceError: an unknown condition, or one that questions or config do not allow.
      BankError, RetrievalError, TextError, VersionError: a part is missing or does not fit.
    """
    chosen = _chosen(session, questions, conditions)
    k = k or session.config.memory.per_prompt_chunk
    read = _References(session, questions, k, overlap, seed)
    reader = _Reader(session, solved(shots), new_tokens, batch_size, cold)
    groups = [str(n) if q.passage is None else q.passage[0].id for n, q in enumerate(questions)]
    inputs = [repr([*questions]), repr([*shots]), repr((k, read.overlap, new_tokens, seed, cold))]
    measured = _Measured(kept, inputs, session, cold)
    for name in chosen:
        condition = CONDITIONS[name]
        texts, memories = read.ids(condition.text), read.ids(condition.memory)
        if not measured.has(name):
            measured.add(name, *reader.answer(name, questions, texts, memories))
    values = {name: measured.measures(name) for name in chosen}
    summary = _summary(values, groups, seed)
    return {
        "checkpoint": str(session.checkpoint),
        "step": session.meta["step"],
        "questions": len(questions),
        "groups": len(set(groups)),
        "k": k,
        "shots": len(shots),
        **read.report(),
        "conditions": {
            name: {"cut": measured.conditions[name]["cut"]} | summary[name] for name in chosen
        },
    }


class _Measured:
    """Measures of every question by condition, kept in a file as they come."""

    def __init__(
        self, path: Path | None, inputs: Sequence[str], session: Session, cold: bool
    ) -> None:
        """Reads what `path` holds; None keeps nothing. `inputs` are what all measures depend on."""
        self.path, self.session, self.cold = path, session, cold
        self._common = [*inputs, to_json(session.config), identity_of(session.meta)]
        self.conditions: dict[str, dict[str, Any]] = {}
        before = None if path is None or not path.is_file() else read_sealed(path, "conditions")
        for name, of in (before or {"conditions": {}})["conditions"].items():
            if of["inputs"] == self._inputs(name):
                self.conditions[name] = of

    def _inputs(self, name: str) -> str:
        """Returns the hash of what the measures of a condition depend on."""
        _, text, memory = CONDITIONS[name]
        parts = [*self._common]
        if text or memory:
            parts.append(self.session.retriever.index.fingerprint)
        if memory:
            parts.append("cold" if self.cold else self.session.bank.fingerprint)
        return digest(*parts)

    def has(self, name: str) -> bool:
        if name in self.conditions:
            print(f"{name}: measured before, in {self.path}")
        return name in self.conditions

    def add(self, name: str, measures: dict[str, np.ndarray], cut: int) -> None:
        lists = {measure: of.tolist() for measure, of in measures.items()}
        self.conditions[name] = {"cut": cut, "measures": lists}
        if self.path is not None:
            self.conditions[name]["inputs"] = self._inputs(name)
            write_sealed(self.path, {"conditions": self.conditions})

    def measures(self, name: str) -> dict[str, np.ndarray]:
        return {measure: np.array(of) for measure, of in self.conditions[name]["measures"].items()}


def _summary(
    values: dict[str, dict[str, np.ndarray]], groups: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """Returns mean and confidence limits of every measure of every condition, and `worth`."""
    samples = {
        name: {measure: resampled_means(of, groups, seed) for measure, of in every.items()}
        for name, every in values.items()
    }
    means = {
        name: {measure: of.mean() for measure, of in every.items()}
        for name, every in values.items()
    }
    if {"none", "text"} <= set(values):
        for table in (samples, means):
            none, text = table["none"]["nats"], table["text"]["nats"]
            for every in table.values():
                every["worth"] = (none - every["nats"]) / (none - text)
    summary: dict[str, dict[str, Any]] = {name: {} for name in means}
    for name, every in means.items():
        for measure, mean in every.items():
            low, high = interval(samples[name][measure])
            summary[name][measure] = {"mean": float(mean), "low": low, "high": high}
    return summary


def _chosen(
    session: Session, questions: Sequence[Question], conditions: Sequence[str]
) -> list[str]:
    """Returns the conditions asked for, or all that can be; raises `InferenceError`."""
    reasons = {}
    answered = all(question.references or question.passage for question in questions)
    for name, (_, text, memory) in CONDITIONS.items():
        if memory and session.config.memory.source == "none":
            reasons[name] = "the config's stage reads no memories (memory.source = none)"
        elif {text, memory} & {"given", "among"} and not answered:
            reasons[name] = "a question names no references, and no passage, that answer it"
    for name in conditions:
        if name not in CONDITIONS:
            raise InferenceError(f"condition {name!r}; known: {', '.join(CONDITIONS)}")
        if name in reasons:
            raise InferenceError(f"condition {name!r}: {reasons[name]}")
    return list(conditions) or [name for name in CONDITIONS if name not in reasons]


class _References:
    """Ids of the references that each question reads, `(n, count)`, −1 = none, by `which`."""

    def __init__(
        self,
        session: Session,
        questions: Sequence[Question],
        k: int,
        overlap: float | None,
        seed: int,
    ) -> None:
        self.session, self.questions, self.k, self.seed = session, questions, k, seed
        limit = session.config.retrieval.overlap_evaluation if overlap is None else overlap
        self.overlap = float(limit)
        self._retriever: Retriever | None = None

    def ids(self, which: str) -> Int64[np.ndarray, "n _"] | None:
        """Returns the ids of a condition: None, or the attribute `which` names."""
        return getattr(self, which) if which else None

    @cached_property
    def named(self) -> list[list[int]]:
        """Ids that the questions name; none where a question names nothing."""
        return [answering(question, self.session.references) for question in self.questions]

    @cached_property
    def given(self) -> Int64[np.ndarray, "n most"]:
        ids = np.full((len(self.named), max(map(len, self.named))), -1, np.int64)
        for row, named in zip(ids, self.named, strict=True):
            row[: len(named)] = named
        return ids

    @cached_property
    def found(self) -> Int64[np.ndarray, "n k"]:
        queries = [question.query for question in self.questions]
        self._retriever = self.session.retriever.with_limit(self.overlap)
        against = self.session.tokenizer.encode_batch(queries)
        return self._retriever.retrieve(queries, against, self.k)

    @property
    def best(self) -> Int64[np.ndarray, "n 1"]:
        return self.found[:, :1]

    @cached_property
    def among(self) -> Int64[np.ndarray, "n k"]:
        """The references given, then others, cut to k."""
        both = np.concatenate([self.given, self._others(self.seed)], axis=1)
        first = np.argsort(both < 0, axis=1, kind="stable")  # places without reference to the end
        width = max(self.k, self.given.shape[1])
        return np.take_along_axis(both, first, axis=1)[:, :width]

    @cached_property
    def wrong(self) -> Int64[np.ndarray, "n k"]:
        return self._others(self.seed + 1)

    def _others(self, seed: int) -> Int64[np.ndarray, "n k"]:
        references = self.session.references
        finders = [AnswerFinder(question.right) for question in self.questions]

        def serves(number: int, ids: list[int]) -> list[bool]:
            return [not finders[number].find(text) for text in references.texts(ids)]

        own = [[*a, *b] for a, b in zip(self.named, self.found.tolist(), strict=True)]
        return draw_others(references.live, own, self.k, seed, serves)

    def report(self) -> dict[str, Any]:
        """Returns the filter's limit; after a search also what it dropped, and the recall."""
        if self._retriever is None:
            return {"overlap": self.overlap}
        shares, recall = retrieval_shares(self._retriever.report()), None
        if all(self.named):
            pairs = zip(self.named, self.found.tolist(), strict=True)
            recall = float(np.mean([bool({*named} & {*retrieved}) for named, retrieved in pairs]))
        return {
            "overlap": self.overlap,
            "dropped": shares.get("dropped_share", 0.0),
            "recall": recall,
        }


class _Reader:
    """Scores and generates answers with texts or memories in front."""

    def __init__(
        self, session: Session, shots: str, new_tokens: int, batch_size: int, cold: bool
    ) -> None:
        self.cold = cold
        self.session, self.solved, self.new = session, shots, new_tokens
        self.longest = session.config.data.sequence_length
        self.scorer = Scorer(
            *(session.model, session.params, session.tokenizer, self.longest, batch_size)
        )
        ends = session.tokenizer.encode_batch(["\n", "\n\n"])
        self._stop = (END, *{int(token) for tokens in ends for token in tokens})
        self._generators: dict[int, Generator] = {}

    def answer(
        self,
        name: str,
        questions: Sequence[Question],
        texts: Int64[np.ndarray, "n _"] | None,
        memories: Int64[np.ndarray, "n M"] | None,
    ) -> tuple[dict[str, np.ndarray], int]:
        """Returns the measures of every question, and the number of prompts that were cut.

        `name` is shown; `texts` and `memories` are ids of the references read as such, −1 = none.
        """
        session, tokenizer = self.session, self.session.tokenizer
        fronts = [""] * len(questions)
        if texts is not None:
            fronts = [_texts(session, row) for row in texts]
        prompts = tokenizer.encode_batch(
            [f"{front}{self.solved}{q.prompt}" for front, q in zip(fronts, questions, strict=True)]
        )
        answers = tokenizer.encode_batch([question.answer for question in questions])
        cut, pairs = 0, []
        for prompt, answer in zip(prompts, answers, strict=True):
            room = self.longest - max(0, self.new + 1 - len(answer))  # as much for a generated one
            pair, shortened = fit(prompt, answer, room)
            pairs.append(pair)
            cut += shortened
        bank = None if memories is None else self.memories
        read = None if memories is None else [*memories[:, None]]
        scores = self.scorer.score(pairs, read, bank, progress=f"{name}: score")
        measures = {
            "nats": -scores.logprob / [len(pair.continuation) for pair in pairs],
            "first": scores.greedy.astype(float),
        }
        if self.new:
            generated = self._generate(name, [pair.context[1:] for pair in pairs], read)
            both = [*zip(generated, (question.right for question in questions), strict=True)]
            measures["exact_match"] = np.array([exact_match(*pair) for pair in both])
            measures["f1"] = np.array([f1(*pair) for pair in both])
        return measures, cut

    def _generate(
        self, name: str, prompts: list[np.ndarray], read: list[np.ndarray] | None
    ) -> list[str]:
        """Returns greedy answers up to their first line end."""
        options = {}
        if read is not None:
            retrievals = self.longest // self.session.config.memory.chunk_length + 2
            options["references"] = [[ids[0]] * retrievals for ids in read]
        generator = self._generator(0 if read is None else read[0].shape[-1])
        rows = self.scorer.batch_size
        bar = f"{name}: answer"
        texts = continue_prompts(generator, prompts, self.new, rows, options, progress=bar)
        return [text.partition("\n")[0] for text in texts]

    @property
    def memories(self) -> MemoryReader:
        """Memories of the references."""
        return self.session.cold_memories if self.cold else self.session.bank

    def _generator(self, memories: int) -> Generator:
        """Returns the generator for a number of memories of a row; each is compiled once."""
        if memories not in self._generators:
            session, retriever = self.session, None
            if memories:
                retriever = MemoryRetriever(None, self.memories, session.tokenizer, memories)
            self._generators[memories] = Generator(
                *(session.model, session.params, session.tokenizer, retriever),
                stop=self._stop,
                longest=self.longest,
            )
        return self._generators[memories]


def _texts(session: Session, ids: np.ndarray) -> str:
    """Returns references as text, an empty line behind each, the first one last."""
    texts = session.references.texts(ids[ids >= 0][::-1])
    return "".join(f"{text.strip()}\n\n" for text in texts)


def questions_table(report: dict[str, Any]) -> str:
    """Returns the report of `evaluate_questions` as Markdown; intervals are of 95 %."""
    first = next(iter(report["conditions"].values()))
    measures = {name: title for name, title in MEASURES.items() if name in first}
    head = ["the model reads", *measures.values(), "prompts cut"]
    rows = [head, ["---"] * len(head)]
    for name, of in report["conditions"].items():
        cells = ["{mean:.3f} ({low:.3f} to {high:.3f})".format(**of[each]) for each in measures]
        rows.append([CONDITIONS[name].label, *cells, str(of["cut"])])
    about = f"{report['checkpoint']} at step {report['step']}: {report['questions']} questions"
    if report["groups"] < report["questions"]:
        about += f" about {report['groups']} passages"
    about += f", {report['shots']} solved examples, {report['k']} references together"
    lines = [about, "", *(f"| {' | '.join(row)} |" for row in rows)]
    if "dropped" in report:
        search = search_note("the question alone", "it", report["overlap"], report["dropped"])
        if report["recall"] is not None:
            search += f"; an answering reference found for {report['recall']:.1%}"
        lines += ["", search]
    cuts = max(of["cut"] for of in report["conditions"].values())
    if cuts:
        lines += ["", f"up to {cuts} prompts lost their beginning: longer than the context"]
    return "\n".join(lines)
