"""The loop: bitwise resume, SIGTERM, refusals, what it leaves behind."""

import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from quick import slow_among
from tolerance import close
from train.tiny import (
    FINGERPRINT,
    SyntheticPipeline,
    deterministic_lines,
    digest_of,
    evaluate,
    saved_state,
    tiny_config,
)

from m3jax.checkpoint import restore_params
from m3jax.config import prefix_tokens
from m3jax.errors import CheckpointError, ConfigError, DivergenceError
from m3jax.make_model import make_model
from m3jax.train.clock import Progress
from m3jax.train.hooks import parse_steps
from m3jax.train.loop import train
from m3jax.train.metrics import Metrics, read_metrics
from m3jax.train.run import StageData


class Crash(Exception):
    """Stands for a kill."""


def crash_at(at):
    def before(step):
        if step == at:
            raise Crash

    return before


def told_at(at, number):
    def before(step):
        if step == at:
            os.kill(os.getpid(), number)

    return before


def run(config, workdir, before=lambda step: None, **options):
    data = StageData(
        SyntheticPipeline(config, before),
        options.pop("evaluate", evaluate),
        options.pop("writer", None),
    )
    return train(config, workdir, data, tokenizer_fingerprint=FINGERPRINT, **options)


def outcome(config, workdir):
    return digest_of(saved_state(config, workdir)), deterministic_lines(config, workdir)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished run: its config, workdir, summary."""
    config, workdir = tiny_config(), tmp_path_factory.mktemp("undisturbed")
    return config, workdir, run(config, workdir)


def test_run_leaves_metrics_checkpoints_and_a_picture(undisturbed):
    config, workdir, summary = undisturbed
    folder = workdir / config.stage
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "evaluation" in line] == [4, 8, 12]
    last = [line for line in lines if "loss" in line][-1]
    expected = {"accuracy", "gradient_norm", "parameter_norm", "learning_rate", "tokens", "seconds"}
    assert expected | {"tokens_per_second", "flops_per_second", "data_wait_share"} <= last.keys()
    assert last["tokens"] == 12 * 8 * 16 and last["retrieval"] == {"chunks": 1}
    assert {int(path.name) for path in (folder / "checkpoints").iterdir()} == {10, 12}
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert summary.step == 12 and summary.loss == last["loss"]
    assert summary.evaluation == lines[-2]["evaluation"]


def test_a_run_says_where_its_time_went(undisturbed):
    config, workdir, summary = undisturbed
    lines = [line for line in read_metrics(workdir / config.stage) if "time" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12, 12]
    assert lines[0]["time"]["start"] > 0 and lines[1]["time"]["start"] == 0
    assert lines[2]["time"]["evaluation"] > 0 and lines[3]["time"]["evaluation"] == 0
    assert lines[3]["time"]["checkpoint"] == 0 and lines[-1]["time"]["checkpoint"] > 0
    spent = summary.time
    assert sum(line["time"]["step"] for line in lines) == pytest.approx(spent["step"])
    assert spent["goodput"] == pytest.approx(spent["step"] / spent["seconds"])
    parts = ("step", "data_wait", "checkpoint", "evaluation", "start", "lost")
    assert sum(spent[part] for part in parts) == pytest.approx(spent["seconds"], rel=0.2)


@pytest.mark.slow
def test_a_slow_pipeline_shows_as_waiting_and_a_trace_is_written(undisturbed, tmp_path, capsys):
    config, _, quick = undisturbed
    seconds = 0.3

    def before(step):
        time.sleep(seconds)

    slow = run(config, tmp_path, before, profile_steps=(5, 99))
    # Of the twelve waits the first is part of the start.
    assert slow.time["data_wait"] > seconds
    shares = [summary.time["data_wait"] / summary.time["seconds"] for summary in (slow, quick)]
    assert shares[0] > 2 * shares[1]
    assert slow.loss == quick.loss
    assert list((tmp_path / "warmup" / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert "warmup: trace in" in capsys.readouterr().err


def test_profiled_steps_are_checked(tmp_path):
    assert parse_steps("3:3") == (3, 3) and parse_steps("10:12") == (10, 12)
    for text in ("3", "0:2", "5:4", "a:b", "1:2:3", "-1:4", ""):
        with pytest.raises(ConfigError, match="not START:STOP"):
            parse_steps(text)
    with pytest.raises(ConfigError, match="13:14 begins after the last step, config.train.steps"):
        run(tiny_config(), tmp_path, profile_steps=(13, 14))
    assert not (tmp_path / "warmup" / "checkpoints").exists()


def test_finished_run_returns_at_once(undisturbed, capsys):
    config, workdir, summary = undisturbed
    again = run(config, workdir, before=crash_at(0))
    assert again == summary
    assert "finished before, at step 12" in capsys.readouterr().err


@pytest.mark.parametrize("crash", [8, pytest.param(11, marks=pytest.mark.slow)])
def test_resumed_run_is_bitwise_equal(undisturbed, tmp_path, crash):
    config, workdir, _ = undisturbed
    with pytest.raises(Crash):
        run(config, tmp_path, crash_at(crash))
    with open(tmp_path / config.stage / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a line cut off by a kill
    run(config, tmp_path)
    assert outcome(config, tmp_path) == outcome(config, workdir)


@pytest.mark.parametrize("number", slow_among([signal.SIGTERM, signal.SIGINT], [signal.SIGINT]))
def test_a_signal_saves_and_exits_cleanly(undisturbed, tmp_path, capsys, number):
    config, workdir, _ = undisturbed
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        run(config, tmp_path, told_at(7, number))
    assert caught.value.code == 0
    assert "saved at step 8 of 12" in capsys.readouterr().err
    assert signal.getsignal(number) == handler
    run(config, tmp_path)
    assert outcome(config, tmp_path) == outcome(config, workdir)


@pytest.mark.slow
def test_resumed_run_may_log_and_save_at_other_steps_on_another_mesh(undisturbed, tmp_path):
    _, workdir, _ = undisturbed
    with pytest.raises(Crash):
        run(tiny_config(), tmp_path, crash_at(6))
    other = tiny_config(mesh__fsdp=4, train__log_every=3, train__checkpoint_every=100)
    run(other, tmp_path)
    lines = [line for line in read_metrics(tmp_path / "warmup") if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 9, 12]
    ours, theirs = (saved_state(tiny_config(), path) for path in (tmp_path, workdir))
    close(ours.params["embedding"], theirs.params["embedding"], 1e-3)


def test_second_stage_starts_from_parameters_alone(undisturbed, tmp_path):
    warm, workdir, _ = undisturbed
    frozen = {"optimizer__learning_rate": 1e-30, "optimizer__weight_decay": 0.0}
    config = tiny_config(
        "precomputed", stage="continual", train__steps=1, optimizer__lr_warmup_steps=1, **frozen
    )
    writer = {"hash": "abc", "path": "warmup", "step": 12}
    run(config, tmp_path, init_from=workdir / "warmup", writer=writer, evaluate=None)
    with pytest.raises(CheckpointError, match="the writer {'hash': 'abc'"):
        saved_state(config, tmp_path)
    first = saved_state(warm, workdir)
    second, meta = restore_params(tmp_path / "continual", make_model(config, prefix_tokens(config)))
    assert meta["writer"] == writer
    for ours, theirs in zip(jax.tree.leaves(second), jax.tree.leaves(first.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_workdir_of_another_run_is_refused(undisturbed):
    _, workdir, _ = undisturbed
    before = (workdir / "warmup" / "config.json").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"config.optimizer.learning_rate is 0.001 there and 0.5 here"
    ):
        run(tiny_config(optimizer__learning_rate=0.5), workdir)
    assert (workdir / "warmup" / "config.json").read_bytes() == before


def test_other_tokenizer_is_refused(undisturbed, tmp_path):
    config, workdir, _ = undisturbed
    other = tiny_config(stage="second")
    with pytest.raises(CheckpointError, match="trained with the tokenizer 0123456789ab, .* other"):
        train(
            other,
            tmp_path,
            StageData(SyntheticPipeline(other)),
            tokenizer_fingerprint="other",
            init_from=workdir / "warmup",
        )
    assert not (tmp_path / "second" / "config.json").exists()  # the right command still works


def test_diverged_run_stops_and_names_the_last_checkpoint(tmp_path):
    config = tiny_config(train__checkpoint_every=3)
    pipeline = SyntheticPipeline(config)
    batch = pipeline.batch

    def poisoned(step):
        weights = np.full((8, 16), np.nan if step == 8 else 1, np.float32)
        return batch(step)._replace(weights=weights)

    pipeline.batch = poisoned
    with pytest.raises(DivergenceError, match="not finite at step 9 .* last checkpoint: step 6"):
        train(config, tmp_path, StageData(pipeline), tokenizer_fingerprint=FINGERPRINT)
    assert not (tmp_path / "warmup" / "checkpoints" / "9").exists()


@pytest.mark.slow
def test_every_line_has_the_shares_of_references_dropped_and_cached_since_the_line_before(tmp_path):
    class Counting(SyntheticPipeline):
        lines = iter([(0, 0), (30, 10), (30, 10), (40, 40), (40, 50), (140, 50)])

        def report(self):
            returned, dropped = next(self.lines)
            # As many memories are asked for, and found in the bank's cache or not.
            cached = {"cache_hits": returned, "cache_misses": dropped}
            return {"returned": returned, "dropped": dropped, **cached}

    config = tiny_config()
    pipeline = Counting(config, lambda step: None)
    train(config, tmp_path, StageData(pipeline), tokenizer_fingerprint=FINGERPRINT)
    lines = [line["retrieval"] for line in read_metrics(tmp_path / config.stage) if "loss" in line]
    shares = [line.get("dropped_share") for line in lines]
    assert shares == [None, 0.25, None, 0.75, 1.0, 0.0]
    assert lines[-1]["dropped"] == 50
    assert [line.get("cache_hit_share") for line in lines] == [None, 0.75, None, 0.25, 0.0, 1.0]


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in range(1, 6):
        metrics.write({"step": step, "loss": 1.0, "seconds": float(step)})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6,')
    metrics = Metrics(tmp_path, 3)
    assert metrics.seconds == 3.0
    metrics.write({"step": 4, "loss": 2.0})
    metrics.close()
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    steps = [(line["step"], line["loss"]) for line in lines]
    assert steps == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_changed_and_lost_lines_of_metrics_are_refused(tmp_path):
    path, metrics = tmp_path / "metrics.jsonl", Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": step / 4})
    metrics.close()
    whole, known = path.read_text(), metrics.checksum
    lines = whole.splitlines(keepends=True)
    assert len(read_metrics(tmp_path, known)) == 4
    for other, what in {
        whole.replace("0.25", "0.35"): "line 2 is damaged",
        whole.replace("\n", "*", 2): "line 1 is damaged",
        whole[:-1] + "*": "line 4 is damaged",
        "".join(lines[:2] + lines[3:]): "line 3 is damaged, or lines before it are missing",
        "".join(lines[:3]): "lines are missing that were written before the last checkpoint",
        "": "lines are missing",
    }.items():
        path.write_text(other)
        with pytest.raises(CheckpointError, match=rf"metrics\.jsonl: {what}.*; restore it from"):
            read_metrics(tmp_path, known)
    path.unlink()
    for _ in range(2):  # a run that goes on without them, and is killed before it saves
        Metrics(tmp_path, 3, upto=known).close()
        assert len(read_metrics(tmp_path, known)) == 1
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2)))
    assert len(read_metrics(tmp_path, known)) == 2  # of an older version


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
    progress = Progress("warmup", 1000)
    for step in range(1, 1001):
        progress.update(step, 2.5, 1234.5)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # the first and the last
    assert lines[0].startswith("warmup: step 1/1000, loss 2.500, 1,23")
    assert lines[1].startswith("warmup: step 1000/1000") and lines[1].endswith("0:00 left")
