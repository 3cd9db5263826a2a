"""launch/plan.py as a user calls it."""

import json
import re
import subprocess
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[2]
PAPER = ("--config=configs/memory3.py:stage=continual", "--topology=v5e:16x16")


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return processes.run_script("launch/plan.py", *arguments)


def test_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    flags = "--references=1.12e8", "--price_per_chip_hour=1.20", "--mfu=0.5", f"--json={file}"
    done = call(*PAPER, *flags)
    assert done.returncode == 0, done.stderr
    for words in ("45.9 TiB", "4.02 TiB", "7.17 PiB", "0.228 %", "13,388 uses", "MFU 0.5"):
        assert words in done.stdout
    # 65 536 memories a step: more than a bucket gives a host, unless they are compressed.
    assert "a bank in a bucket would slow training down: a host needs 151 MiB/s" in done.stderr
    assert "--config.writer.compression=vector needs 13.2 MiB/s" in done.stderr
    report = json.loads(file.read_text(encoding="utf-8"))
    training = report["quantities"]["training"]
    hours = training["step_time"]["value"] * 28_610 / 3600 * 256
    assert training["cost"]["value"] == pytest.approx(hours * 1.20)
    assert report["assumptions"]["mfu"] == 0.5


@pytest.mark.slow
def test_mistakes_end_with_one_message(tmp_path: Path) -> None:
    references = "--references=1e6"
    cases = {
        (*PAPER[:1], "--topology=v9:4x4", references): "chips: v4, v5e, v5p, v6e",
        (*PAPER, "--references=0"): "--references=0.0",
        (*PAPER, references, "--mfu=1.2"): "--mfu=1.2",
        (*PAPER, references, f"--json={tmp_path}"): "is a folder; name a file",
    }
    for arguments, words in cases.items():
        done = call(*arguments)
        assert done.returncode == 2 and words in done.stderr, done.stderr[-2000:]
        assert re.match("ConfigError: |CommandError: ", done.stderr), done.stderr
        assert done.stderr.count("\n") == 1
