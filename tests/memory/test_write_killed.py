"""A build killed with SIGKILL at random moments ends byte for byte as an undisturbed one."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import processes
import pytest
from memory.memory_tiny import big, shard_files

from m3jax.memory.bank import Bank

ROOT = Path(__file__).parents[2]


def _start(folder: Path, context: str) -> Any:
    return processes.start(["python", "-m", "memory.memory_tiny", folder, context], devices=1)


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
    done = processes.finish(process)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < len(big(context)["references"])
    undisturbed = processes.finish(_start(tmp_path / "undisturbed", context))
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert shard_files(folder) == shard_files(tmp_path / "undisturbed")
    assert not list(folder.rglob("*__lock*"))
    assert Bank.open(folder).verify() == []
