"""A training process killed at random moments ends bitwise equal to an undisturbed one."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train.guarded import guarded_config
from train.tiny import deterministic_lines, process_config

from m3jax.train.guard import read_rollbacks

ROOT = Path(__file__).parents[2]
DEADLINE = 300.0  # seconds


def start(workdir, pause, compiled=None, script="tiny.py"):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    if compiled is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
    command = [sys.executable, str(Path(__file__).with_name(script)), str(workdir), str(pause)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """The digest of the final state that the process prints."""
    output, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors
    return output.strip()


def wait_for(process, happened):
    end = time.monotonic() + DEADLINE
    while process.poll() is None and time.monotonic() < end and not happened():
        time.sleep(0.0005)
    assert process.poll() is None, f"ended before it could be killed: {process.stderr.read()}"


def changed(path):
    """When a file was last written to, 0 if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


def saving(workdir):
    """Whether a checkpoint is being written."""
    folder = workdir / "warmup" / "checkpoints"
    return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())


@pytest.mark.slow
def test_killed_guarded_run_ends_bitwise_equal(tmp_path):
    """Killed while it goes back (guard.json is new), at random moments after, and in between."""
    expected = finish(start(tmp_path / "whole", 0.0, tmp_path / "compiled", "guarded.py"))
    workdir, chance = tmp_path / "killed", random.Random(0)
    decided, metrics = (workdir / "warmup" / name for name in ("guard.json", "metrics.jsonl"))
    for watched, longest in ((decided, 0.02), (decided, 0.3), (metrics, 0.5), (metrics, 1.0)):
        before = changed(watched)
        process = start(workdir, 0.05, script="guarded.py")
        wait_for(process, lambda watched=watched, before=before: changed(watched) > before)
        time.sleep(chance.uniform(0.0, longest))
        process.kill()
        process.communicate()
    assert finish(start(workdir, 0.0, script="guarded.py")) == expected
    config = guarded_config("online")
    assert len(read_rollbacks(workdir / "warmup")) == 2
    assert read_rollbacks(workdir / "warmup") == read_rollbacks(tmp_path / "whole" / "warmup")
    lines = [deterministic_lines(config, tmp_path / name) for name in ("killed", "whole")]
    assert lines[0] == lines[1] and not saving(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_killed_run_ends_bitwise_equal(tmp_path, seed):
    # The undisturbed run compiles for itself, the others load what the first of them compiled.
    expected = finish(start(tmp_path / "undisturbed", 0.0, tmp_path / "compiled"))
    workdir, chance = tmp_path / "killed", random.Random(seed)
    metrics = workdir / "warmup" / "metrics.jsonl"
    moments = ["running", "saving", "running", "saving", "starting"]
    for moment in moments:
        before = changed(metrics)
        process = start(workdir, 0.03)
        if moment == "starting":
            time.sleep(chance.uniform(0.5, 4.0))
        else:
            wait_for(process, lambda before=before: changed(metrics) > before)
            time.sleep(chance.uniform(0.0, 0.5))
            if moment == "saving":
                wait_for(process, lambda: saving(workdir))
                time.sleep(chance.uniform(0.0, 0.05))
        process.kill()
        process.communicate()
    assert finish(start(workdir, 0.0)) == expected
    config = process_config()
    assert deterministic_lines(config, workdir) == deterministic_lines(
        config, tmp_path / "undisturbed"
    )
    assert not saving(workdir)
