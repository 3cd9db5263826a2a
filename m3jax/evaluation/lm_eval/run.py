"""Evaluates tasks from local files in several modes, and tabulates the scores.

lm-evaluation-harness makes the prompts and scores them (the extra `eval`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3jax.errors import InferenceError
from m3jax.evaluation.answer_recall import answerable_questions
from m3jax.evaluation.lm_eval.model import MODES, HarnessModel
from m3jax.evaluation.report import SHIFTS, search_note
from m3jax.evaluation.squad_metrics import exact_match, f1, last_number
from m3jax.evaluation.task_files import LocalTask
from m3jax.inference.session import Session
from m3jax.printable import as_markdown
from m3jax.train.metrics import retrieval_shares

SEED = 1234  # for drawing few-shot examples
_SHORT, _LONG = 16, 256  # most new tokens: answer alone, or with reasoning steps


def _open_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    answer, right = results[0], doc["answers"]
    return {"exact_match": exact_match(answer, right), "f1": f1(answer, right)}


def _number_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    number = last_number(results[0])
    return {"exact_match": float(number is not None and number == last_number(doc["answers"][0]))}


def _settings(
    output_type: str, text: str, target: str, measures: Sequence[str], **more: Any
) -> dict[str, Any]:
    """Returns the harness settings of a task kind; `text` and `target` are fields of examples."""
    metric = {"aggregation": "mean", "higher_is_better": True}
    metrics = [{"metric": name, **metric} for name in measures]
    named = {"output_type": output_type, "doc_to_text": text, "doc_to_target": target}
    return {**named, "metric_list": metrics, **more}


_SETTINGS = {
    "choice": _settings(
        "multiple_choice", "text", "gold", ["acc", "acc_norm"], doc_to_choice="choices"
    ),
    "schema": _settings(
        "multiple_choice", "gold", "continuation", ["acc"], doc_to_choice="contexts"
    ),
    "continuation": _settings(
        "loglikelihood", "text", "continuation", ["acc"], target_delimiter=""
    ),
    "open": _settings(
        *("generate_until", "text", "answers", ["exact_match", "f1"]),
        process_results=_open_results,
        generation_kwargs={"until": ["\n"], "max_gen_toks": _SHORT},
    ),
    "number": _settings(
        *("generate_until", "text", "target", ["exact_match"]),
        process_results=_number_results,
        generation_kwargs={"until": ["\n\n", "Question:"], "max_gen_toks": _LONG},
    ),
}


def measures_of(kind: str) -> list[str]:
    """Returns the names of the measures of a task kind, the main measure first."""
    return [metric["metric"] for metric in _SETTINGS[kind]["metric_list"]]


def run_task(
    model: HarnessModel, task: LocalTask, shots: int = 0, limit: int | None = None
) -> list[dict[str, Any]]:
    """Runs a task with a model; returns the harness's record of each example, in order."""
    from lm_eval.evaluator import evaluate

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        tasks = {"tasks": {task.name: as_harness_task(task, shots)}}
        results = evaluate(model, tasks, limit=limit, bootstrap_iters=0, verbosity="ERROR")
    finally:
        logger.setLevel(level)
    return sorted(results["samples"][task.name], key=lambda sample: sample["doc_id"])


class _Docs(list):
    """List of examples with the property `features` that the harness reads."""

    @property
    def features(self) -> dict[str, None]:
        """Names of the fields."""
        return dict.fromkeys(self[0])


def as_harness_task(task: LocalTask, shots: int = 0) -> Any:
    """Makes a harness task; the few-shot examples of a question are the same in every run."""
    from lm_eval.api.task import ConfigurableTask

    splits = {"test": _Docs(task.docs), "dev": _Docs(task.shots or ())}
    harness_task = ConfigurableTask(
        config={
            "task": task.name,
            "custom_dataset": lambda **_: splits,
            "test_split": "test",
            "fewshot_split": "test" if task.shots is None else "dev",
            "num_fewshot": shots,
            **_SETTINGS[task.kind],
        }
    )
    harness_task.set_fewshot_seed(SEED)
    return harness_task


class Column(NamedTuple):
    """Column of the table: a mode and its overlap limit; None is the limit of the config."""

    mode: str
    overlap: float | None = None

    @property
    def title(self) -> str:
        """Name in the table."""
        if self.overlap is None or self.mode in ("none", "warmup"):
            return self.mode
        return f"{self.mode}, {'no filter' if self.overlap >= 1 else f'≤ {self.overlap:.3g}'}"


def columns(modes: Sequence[str], overlaps: Sequence[float]) -> list[Column]:
    """Combines every mode with every overlap limit; modes that retrieve nothing have no limit.

    A limit drops references whose overlap with the question is larger (Memory³ §6). Empty
    `overlaps` give every mode one column without a limit.

    Raises:
      InferenceError: an unknown mode, or a limit outside (0, 1].
    """
    chosen = []
    for mode in modes:
        if mode not in (*MODES, "explicit", "warmup"):
            raise InferenceError(f"mode {mode!r}; known: {', '.join(MODES)}, explicit, warmup")
        for limit in (overlaps or (None,)) if mode not in ("none", "warmup") else (None,):
            if limit is not None and not 0 < limit <= 1:
                raise InferenceError(
                    f"overlap limit {limit}: above 0 and at most 1, which drops none"
                )
            chosen.append(Column(mode, limit))
    return chosen


