"""Log-probabilities of the base model: computed once, resumed, refused if they do not fit."""

import hashlib
import socket
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
from data.data_workdir import WORLD, make_workdir, tiny_config
from tolerance import close

from m3jax.checkpoint import restore_params
from m3jax.config import PREFIX_TOKENS
from m3jax.data import rows
from m3jax.data.pipeline import Pipeline, open_pipeline
from m3jax.errors import CheckpointError
from m3jax.make_model import make_model
from m3jax.mesh import make_mesh
from m3jax.quickstart import people
from m3jax.text.chat.corpus import prepare_chats
from m3jax.train import dpo_base, loop
from m3jax.train.dpo_base import hold_base_logprobs, load
from m3jax.train.evaluator import evaluator
from m3jax.train.loop import train
from m3jax.train.metrics import read_metrics
from m3jax.train.run import StageData

SETTINGS = {
    "data__batch_size": 2,
    "evaluation__batch_size": 2,
    "retrieval__ids": "stored",
    "chat__user": "\nQ",
    "chat__assistant": "\nA",
    "train__steps": 6,
    "train__log_every": 2,
    "train__checkpoint_every": 3,
    "train__evaluate_every": 3,
    "mesh__fsdp": 1,
    "preference__beta": 0.5,
    "optimizer__learning_rate": 3e-3,
}


def config_of(kind, **changes):
    packing = {"sft": "chats", "dpo": "pairs"}[kind]
    return tiny_config(**{**SETTINGS, "stage": kind, "data__packing": packing} | changes)


