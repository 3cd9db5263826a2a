"""Runs one entry of a sweep: makes the data, stages, banks and figures that are missing.

Every stage has a workdir of its own, which the other scripts can read; its data, its bank and the
previous stage are links in it.

    data/seed-0-HASH/             tokenizer corpus references index
    stages/continual-HASH/        tokenizer corpus references index bank warmup -> …, continual/
    banks/HASH/                   memories
    results/ENTRY-seed-0.json     figures or the error; the log is beside it
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m3jax import flops
from m3jax.config import ConfigDict
from m3jax.errors import SweepError
from m3jax.evaluation.question_table import evaluate_questions
from m3jax.evaluation.questions import Question, read_questions
from m3jax.evaluation.report import evaluate_losses
from m3jax.evaluation.scoring import Answerer
from m3jax.files import read_sealed, write_sealed
from m3jax.inference.session import Session
from m3jax.knowledge.memory_writer import MemoryWriter
from m3jax.knowledge.versions import open_version
from m3jax.memory.bank import Bank
from m3jax.sweep.spec import Sweep, SweepData, SweepRun, SweepStage
from m3jax.text.references import References
from m3jax.train.stage import train_stage
from m3jax.workdir import clear_folder, make_part

FINISHED = "finished.json"
_PARTS, _PACKED = ("tokenizer", "corpus", "references", "index"), ("chats",)


def prepare(sweep: Sweep, run: SweepRun) -> None:
    """Makes the data of a run and the workdirs of its stages.

    Raises:
      SweepError: a link in the workdir of a stage leads elsewhere than this run reads.
      Exception: any error of preparing the data.
    """
    for stage in run.stages:
        _make_data(sweep, stage.data)
        _link(stage)


def run_entry(sweep: Sweep, run: SweepRun) -> None:
    """Trains the stages of a run that are not finished, evaluates it, and writes its result.

    After a kill the same call continues.

    Raises:
      Exception: any error of data, training or evaluation; no result is written then.
    """
    prepare(sweep, run)
    for stage in run.stages:
        _train(stage)
    figures = _measure(sweep, run)
    result = {"key": run.key, "name": run.name, "figures": figures, "data": run.content}
    write_sealed(run.result, result)


def _make_data(sweep: Sweep, data: SweepData) -> None:
    if data.config is None:
        return
    config, make = data.config, sweep.prepare
    assert make is not None

    def fresh(folder: Path) -> None:
        clear_folder(folder)  # left by a killed call
        make(config, folder, data.knowledge)

    made_of = {"name": data.folder.name, "by": f"{make.__module__}.{make.__qualname__}"}
    make_part(data.folder, made_of, fresh)


def _link(stage: SweepStage) -> None:
    """Makes the workdir of a stage, and the links in it that are missing or lead nowhere.

    Raises `SweepError` for a link to another folder than `stage` reads.
    """
    parts = {name: stage.data.folder / name for name in (*_PARTS, *_PACKED)}
    links = {name: path for name, path in parts.items() if name in _PARTS or path.exists()}
    if stage.bank is not None:
        links["bank"] = stage.bank
    before = stage.before
    while before is not None:  # the writer of memories is looked up by this name
        links[before.config.stage] = before.checkpoints
        before = before.before
    stage.folder.mkdir(parents=True, exist_ok=True)
    for name, target in links.items():
        link, path = stage.folder / name, os.path.relpath(target, stage.folder)
        if link.is_symlink() and not link.exists():  # its target was moved or was never written
            link.unlink()
        if not link.is_symlink():
            link.symlink_to(path, target_is_directory=True)
        elif link.resolve() != target.resolve():
            raise SweepError(
                f"{link} leads to {link.resolve()}, but this run reads {target}; delete the link if"
                f" both hold the same, else delete {stage.folder} to train the stage anew"
            )


def _train(stage: SweepStage) -> None:
    """Writes the bank that a stage reads, and trains the stage, unless it is finished.

    Raises `SweepError` if it was finished with other data than there is now.
    """
    content = stage.data.content()
    if (stage.folder / FINISHED).exists():
        finished = read_sealed(stage.folder / FINISHED) or {}
        if finished.get("data", content) != content:
            raise SweepError(
                f"{stage.folder} was trained on other data than {stage.data.folder} holds now;"
                " put that back, or sweep in another --workdir"
            )
        return
    if stage.bank is not None:
        assert stage.before is not None
        _write_bank(stage.config, stage.bank, stage, stage.before)
    before = None if stage.before is None else stage.before.checkpoints
    summary = train_stage(stage.config, stage.folder, init_from=before)
    figures = {"step": summary.step, "seconds": summary.seconds, "data": content}
    write_sealed(stage.folder / FINISHED, figures)


def _write_bank(config: ConfigDict, bank: Path, reader: SweepStage, writer: SweepStage) -> None:
    """Writes the bank of `reader`'s references, with the memory writer of `writer`'s checkpoint."""
    write = MemoryWriter(config, writer.folder, writer.checkpoints)
    write(References(reader.folder / "references"), bank)


def _right_answers(session: Session, questions: Sequence[Question]) -> dict[str, float]:
    """Returns `questions`, their number, and the shares whose answer is the first choice."""
    conditions = {"right_none": "none"}
    if session.config.memory.source == "precomputed":
        conditions |= {"right_memory": "memory_found", "right_wrong": "wrong"}
    report = evaluate_questions(session, questions, [*conditions.values()], new_tokens=0)
    measured = report["conditions"]
    shares = {name: measured[of]["first"]["mean"] for name, of in conditions.items()}
    return {"questions": len(questions), **shares}


def _measure(sweep: Sweep, run: SweepRun) -> dict[str, float]:
    """Evaluates a trained run; returns its figures.

    These are losses (nats per token) and accuracies on the validation rows, shares of right
    answers, bytes per memory in the bank, FLOP of training (counted), and steps of the last stage.
    """
    last, config = run.stages[-1], run.read
    assert config is not None
    if run.bank is not None:
        _write_bank(config, run.bank, last, (last.before or last) if last.bank else last)
    questions = last.data.folder / sweep.questions if sweep.questions else None
    session = Session(config, last.folder, checkpoint=last.checkpoints, bank=run.bank)
    report = evaluate_losses(session)
    losses = [key for key in report if key.startswith(("loss_", "accuracy_"))]
    figures: dict[str, float] = {key: report[key] for key in losses}
    if questions:
        figures |= _right_answers(session, read_questions(questions))
    if sweep.in_context:
        told = read_questions(last.data.folder / sweep.in_context)
        length = config.data.sequence_length
        answerer = Answerer(session.model, session.params, session.tokenizer, length)
        figures["right_in_context"] = float(np.mean(answerer.correct(told)))
    if config.memory.source != "none":
        bank = Bank.open(run.bank or open_version(last.folder).banks[0])
        figures["memory_bytes"] = bank.bytes // bank.size  # short references are padded
    figures["flops"] = sum(flops.train_step(s.config) * s.config.train.steps for s in run.stages)
    return {**figures, "steps": report["step"]}