def evaluate_tasks(
    session: Session,
    tasks: Sequence[LocalTask],
    chosen: Sequence[Column],
    *,
    shots: int = 0,
    limit: int | None = None,
    references: int = 5,
    batch_size: int = 16,
    compressed: str | Path | None = None,
    warmup: Session | None = None,
) -> dict[str, Any]:
    """Runs every task in every column and returns the scores.

    Args:
      session: checkpoint and knowledge.
      tasks: of different names.
      chosen: columns of the table, of `columns`.
      shots: number of examples in front of every question (few-shot).
      limit: most examples of a task; None takes all.
      references, batch_size: see `HarnessModel`.
      compressed: folder of compressed memories, for the mode `compressed`.
      warmup: session of the warmup checkpoint, for the mode `warmup`, which reads no memories.

    Returns:
      `shots`; `columns`: titles; `tasks`: of each task `kind`, `examples`, `chance`, `answerable`
      (open questions only) and `scores`, column → measure → mean; `dropped` and `truncated`: of
      each column the share of retrieved references dropped for overlap, and of contexts that were
      cut; `shift`: retrieval shift of memories; `overlaps`: limits of the filter.

    Raises:
      InferenceError: fewer examples than shots, the mode `warmup` without `warmup`, or a mode that
        does not fit the session.
    """
    for task in tasks:
        pool = len(task.docs) - 1 if task.shots is None else len(task.shots)
        if shots > pool:
            raise InferenceError(
                f"task {task.name} has {pool} examples for {shots} shots; give --shots={pool}"
            )
    report: dict[str, Any] = {"shots": shots, "columns": [column.title for column in chosen]}
    report |= {"tasks": {}, "dropped": {}, "truncated": {}, "shift": 0, "overlaps": []}
    with_references = any(column.mode not in ("none", "warmup") for column in chosen)
    answerable = {}
    for task in tasks:
        docs = task.docs[: limit or None]
        named = {"kind": task.kind, "examples": len(docs), "chance": task.chance, "scores": {}}
        if with_references and task.kind == "open":
            answers = [doc["answers"] for doc in docs]
            answerable[task.name] = answerable_questions(session.references, answers)
            named["answerable"] = int(answerable[task.name].sum())
        report["tasks"][task.name] = named
    for column in chosen:
        if column.mode == "warmup" and warmup is None:
            raise InferenceError("the mode `warmup` needs --warmup_config")
        model = HarnessModel(
            warmup if warmup and column.mode == "warmup" else session,
            "none" if column.mode == "warmup" else column.mode,
            overlap=column.overlap,
            references=references,
            batch_size=batch_size,
            bank=compressed if column.mode == "compressed" else None,
        )
        for task in tasks:
            samples = run_task(model, task, shots, limit)
            scores = _scores(samples, task.kind, answerable.get(task.name))
            report["tasks"][task.name]["scores"][column.title] = scores
        if model.retriever is not None:
            share = retrieval_shares(model.retriever.report())
            report["dropped"][column.title] = share.get("dropped_share", 0.0)
            report["overlaps"] = sorted({*report["overlaps"], model.overlap})
        cut = model.counts["truncated"] / max(model.counts["requests"], 1)
        report["truncated"][column.title] = cut
    return report


def _scores(
    samples: Sequence[dict[str, Any]], kind: str, answerable: np.ndarray | None
) -> dict[str, float]:
    """Computes means of the measures; for open questions also over the answerable questions."""
    means = {}
    for name in measures_of(kind):
        values = np.array([sample[name] for sample in samples], float)
        means[name] = float(values.mean())
        if answerable is not None and answerable.any():
            means[f"{name}_answerable"] = float(values[answerable].mean())
    return means


_MEASURES = {"exact_match": "exact match", "f1": "F1", "acc": "accuracy"}


def tasks_table(report: dict[str, Any]) -> str:
    """Returns the report as a Markdown table; the average is over each task's first measure."""
    titles = report["columns"]
    rows = [["task", "measure", "examples", "chance", *titles], ["---"] * (4 + len(titles))]
    firsts: list[list[float]] = []
    for name, task in report["tasks"].items():
        chance = "–" if task["chance"] is None else f"{task['chance']:.3f}"
        measures = [m for m in task["scores"][titles[0]] if m != "acc_norm"]
        for measure in measures:
            base, answerable, _ = measure.partition("_answerable")
            count = task["answerable"] if answerable else task["examples"]
            meaning = _MEASURES[base] + (" of the answerable" if answerable else "")
            figures = [task["scores"][title][measure] for title in titles]
            rows.append(
                [as_markdown(name), meaning, str(count), chance, *(f"{x:.3f}" for x in figures)]
            )
        firsts.append([task["scores"][title][measures[0]] for title in titles])
    if len(firsts) > 1:
        rows.append(["**average**", "", "", "", *(f"{x:.3f}" for x in np.mean(firsts, axis=0))])
    for meaning, shares in (
        ("references dropped", report["dropped"]),
        ("contexts cut", report["truncated"]),
    ):
        cells = [f"{shares[title]:.1%}" if title in shares else "–" for title in titles]
        rows.append([meaning, "share", "", "", *cells])
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    if report["dropped"]:
        query = f"{SHIFTS[0]}, RAG with the whole question"
        notes = {search_note(query, "the question", limit) for limit in report["overlaps"]}
        lines += ["", *sorted(notes)]
    return "\n".join(lines)
