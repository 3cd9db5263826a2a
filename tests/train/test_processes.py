"""Two processes of four devices train as one process of eight, also when one of them dies."""

import json
import shutil
import signal
import socket
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
from data.data_workdir import make_workdir
from tolerance import close
from train.process_run import STAGES, run_stage, stage_config

from m3jax.checkpoint import restore_params
from m3jax.cli import USER_ERROR
from m3jax.config import prefix_tokens
from m3jax.make_model import make_model
from m3jax.train.guard import read_rollbacks
from m3jax.train.metrics import read_metrics
from m3jax.watch import PROCESS_LOST

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Pair:
    """Two processes that train `stages` in `runs`; what they print, and the rows, are files there.

    Args:
      tag: part of the names of these files.
      pause: seconds before each step.
      sees: what a process has for `runs`, given its index.
    """

    def __init__(self, tag, workdir, runs, stages, pause=0.0, sees=None):
        self.tag, self.runs = tag, runs
        runs.mkdir(exist_ok=True)
        address = f"localhost:{free_port()}"
        script = str(Path(__file__).with_name("process_run.py"))
        self.processes = []
        for index in range(2):
            seen = runs if sees is None else sees(index)
            command = ["python", script, workdir, seen, tag, address, index, stages, pause]
            with open(runs / f"output-{tag}-{index}", "w") as output:
                self.processes.append(
                    processes.start(command, devices=4, stdout=output, stderr=output)
                )

    def output(self, index):
        return (self.runs / f"output-{self.tag}-{index}").read_text(errors="replace")

    def wait(self):
        """Exit codes; processes that do not end are a failure."""
        return [process.wait(timeout=processes.HANG) for process in self.processes]

    def wait_for_step(self, stage, step):
        """Returns when both processes have handed out the batch of `step`."""
        processes.wait_until(
            lambda: all(step in order(self.runs, f"{stage}-{self.tag}-{i}") for i in range(2)),
            *self.processes,
        )


def order(runs, names):
    """Row hashes by step and row, from the files `names`; all of them when a step came twice."""
    steps = {}
    for path in runs.glob(f"{names}.jsonl"):
        for text in path.read_text().splitlines():
            if text.endswith("}}"):  # not cut off by a kill
                line = json.loads(text)
                for row, value in line["rows"].items():
                    steps.setdefault(line["step"], {}).setdefault(int(row), set()).add(value)
    return steps


def losses(runs, stage):
    lines = [line for line in read_metrics(runs / stage) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 10))
    return np.array([[line["loss"], line["gradient_norm"]] for line in lines])


def evaluation(runs, stage):
    found = [line["evaluation"] for line in read_metrics(runs / stage) if "evaluation" in line]
    assert len(found) == 1
    return found[0]


def parameters(runs, stage):
    config = stage_config(stage)
    return restore_params(runs / stage, make_model(config, prefix_tokens(config)))[0]


