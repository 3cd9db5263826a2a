"""A training process killed at random moments ends bitwise equal to an undisturbed one."""

import random
import time
from pathlib import Path

import processes
import pytest
from train.guarded import guarded_config
from train.tiny import deterministic_lines, process_config

from m3jax.train.guard import read_rollbacks

ROOT = Path(__file__).parents[2]


def start(workdir, pause, compiled=None, script="tiny.py"):
    command = ["python", Path(__file__).with_name(script), workdir, pause]
    cache = {} if compiled is None else {"JAX_COMPILATION_CACHE_DIR": compiled}
    return processes.start(command, env=cache)


def finish(process):
    """The digest of the final state that the process prints."""
    done = processes.finish(process)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


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
        processes.wait_until(
            lambda watched=watched, before=before: changed(watched) > before, process
        )
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
            processes.wait_until(lambda before=before: changed(metrics) > before, process)
            time.sleep(chance.uniform(0.0, 0.5))
            if moment == "saving":
                processes.wait_until(lambda: saving(workdir), process)
                time.sleep(chance.uniform(0.0, 0.05))
        process.kill()
        process.communicate()
    assert finish(start(workdir, 0.0)) == expected
    config = process_config()
    assert deterministic_lines(config, workdir) == deterministic_lines(
        config, tmp_path / "undisturbed"
    )
    assert not saving(workdir)
