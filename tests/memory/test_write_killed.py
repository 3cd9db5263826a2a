"""A build killed with SIGKILL at random moments ends byte for byte as an undisturbed one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from memory.memory_tiny import big, shard_files
from quick import xla_flags

from m3jax.memory.bank import Bank

ROOT = Path(__file__).parents[2]


def _start(folder: Path, context: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-m", "memory.memory_tiny", str(folder), context],
        # Without optimization a process compiles in a fraction of the time.
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": xla_flags(1)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _shards(folder: Path) -> int:
    return sum(path.name == "0" and path.is_file() for path in folder.rglob("c/**/0"))


@pytest.mark.slow
@pytest.mark.parametrize(("context", "kills"), [("reference", 5), ("document", 2)])
def test_kills_and_a_resume(tmp_path: Path, context: str, kills: int) -> None:
    moments = random.Random(7)
    folder = tmp_path / "killed"
    reached = [0]
    for _ in range(kills):
        process = _start(folder, context)
        # Compiling takes most of a short run: wait for a shard, then for a random moment.
        while _shards(folder) == reached[-1] and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached.append(_shards(folder))
        assert not (folder / "COMPLETE").exists()
    assert reached == sorted(reached) and reached[-1] > 0
    process = _start(folder, context)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert 0 < int(out) < len(big(context)["references"])
    undisturbed = _start(tmp_path / "undisturbed", context)
    undisturbed.communicate()
    assert undisturbed.returncode == 0
    assert shard_files(folder) == shard_files(tmp_path / "undisturbed")
    assert not list(folder.rglob("*__lock*"))
    assert Bank.open(folder).verify() == []
