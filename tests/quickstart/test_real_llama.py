"""The demonstration on a brought model, with a tiny one of random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from launch.test_convert import foreign_tokenizer, random_params, small
from ml_collections import ConfigDict

from m3jax.config import validate
from m3jax.errors import HuggingFaceError
from m3jax.evaluation.question_table import evaluate_questions
from m3jax.evaluation.questions import Question
from m3jax.knowledge.versions import versions
from m3jax.model.hf import write_folder
from m3jax.quickstart import real_llama
from m3jax.quickstart.island import read_island
from m3jax.quickstart.island_training import split_questions


def get_config(options: str) -> ConfigDict:
    """The shape of `small`, whose memories keep other numbers of tokens in every head."""
    config = small(704)
    config.stage = options.removeprefix("stage=")
    config.text.vocabulary = 500
    config.model.update(tied_embeddings=True, compute_dtype="float32", param_dtype="float32")
    config.memory.update(layers=2, reference_length=64, chunk_length=64, per_prompt_chunk=2)
    config.memory.update(dtype="float32", counts="0:2+9,1:1+20", each=1)
    config.memory.selection = "reconstruction"
    config.retrieval.candidates = 8
    config.writer.batch_references = 32
    config.data.update(sequence_length=512, batch_size=8)
    if config.stage != "warmup":
        config.memory.source = "precomputed"
    if config.stage == "questions":
        config.retrieval.ids, config.data.packing = "stored", "document"
        config.data.sequence_length = 192
        config.memory.update(per_chunk=3, distractors=2, window=1, spacing=64)
        config.train.update(steps=3, checkpoint_every=1, evaluate_every=2)
        config.optimizer.update(learning_rate=1e-2, lr_warmup_steps=0)
        config.evaluation.update(batches=1, batch_size=8)
    return validate(config)


def demonstrated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, questions: int
) -> tuple[ConfigDict, dict[str, Any]]:
    """Runs the demonstration in `folder / "run"`, with weights in `folder / "llama"`; returns the
    config and the summary."""
    weights = folder / "llama"
    config = get_config("stage=warmup")
    params = random_params(config)
    params.pop("head", None)
    weights.mkdir()
    foreign_tokenizer(weights / "tokenizer.json")
    write_folder(weights, config.model, config.memory, params, tokenizer=None)

    def special(*arguments, **options):
        return import_model(
            *arguments, **options, special=["<|pad|>", "<|begin|>", "<|extra|>", "<|end|>"]
        )

    import_model = real_llama.import_model
    monkeypatch.setattr(real_llama, "import_model", special)
    workdir = folder / "run"
    return config, real_llama.run(get_config, workdir, weights=weights, questions=questions)


@pytest.mark.slow
def test_every_condition_is_asked_and_a_second_run_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, summary = demonstrated(tmp_path, monkeypatch, questions=4)
    weights, workdir = tmp_path / "llama", tmp_path / "run"
    names = {"none", "text", "memory", "wrong", "edited", "deleted"}
    for measure in ("f1", "exact_match", "nats"):
        assert set(summary[measure]) == names
        assert all(0 <= value < 20 for value in summary[measure].values())
    assert summary["nats"]["memory"] != summary["nats"]["none"] != summary["nats"]["text"]
    assert summary["questions"] == 4 and len(summary["example"]["sources"]) == 2
    assert versions(workdir) == [0, 1, 2]
    slots = 2 * (2 + 9 + 1 + 20)
    assert summary["bytes"]["memory"] == slots * config.model.head_dim * 4
    for name in ("README.md", "answers.png", "memory_heads.png"):
        assert (workdir / "report" / name).stat().st_size > 500
    written = json.loads((workdir / "report" / "summary.json").read_text())
    assert written["f1"] == summary["f1"]

    other = tmp_path / "other"
    with pytest.raises(HuggingFaceError, match="other is neither a file nor a folder"):
        real_llama.run(get_config, workdir, weights=other, questions=4)
    other.mkdir()
    with pytest.raises(HuggingFaceError, match="holds the model of .*llama, not that of"):
        real_llama.run(get_config, workdir, weights=other, questions=4)
    monkeypatch.setattr(real_llama, "evaluate_questions", None)
    again = real_llama.run(get_config, workdir, weights=weights, questions=4)
    assert again["conditions"] == summary["conditions"] and versions(workdir) == [0, 1, 2]
    assert again["training"] == {}
    with pytest.raises(TypeError):  # three questions were not asked before
        real_llama.run(get_config, workdir, weights=weights, questions=3)

    def few(questions: list[Question]) -> list[Question]:
        return as_questions(questions)[:3]

    as_questions = real_llama._as_questions
    monkeypatch.setattr(real_llama, "evaluate_questions", evaluate_questions)
    monkeypatch.setattr(real_llama, "_as_questions", few)
    report = real_llama.run(get_config, workdir, weights=weights, questions=4, train=True)
    before, after = report["training"]["before"], report["training"]["after"]
    assert all(before[name]["nats"]["mean"] != after[name]["nats"]["mean"] for name in before)
    assert "nats after" in (workdir / "report" / "README.md").read_text()


def test_questions_to_train_on_and_those_that_test_share_no_article() -> None:
    island = read_island()
    trained, tested = split_questions(island)
    assert len(trained) + len(tested) == len(island.questions) and min(map(len, (trained, tested)))
    assert not {q.reference for q in trained} & {q.reference for q in tested}


def test_answers_are_kept_for_the_same_inputs_and_damaged_ones_made_again(tmp_path: Path) -> None:
    path, made = tmp_path / "answers" / "none.json", []

    def kept(*inputs: str) -> dict[str, Any]:
        return real_llama._kept(path, inputs, lambda: made.append(inputs) or {"nats": 0.25})

    assert kept("a") == kept("a") == {"nats": 0.25} and len(made) == 1
    assert kept("b") == {"nats": 0.25} and len(made) == 2
    path.write_bytes(path.read_bytes().replace(b"0.25", b"1.25"))
    assert kept("b") == {"nats": 0.25} and len(made) == 3
