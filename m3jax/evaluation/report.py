"""Evaluates a checkpoint by losses and questions, and tabulates the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3jax.data.pipeline import Pipeline, open_pipeline
from m3jax.errors import ConfigError
from m3jax.evaluation.scoring import Answerer, read_questions
from m3jax.inference.session import Session
from m3jax.knowledge.memory_writer import check_reader
from m3jax.knowledge.versions import open_retriever
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.train.evaluator import MODES, LossEvaluator
from m3jax.train.metrics import retrieval_shares


def evaluate_losses(session: Session, *, questions: str | Path | None = None) -> dict[str, Any]:
    """Measures losses on the validation corpus and, if there are questions, accuracy on them.

    Args:
      session: opened checkpoint; its bank and its version of the knowledge are measured.
      questions: JSON lines, see `evaluation.scoring.read_questions`.

    Raises:
      ConfigError: rows of preference pairs, which have no loss per token.
      BankError, TextError, RetrievalError, VersionError: a part is missing or does not fit.
    """
    config, checkpoint = session.config, session.checkpoint
    if config.data.packing == "pairs":
        raise ConfigError(
            f"config.data.packing = 'pairs': pairs have no loss a token. Evaluate {checkpoint} with"
            f" the config of another stage and --checkpoint={checkpoint}; metrics.jsonl has what it"
            " gained"
        )
    bank, version = session.bank_folder, session.version_number
    pipeline = open_pipeline(
        config, session.workdir, split="validation", bank=bank, version=version
    )
    check_reader(pipeline.bank, session.meta, checkpoint)
    evaluator = LossEvaluator(config, pipeline)
    losses = evaluator(session.params)
    counts = pipeline.report()
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "step": session.meta["step"],
        "shift": config.evaluation.shift,
        "rows": evaluator.rows,
        "bank_version": None if pipeline.version is None else pipeline.version.number,
        **losses,
        "retrieval": {**counts, **retrieval_shares(counts)},
    }
    if questions is not None:
        of = config, pipeline, session.model, session.params
        report["questions"] = answer_questions(*of, questions)
    return report


def answer_questions(
    config: ConfigDict, pipeline: Pipeline, model: Model, params: Params, path: str | Path
) -> dict[str, Any]:
    """Measures accuracy on questions without memories and, if there is a bank, with memories.

    Args:
      config, model, params: of the checkpoint.
      pipeline: its tokenizer, references and bank.
      path: questions in JSON lines, see `read_questions`.

    Returns:
      `count` and shares of right answers: `accuracy_none`, and with a bank `accuracy_memory`
      (retrieved memories) and `accuracy_wrong` (memories retrieved for another question).
    """
    questions = read_questions(path)
    answerer = Answerer(model, params, pipeline.tokenizer, config.data.sequence_length)
    accuracy = {"none": answerer.correct(questions)}
    bank, references, version = pipeline.bank, pipeline.references, pipeline.version
    if bank is not None and references is not None and version is not None:
        limit = config.retrieval.overlap_evaluation
        retriever = pipeline.retriever or open_retriever(
            config, version, references, limit, bank=bank
        )
        ids = answerer.search(questions, retriever)
        half = len(ids) // 2
        accuracy["memory"] = answerer.correct(questions, ids, bank)
        accuracy["wrong"] = answerer.correct(questions, ids[-half:] + ids[:-half], bank)
    shares = {f"accuracy_{name}": float(np.mean(right)) for name, right in accuracy.items()}
    return {"count": len(questions), **shares}


def losses_table(report: dict[str, Any]) -> str:
    """Returns the report of `evaluate_losses` as a Markdown table."""
    names = {"memory": "with memory", "none": "without", "wrong": "wrong memories"}
    questions = report.get("questions", {})
    lines = [
        f"{report['checkpoint']} at step {report['step']}, {report['rows']} validation rows,"
        f" retrieval shift {report['shift']}",
        "",
        "| memories | loss (nats a token) | accuracy |" + (" questions |" if questions else ""),
        "|---|---|---|" + ("---|" if questions else ""),
    ]
    for mode in (mode for mode in MODES if f"loss_{mode}" in report):
        loss, key = report[f"loss_{mode}"], f"accuracy_{mode}"
        line = f"| {names[mode]} | {loss:.4f} | {report[key]:.4f} |"
        if questions:
            line += f" {questions[key]:.4f} |" if key in questions else " – |"
        lines.append(line)
    counts = report["retrieval"]
    if "dropped_share" in counts:
        lines += [
            "",
            f"retrieval: {counts['searched']} chunks searched; {counts['dropped_share']:.1%} of the"
            f" references found dropped for their overlap with the row; {counts['unfilled']} places"
            " left empty",
        ]
    return "\n".join(lines)