def assert_same_parameters(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        close(one, other)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workdir")
    return make_workdir(folder, stage_config("precomputed"))


@pytest.fixture(scope="module")
def alone(workdir, tmp_path_factory):
    """The runs of this one process with its eight devices."""
    runs = tmp_path_factory.mktemp("alone")
    for stage in STAGES:
        run_stage(stage_config(stage), workdir, runs, runs / f"{stage}-alone.jsonl")
    return runs


@pytest.mark.slow
def test_two_processes_train_as_one(workdir, alone, tmp_path):
    pair = Pair("a", workdir, tmp_path / "runs", ",".join(STAGES))
    assert pair.wait() == [0, 0], pair.output(0) + pair.output(1)
    for stage in STAGES:
        close(losses(pair.runs, stage), losses(alone, stage))
        assert_same_parameters(parameters(pair.runs, stage), parameters(alone, stage))
        halves = [order(pair.runs, f"{stage}-a-{index}") for index in range(2)]
        assert {tuple(rows) for rows in halves[0].values()} == {(0, 1, 2, 3)}
        assert {tuple(rows) for rows in halves[1].values()} == {(4, 5, 6, 7)}
        both, expected = order(pair.runs, f"{stage}-a-*"), order(alone, f"{stage}-alone")
        assert all(both[step] == expected[step] for step in range(1, 10))
        assert (pair.runs / stage / "loss.png").exists()
    theirs = evaluation(alone, "warmup")
    assert evaluation(pair.runs, "warmup") == pytest.approx(theirs, rel=1e-5)
    assert "step 9/9" in pair.output(0) and "step 9/9" not in pair.output(1)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_run_goes_on(workdir, alone, tmp_path):
    stage, runs, one = "online", tmp_path / "runs", tmp_path / "one"
    pair = Pair("killed", workdir, runs, stage, pause=0.3)
    pair.wait_for_step(stage, 6)
    pair.processes[1].kill()
    assert pair.wait() == [PROCESS_LOST, -signal.SIGKILL], pair.output(0)
    words = "no sign of life from process 1 for 20 seconds"
    assert words in pair.output(0) and "The same command" in pair.output(0)
    shutil.copytree(runs, one)
    run_stage(stage_config(stage), workdir, one, one / f"{stage}-alone.jsonl")

    pair = Pair("stopped", workdir, runs, stage, pause=0.3)
    pair.wait_for_step(stage, 6)
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [0, 0], pair.output(0) + pair.output(1)
    assert "told to stop; saved at step" in pair.output(0)
    pair = Pair("last", workdir, runs, stage)
    assert pair.wait() == [0, 0], pair.output(0) + pair.output(1)
    assert "continuing from step" in pair.output(0)

    expected = order(alone, f"{stage}-alone")
    for folder in (one, runs):
        assert_same_parameters(parameters(folder, stage), parameters(alone, stage))
        close(losses(folder, stage), losses(alone, stage))
        found = order(folder, f"{stage}-*")
        assert all(found[step] == expected[step] for step in range(1, 10))


@pytest.mark.slow
def test_two_processes_go_back_together_and_a_kill_changes_nothing(workdir, tmp_path):
    """Rows of the first process alone go bad; both decide, and both go on."""
    stage, alone, runs = "guarded", tmp_path / "alone", tmp_path / "runs"
    alone.mkdir()
    run_stage(stage_config(stage), workdir, alone, alone / f"{stage}-alone.jsonl")
    expected = read_rollbacks(alone / stage)
    assert [(one["seen"], one["to"]) for one in expected] == [(5, 3)]
    pair = Pair("first", workdir, runs, stage, pause=0.3)
    pair.wait_for_step(stage, 5)
    pair.processes[0].kill()  # while, or just before, it goes back
    assert pair.wait()[1] == PROCESS_LOST, pair.output(1)
    pair = Pair("last", workdir, runs, stage)
    assert pair.wait() == [0, 0], pair.output(0) + pair.output(1)
    for ours, theirs in zip(read_rollbacks(runs / stage), expected, strict=True):
        for name in ("reason", "first", "last", "seen", "to", "skipped", "learning_rate_scale"):
            assert ours[name] == theirs[name]
    close(losses(runs, stage), losses(alone, stage))
    assert_same_parameters(parameters(runs, stage), parameters(alone, stage))


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused(workdir, tmp_path):
    def elsewhere(index):
        return tmp_path / "here" if index == 0 else tmp_path / "there"

    elsewhere(1).mkdir()
    pair = Pair("a", workdir, tmp_path / "here", "warmup", sees=elsewhere)
    assert pair.wait() == [PROCESS_LOST, USER_ERROR], pair.output(0) + pair.output(1)
    assert "process 1 does not see what process 0 writes" in pair.output(0)
    assert "CheckpointError: process 1 does not see" in pair.output(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--coordinator=localhost:PORT", "--processes=2", "--process_id=1"], "does not answer"),
        (["--coordinator=localhost:PORT", "--processes=2"], "but not --process_id"),
        (["--profile_steps=7"], "--profile_steps=7: not START:STOP"),
        (["--compilation_cache=/dev/null/x"], "--compilation_cache=/dev/null/x cannot be made: "),
    ],
)
def test_train_script_refuses_what_cannot_work(tmp_path, flags, words):
    flags = [flag.replace("PORT", str(free_port())) for flag in flags]
    command = ["python", "launch/train.py", "--config=configs/wiki_small.py"]
    command += [f"--workdir={tmp_path}", "--join_timeout=1", *flags]
    done = processes.call(command)
    assert done.returncode == USER_ERROR, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
