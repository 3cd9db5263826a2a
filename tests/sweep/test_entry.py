"""One run of a sweep: the folders of its stages, what is measured."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest
from data.data_workdir import WORLD, make_workdir, tiny_config

from m3jax.checkpoint import seal
from m3jax.config import PREFIX_TOKENS, to_json
from m3jax.data.pipeline import open_pipeline
from m3jax.errors import SweepError
from m3jax.evaluation.questions import read_questions
from m3jax.evaluation.scoring import Answerer
from m3jax.files import write_sealed
from m3jax.inference import session
from m3jax.make_model import make_model
from m3jax.quickstart import people
from m3jax.sweep import entry
from m3jax.sweep.spec import Entry, Sweep, SweepData, SweepRun, SweepStage
from m3jax.text.tokenizer import Tokenizer
from m3jax.train.evaluator import LossEvaluator

CONFIG = tiny_config()


def test_a_link_to_another_bank_is_refused(tmp_path: Path) -> None:
    data = SweepData(tmp_path / "data", None, "")
    warmup = SweepStage(
        tmp_path / "stages" / "first", tiny_config(stage="warmup"), data, None, None
    )
    bank = tmp_path / "banks" / "new"
    stage = SweepStage(tmp_path / "stages" / "second", CONFIG, data, warmup, bank)
    run = SweepRun(Entry("a"), 0, tmp_path / "result.json", (warmup, stage))
    sweep = Sweep("config.py", [run.entry])
    for _ in range(2):  # made, and found again
        entry.prepare(sweep, run)
    link = stage.folder / "bank"
    assert link.resolve() == bank and link.readlink() == Path("../../banks/new")

    moved = tmp_path / "moved"
    moved.symlink_to(tmp_path)
    through = dataclasses.replace(stage, bank=moved / "banks" / "new")
    entry.prepare(sweep, dataclasses.replace(run, stages=(through,)))

    old = tmp_path / "banks" / "old"
    link.unlink()
    link.symlink_to("../../banks/old")
    entry.prepare(sweep, run)  # nothing is there
    assert link.resolve() == bank

    old.mkdir(parents=True)
    link.unlink()
    link.symlink_to("../../banks/old")
    with pytest.raises(SweepError) as refused:
        entry.prepare(sweep, run)
    for words in (f"{link} leads to {old}", f"reads {bank}", f"delete {stage.folder}"):
        assert words in str(refused.value)
    assert link.resolve() == old


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared workdir with a checkpoint of random weights, and questions."""
    folder = make_workdir(tmp_path_factory.mktemp("entry"), CONFIG)
    checkpoint = folder / CONFIG.stage / "checkpoints" / "4"
    params = jax.jit(make_model(CONFIG, PREFIX_TOKENS).init)(jax.random.key(1))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(checkpoint / "state", args=ocp.args.PyTreeSave({"params": params}))
    tokenizer = Tokenizer.load(folder / "tokenizer").fingerprint
    meta = {"config": json.loads(to_json(CONFIG)), "tokenizer": tokenizer, "step": 4}
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(checkpoint / "meta", args=ocp.args.JsonSave({**meta, "writer": None}))
    seal(checkpoint)
    asked = [{"prompt": q.prompt, "answer": q.answer} for q in people.questions(WORLD, 0)[:4]]
    people.write_jsonl(folder / "asked.jsonl", asked)
    return folder


@pytest.mark.slow
def test_a_run_is_measured_with_one_restored_checkpoint(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restored = []
    restore = session.restore_params

    def counted(*args: Any, **more: Any) -> Any:
        restored.append(restore(*args, **more))
        return restored[-1]

    monkeypatch.setattr(session, "restore_params", counted)
    data = SweepData(workdir, None, "")
    stage = SweepStage(workdir, CONFIG, data, None, workdir / "bank")
    run = SweepRun(Entry("a"), 0, workdir / "result.json", (stage,), CONFIG)
    asked = {"questions": "asked.jsonl", "in_context": "asked.jsonl"}
    figures = entry._measure(Sweep("config.py", [run.entry], **asked), run)
    ((params, _),) = restored

    pipeline = open_pipeline(CONFIG, workdir, split="validation")
    losses = LossEvaluator(CONFIG, pipeline)(params)
    assert losses.items() <= figures.items()
    of = make_model(CONFIG, PREFIX_TOKENS), params, pipeline.tokenizer
    answerer = Answerer(*of, CONFIG.data.sequence_length)
    right = answerer.correct(read_questions(workdir / "asked.jsonl")).mean()
    assert figures["right_in_context"] == figures["right_none"] == right
    assert {"right_memory", "right_wrong"} <= set(figures)
    assert (figures["questions"], figures["steps"]) == (4, 4)


def test_a_stage_that_was_trained_on_other_data_is_refused(workdir: Path, tmp_path: Path) -> None:
    data = SweepData(workdir, None, "")
    stage = SweepStage(tmp_path, CONFIG, data, None, None)
    write_sealed(tmp_path / entry.FINISHED, {"step": 4, "data": data.content()})
    entry._train(stage)  # finished before
    write_sealed(tmp_path / entry.FINISHED, {"step": 4, "data": "another"})
    with pytest.raises(SweepError, match=f"{tmp_path} was trained on other data than {workdir}"):
        entry._train(stage)
