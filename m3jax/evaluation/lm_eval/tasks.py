"""Tasks from local files as tasks of lm-evaluation-harness, and how it runs them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from m3jax.evaluation.lm_eval.files import LocalTask
from m3jax.evaluation.lm_eval.model import HarnessModel
from m3jax.evaluation.squad_metrics import exact_match, f1, last_number

SEED = 1234  # of the shots
_SHORT, _LONG = 16, 256  # tokens of a short answer, and of one with its steps


def _means(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def _open_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    answer, right = results[0], doc["answers"]
    return {"exact_match": exact_match(answer, right), "f1": f1(answer, right)}


def _number_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    number = last_number(results[0])
    return {"exact_match": float(number is not None and number == last_number(doc["answers"][0]))}


# What the harness is told of each kind.
_SETTINGS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": _means("acc", "acc_norm"),
    },
    "schema": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "contexts",
        "doc_to_target": "continuation",
        "metric_list": _means("acc"),
    },
    "continuation": {
        "output_type": "loglikelihood",
        "doc_to_text": "text",
        "doc_to_target": "continuation",
        "target_delimiter": "",
        "metric_list": _means("acc"),
    },
    "open": {
        "output_type": "generate_until",
        "doc_to_text": "text",
        "doc_to_target": "answers",
        "process_results": _open_results,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": _SHORT},
        "metric_list": _means("exact_match", "f1"),
    },
    "number": {
        "output_type": "generate_until",
        "doc_to_text": "text",
        "doc_to_target": "target",
        "process_results": _number_results,
        "generation_kwargs": {"until": ["\n\n", "Question:"], "max_gen_toks": _LONG},
        "metric_list": _means("exact_match"),
    },
}


def measures_of(kind: str) -> list[str]:
    """Names the measures of tasks of a kind, the main one first."""
    return [metric["metric"] for metric in _SETTINGS[kind]["metric_list"]]


def run_task(
    model: HarnessModel, task: LocalTask, shots: int = 0, limit: int | None = None
) -> list[dict[str, Any]]:
    """Runs a task in one mode; returns the harness's record of each example, in order."""
    from lm_eval.evaluator import evaluate

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        made = as_harness_task(task, shots)
        results = evaluate(
            model, {"tasks": {task.name: made}}, limit=limit, bootstrap_iters=0, verbosity="ERROR"
        )
    finally:
        logger.setLevel(level)
    return sorted(results["samples"][task.name], key=lambda sample: sample["doc_id"])


class _Docs(list):
    """Examples as the harness takes them."""

    @property
    def features(self) -> dict[str, None]:
        """Names of the fields."""
        return dict.fromkeys(self[0])


def as_harness_task(task: LocalTask, shots: int = 0) -> Any:
    """Makes a task of the harness; the shots of an example are the same in every run."""
    from lm_eval.api.task import ConfigurableTask

    splits = {"test": _Docs(task.docs)}
    if task.shots is not None:
        splits["dev"] = _Docs(task.shots)
    made = ConfigurableTask(
        config={
            "task": task.name,
            "custom_dataset": lambda **_: splits,
            "test_split": "test",
            "fewshot_split": "test" if task.shots is None else "dev",
            "num_fewshot": shots,
            **_SETTINGS[task.kind],
        }
    )
    made.set_fewshot_seed(SEED)
    return made