def run(config, workdir, init_from, **options):
    """As launch/train.py does it."""
    mesh = make_mesh(config, jax.devices()[:1])
    pipeline, evaluate = open_pipeline(config, workdir), evaluator(config, workdir, mesh=mesh)
    if config.data.packing == "pairs":
        both = {"train": pipeline, "validation": evaluate.pipeline}
        hold_base_logprobs(config, workdir / config.stage, both, init_from, mesh)
    return train(
        config,
        workdir,
        StageData(pipeline, evaluate, pipeline.bank.writer),
        init_from=init_from,
        tokenizer_fingerprint=pipeline.tokenizer.fingerprint,
        **options,
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir whose stage `sft` is trained."""
    folder = tmp_path_factory.mktemp("aligned")
    sft, dpo = config_of("sft"), config_of("dpo")
    make_workdir(folder, sft)
    people.write_jsonl(folder / "chats.jsonl", people.chats(WORLD, 0, 40))
    people.write_jsonl(folder / "pairs.jsonl", people.preferences(WORLD, 0, 60))
    prepare_chats(sft, folder, str(folder / "chats.jsonl"))
    prepare_chats(dpo, folder, str(folder / "pairs.jsonl"))
    first = run(sft, folder, None)
    assert first.step == 6 and "loss_memory" in first.evaluation
    return folder


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def hold(config, workdir, stage_folder, init_from="sft", devices=1):
    mesh = make_mesh(config, jax.devices()[:devices])
    pipelines = {"train": open_pipeline(config, workdir)}
    base = None if init_from is None else workdir / init_from
    hold_base_logprobs(config, stage_folder, pipelines, base, mesh)
    return pipelines["train"].base_logprobs


@pytest.mark.slow
def test_a_finished_store_with_other_values_or_rows_is_refused(workdir, tmp_path, monkeypatch):
    config, folder = config_of("dpo"), tmp_path / "dpo"
    stored = folder / "base_logprobs" / "train" / "logprobs.npy"
    values = hold(config, workdir, folder)
    gap = values.copy()
    gap[3, 0] = np.nan
    flipped = values.copy()
    flipped.view(np.uint8)[5, 0] ^= 1  # a finite value of another size
    for other in (values[1:], values[:, 1:], gap, flipped):
        np.save(stored, other)
        for init_from in ("sft", None):
            with pytest.raises(CheckpointError, match=r"train is damaged \(.*\); .*move it elsew"):
                hold(config, workdir, folder, init_from)
    np.save(stored, values)
    pack = rows.pack
    with monkeypatch.context() as patch:  # as many rows and slots
        patch.setattr(rows, "pack", lambda *given: pack(*given)[::-1])
        with pytest.raises(CheckpointError, match="belong to another packing plan"):
            hold(config, workdir, folder)
    np.testing.assert_array_equal(hold(config, workdir, folder), values)


def test_a_base_model_with_values_that_are_not_finite_is_refused(workdir, tmp_path, monkeypatch):
    config, folder = config_of("dpo"), tmp_path / "dpo"
    logprobs = dpo_base.answer_logprobs
    monkeypatch.setattr(
        dpo_base, "answer_logprobs", lambda *given: logprobs(*given).at[1].set(np.nan)
    )
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"not finite \(step 6, .*another --workd"):
            hold(config, workdir, folder)


@pytest.mark.slow
def test_other_processes_open_no_file_and_meet_as_often(workdir, tmp_path, monkeypatch):
    """The other has no stage folder, and gets what process 0 hands out; faked one after another."""
    config, handed, met = config_of("dpo"), [], []
    monkeypatch.setattr(dpo_base, "meet", met.append)
    broadcast = dpo_base.multihost_utils.broadcast_one_to_all

    def hand_out(value):
        handed.append(broadcast(value))
        return handed[-1]

    def take(value):
        assert np.shape(value) == np.shape(handed[0])
        return handed.pop(0)

    def as_both(init_from):
        with monkeypatch.context() as patch:
            patch.setattr(dpo_base.multihost_utils, "broadcast_one_to_all", hand_out)
            first = hold(config, workdir, tmp_path / "dpo", init_from)
            meetings = list(met)
            met.clear()
            patch.setattr(dpo_base.multihost_utils, "broadcast_one_to_all", take)
            patch.setattr(jax, "process_index", lambda *backend: 1)
            np.testing.assert_array_equal(
                hold(config, workdir, tmp_path / "other", init_from), first
            )
        assert met == meetings and not handed and not (tmp_path / "other").exists()
        met.clear()

    as_both("sft")  # computes
    as_both("sft")  # everything is stored
    (tmp_path / "dpo" / "checkpoints" / "3").mkdir(parents=True)
    as_both(None)  # the base model is not needed


@pytest.mark.slow
def test_two_processes_compute_as_one(workdir, tmp_path):
    config = config_of("dpo")
    with socket.socket() as probe:
        probe.bind(("", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    script = str(Path(__file__).with_name("dpo_base_run.py"))
    pair = [
        processes.start(["python", script, workdir, tmp_path / f"stage{i}", address, i], devices=1)
        for i in range(2)
    ]
    done = [processes.finish(one) for one in pair]
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    first, other = (np.load(tmp_path / f"stage{i}.npy") for i in range(2))
    np.testing.assert_array_equal(first, other)
    assert (tmp_path / "stage0").exists() and not (tmp_path / "stage1").exists()
    close(first, hold(config, workdir, tmp_path / "one"))


@pytest.mark.slow
def test_a_killed_computation_goes_on_to_the_same_bytes(workdir, tmp_path, monkeypatch):
    config = config_of("dpo")
    flushed, flush = [], np.memmap.flush
    with monkeypatch.context() as patch:
        patch.setattr(
            np.memmap,
            "flush",
            lambda self: (
                (self.ndim == 2 and flushed.append(np.isfinite(self).all(axis=1).sum()))
                or flush(self)
            ),  # not of the rows' checksums
        )
        whole = hold(config, workdir, tmp_path / "whole")
    assert len(whole) > 16
    assert flushed == [*range(16, len(whole) + 1, 16), len(whole)]  # every 8 batches, and all
    computed, read = [], Pipeline.read

    def dying(self, rows):
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(rows)
        return read(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "read", dying)
        with pytest.raises(KeyboardInterrupt):
            hold(config, workdir, tmp_path / "cut")
    folders = [tmp_path / name / "base_logprobs" / "train" for name in ("cut", "whole")]
    left = np.isnan(np.load(folders[0] / "logprobs.npy")).all(axis=1)
    assert not left[:6].any() and left[6:].all()
    computed = []
    with monkeypatch.context() as patch:
        patch.setattr(
            Pipeline, "read", lambda self, rows: computed.append(rows) or read(self, rows)
        )
        resumed = hold(config, workdir, tmp_path / "cut")
    assert computed[0].tolist() == [6, 7]  # the others are not computed again
    assert hashes(folders[0]) == hashes(folders[1])
    np.testing.assert_array_equal(resumed, whole)
    pairs = np.array([len(group) for group in open_pipeline(config, workdir).rows.plan])
    assert ((whole < 0).sum(axis=1) == 2 * pairs).all()


@pytest.mark.slow
def test_another_checkpoint_or_other_data_are_refused_by_name(workdir, tmp_path):
    config, folder = config_of("dpo"), tmp_path / "dpo"
    hold(config, workdir, folder)
    other_blocks = config_of("dpo", model__attention_block=3, model__attention_kv_block=7)
    hold(other_blocks, workdir, folder)  # the same attention
    with pytest.raises(CheckpointError, match=r"belong to another base model: .* --workdir"):
        hold(config, workdir, folder, "sft/checkpoints/3")
    with pytest.raises(CheckpointError, match=r"another config"):
        hold(config_of("dpo", memory__window=2), workdir, folder)
    no_memory = config_of("dpo", memory__source="none", retrieval__ids="search")
    with pytest.raises(CheckpointError, match="another config"):
        hold(no_memory, workdir, folder)
    pipeline = open_pipeline(config, workdir)
    with pytest.raises(CheckpointError, match="another pairs: "):
        load(folder / "base_logprobs" / "train", {"pairs": "other"})
    stored = folder / "base_logprobs" / "train" / "logprobs.npy"
    stored.write_bytes(stored.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"train is damaged \(logprobs.npy: .*; restore"):
        hold(config, workdir, folder)
    mesh = make_mesh(config, jax.devices()[:1])
    with pytest.raises(CheckpointError, match="--init_from"):
        hold_base_logprobs(config, tmp_path / "new", {"train": pipeline}, None, mesh)


@pytest.mark.slow
def test_dpo_trains_resumes_and_keeps_one_copy_of_the_weights(workdir, monkeypatch):
    """In every step: parameters and the two moments of Adam, and nothing else of their shape.

    (While a checkpoint is written in the background, as in every stage, there are copies of all.)
    """
    config = config_of("dpo", train__checkpoint_every=10)
    shape = make_model(config, PREFIX_TOKENS).abstract()[0]["embedding"].shape
    held = []
    settle = loop.Loop._settle

    def count(self):
        held.append(sum(x.shape == shape for x in jax.live_arrays()))
        return settle(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_settle", count)
        before = sum(x.shape == shape for x in jax.live_arrays())
        summary = run(config, workdir, workdir / "sft")
    assert held and max(held) - before == 3
    assert summary.evaluation["gain_chosen"] != 0
    evaluate = evaluator(config, workdir)
    folder = workdir / "dpo" / "base_logprobs" / "validation"
    evaluate.pipeline.base_logprobs = load(folder, {})
    same = evaluate(restore_params(workdir / "sft", make_model(config, PREFIX_TOKENS))[0])
    assert same["loss"] == pytest.approx(np.log(2))
    close(same["gain_chosen"], 0.0, size=np.abs(evaluate.pipeline.base_logprobs).max())
    lines = [line for line in read_metrics(workdir / "dpo") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    # Again: finished, and neither the base model nor its log-probabilities are computed.
    run(config, workdir, None)


def test_a_stage_that_reads_another_writer_is_not_a_start(workdir):
    config = config_of("sft", stage="other")
    pipeline = open_pipeline(config, workdir)
    other = {"hash": "0" * 32, "path": "/nowhere", "step": 1}
    with pytest.raises(CheckpointError, match="use the bank that the checkpoint has read"):
        train(
            config,
            workdir,
            StageData(pipeline, writer=other),
            init_from=workdir / "sft",
            tokenizer_fingerprint=pipeline.tokenizer.fingerprint,
        )
