"""launch/write_bank.py: the writer's weights, found from a checkpoint that reads its memories."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import processes
import pytest
from memory.script_workdir import make_workdir, start

from m3jax.checkpoint import read_meta
from m3jax.memory.bank import Bank
from m3jax.text.references import References


def _script(workdir: Path, *flags: str) -> subprocess.CompletedProcess:
    return processes.finish(start(workdir, *flags))


@pytest.mark.slow
def test_memories_are_written_by_the_recorded_writer(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    fingerprint = make_workdir(workdir)

    # The continual checkpoint's own weights are others; its writer lies beside it.
    done = _script(workdir, f"--checkpoint={workdir / 'continual'}")
    assert done.returncode == 0, done.stderr
    bank, references = Bank.open(workdir / "bank"), References(workdir / "references")
    run = read_meta(workdir / "warmup" / "checkpoints" / "3")["run"]
    written = {"path": str(workdir / "warmup"), "step": 3, "run": run}
    assert bank.writer == {"hash": fingerprint, **written}
    assert bank.binding.references == references.fingerprint
    assert bank.size == len(references) > 20 and f"{bank.size} encoded" in done.stdout
    np.testing.assert_array_equal(bank.lengths, np.minimum(references.lengths, 4))

    # The default checkpoint is the warmup stage, which wrote this bank: nothing is left to do.
    done = _script(workdir)
    assert done.returncode == 0, done.stderr
    assert f"0 encoded, 0 copied, {bank.size} there before" in done.stdout

    shutil.rmtree(workdir / "warmup")
    done = _script(workdir, f"--checkpoint={workdir / 'continual'}", f"--bank={tmp_path / 'b2'}")
    assert done.returncode == 2
    assert "writer" in done.stderr and "/somewhere/else/warmup" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "b2").exists()
