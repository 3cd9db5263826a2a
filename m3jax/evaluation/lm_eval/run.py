"""Evaluates tasks from local files in every mode, as one table.

lm-evaluation-harness makes the prompts and scores them (the extra `eval`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m3jax.errors import InferenceError
from m3jax.evaluation.answer_recall import answerable_questions
from m3jax.evaluation.lm_eval.files import LocalTask
from m3jax.evaluation.lm_eval.model import MODES, HarnessModel
from m3jax.evaluation.lm_eval.tasks import measures_of, run_task
from m3jax.inference.session import Session
from m3jax.train.metrics import retrieval_shares


@dataclass(frozen=True)
class Column:
    """Mode with its overlap filter; None is the filter of the config."""

    mode: str
    overlap: float | None = None

    @property
    def title(self) -> str:
        """Name in the table."""
        if self.overlap is None or self.mode in ("none", "warmup"):
            return self.mode
        return f"{self.mode}, {'no filter' if self.overlap >= 1 else f'≤ {self.overlap:.3g}'}"


def columns(modes: Sequence[str], overlaps: Sequence[float]) -> list[Column]:
    """Combines every mode with every filter; a mode without references has none.

    Raises:
      InferenceError: no such mode, or a filter that cannot be.
    """
    chosen = []
    for mode in modes:
        if mode not in (*MODES, "explicit", "warmup"):
            raise InferenceError(f"mode {mode!r}; known: {', '.join(MODES)}, explicit, warmup")
        for limit in (overlaps or (None,)) if mode not in ("none", "warmup") else (None,):
            if limit is not None and not 0 < limit <= 1:
                raise InferenceError(f"overlap {limit}; above 0, and at most 1, which drops none")
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
    compressed: str | None = None,
    warmup: Session | None = None,
) -> dict[str, Any]:
    """Scores tasks.

    Args:
      session: checkpoint and knowledge.
      tasks: of different names.
      chosen: of `columns`.
      shots: examples in front of every question.
      limit: most examples of a task; None takes all.
      references, batch_size: see `HarnessModel`.
      compressed: folder of compressed memories, for the mode `compressed`.
      warmup: checkpoint of the stage before, for the mode `warmup`, which reads no memory.

    Returns:
      `columns`; `tasks`: of each `kind`, `examples`, `chance`, of open questions `answerable`, and
      `scores`, of every column the measures; `dropped` and `truncated`, shares of every column;
      `shots`.

    Raises:
      InferenceError: fewer examples than shots, or a mode that does not fit.
    """
    for task in tasks:
        pool = len(task.docs) - 1 if task.shots is None else len(task.shots)
        if shots > pool:
            raise InferenceError(
                f"task {task.name} has {pool} examples for {shots} shots; give --shots={pool}"
            )
    kept = {task.name: task.docs[: limit or None] for task in tasks}
    report: dict[str, Any] = {"shots": shots, "columns": [column.title for column in chosen]}
    report["tasks"] = {
        task.name: {
            "kind": task.kind,
            "examples": len(kept[task.name]),
            "chance": task.chance,
            "scores": {},
        }
        for task in tasks
    }
    answerable = {}
    if any(column.mode not in ("none", "warmup") for column in chosen):
        for task in tasks:
            if task.kind == "open":
                answers = [doc["answers"] for doc in kept[task.name]]
                answerable[task.name] = answerable_questions(session.references, answers)
                report["tasks"][task.name]["answerable"] = int(answerable[task.name].sum())
    report["dropped"], report["truncated"] = {}, {}
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
        cut = model.counts["truncated"] / max(model.counts["requests"], 1)
        report["truncated"][column.title] = cut
    return report


def _scores(
    samples: Sequence[dict[str, Any]], kind: str, answerable: np.ndarray | None
) -> dict[str, float]:
    """Means of the measures; of open questions also over those that the references can answer."""
    means = {}
    for name in measures_of(kind):
        values = np.array([sample[name] for sample in samples], float)
        means[name] = float(values.mean())
        if answerable is not None and answerable.any():
            means[f"{name}_answerable"] = float(values[answerable].mean())
    return means


_MEASURES = {"exact_match": "exact match", "f1": "F1", "acc": "accuracy"}


def tasks_table(report: dict[str, Any]) -> str:
    """Returns the report as a Markdown table; the average is of each task's first measure."""
    titles = report["columns"]
    lines = [["task", "measure", "examples", "chance", *titles]]
    lines.append(["---"] * len(lines[0]))
    firsts: list[list[float]] = []
    for name, task in report["tasks"].items():
        measures = list(task["scores"][titles[0]])
        chance = "–" if task["chance"] is None else f"{task['chance']:.3f}"
        for measure in measures:
            if measure == "acc_norm":
                continue
            base, _, part = measure.partition("_answerable")
            answerable = measure != base
            count = task["answerable"] if answerable else task["examples"]
            named = _MEASURES[base] + (" of the answerable" if answerable else "")
            figures = [task["scores"][title][measure] for title in titles]
            lines.append([name, named, str(count), chance, *(f"{x:.3f}" for x in figures)])
        firsts.append([task["scores"][title][measures[0]] for title in titles])
    if len(firsts) > 1:
        means = np.mean(firsts, axis=0)
        lines.append(["**average**", "", "", "", *(f"{x:.3f}" for x in means)])
    for name, shares in (("dropped", report["dropped"]), ("truncated", report["truncated"])):
        named = {"dropped": "references dropped", "truncated": "contexts cut"}[name]
        cells = [f"{shares[title]:.1%}" if title in shares else "–" for title in titles]
        lines.append([named, "share", "", "", *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
