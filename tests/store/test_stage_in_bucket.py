"""A stage in a bucket, in this process: stopped here, it goes on elsewhere as if it never was."""

import time
from pathlib import Path

import pytest
from store.cloud_storage import BUCKET, CloudStorage, Fault
from train.guarded import BAD, guarded_config, guarded_run
from train.test_loop import Crash, crash_at
from train.tiny import (
    FINGERPRINT,
    SyntheticPipeline,
    deterministic_lines,
    digest_of,
    evaluate,
    saved_state,
    tiny_config,
)

from m3jax.checkpoint import checkpoint_steps
from m3jax.errors import CheckpointError, StoreError
from m3jax.mirror import Mirror
from m3jax.train import stage_files
from m3jax.train.guard import read_rollbacks
from m3jax.train.loop import train
from m3jax.train.metrics import read_metrics
from m3jax.train.run import StageData
from m3jax.train.stage_files import StageFiles

pytest.importorskip("gcsfs")
pytestmark = pytest.mark.slow
URL = f"gs://{BUCKET}/run"


def on(cache: Path) -> Path:
    """Returns the mirror of the bucket on a machine with its own cache."""
    return Mirror(URL, cache).local


def run(workdir: Path, before=lambda step: None, **changes):
    config = tiny_config(**changes)
    data = StageData(SyntheticPipeline(config, before), evaluate)
    return train(config, workdir, data, tokenizer_fingerprint=FINGERPRINT)


def outcome(config, workdir: Path) -> tuple:
    return deterministic_lines(config, workdir), digest_of(saved_state(config, workdir))


def test_a_run_goes_on_elsewhere_bitwise(quick_server: CloudStorage, tmp_path):
    summary = run(tmp_path / "local")
    with pytest.raises(Crash):
        run(on(tmp_path / "a"), crash_at(8))
    assert checkpoint_steps(f"{URL}/warmup") == [5]
    there = run(on(tmp_path / "b"))
    assert there.checkpoint == f"{URL}/warmup/checkpoints/12" and there.loss == summary.loss
    expected = outcome(tiny_config(), tmp_path / "local")
    assert outcome(tiny_config(), on(tmp_path / "b")) == expected
    lines = quick_server.buckets[BUCKET]["run/warmup/metrics.jsonl"].data
    assert lines == (on(tmp_path / "b") / "warmup" / "metrics.jsonl").read_bytes()
    again = run(on(tmp_path / "c"))  # finished before
    assert again.loss == summary.loss and again.evaluation == summary.evaluation
    with pytest.raises(CheckpointError, match=f"^{URL}/warmup belongs to another run: config.seed"):
        run(on(tmp_path / "d"), seed=7)


def test_rollbacks_are_known_elsewhere(quick_server, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_files, "_PART", 2000)  # metrics in parts, some of them cut back
    config = guarded_config()
    guarded_run(config, tmp_path / "local", BAD)
    with pytest.raises(Crash):  # right after the first rollback
        guarded_run(config, on(tmp_path / "a"), BAD, crash_at(16))
    guarded_run(config, on(tmp_path / "b"), BAD)
    rollbacks = read_rollbacks(tmp_path / "local" / config.stage)
    assert read_rollbacks(on(tmp_path / "b") / config.stage) == rollbacks and len(rollbacks) == 2
    assert outcome(config, on(tmp_path / "b")) == outcome(config, tmp_path / "local")
    assert any("metrics.jsonl.00002-" in name for name in quick_server.buckets[BUCKET])
    (on(tmp_path / "c") / config.stage).mkdir(parents=True)
    StageFiles(on(tmp_path / "c") / config.stage).take("metrics.jsonl")
    lines = [read_metrics(on(tmp_path / name) / config.stage) for name in "bc"]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("status", [503, 403])
def test_a_bucket_that_is_lost_ends_a_run_and_loses_nothing(quick_server, tmp_path, status):
    def lose(step: int) -> None:
        if step == 7:
            while checkpoint_steps(f"{URL}/warmup") != [5]:  # which is written in the background
                time.sleep(0.05)
            quick_server.faults = [Fault(".", status, times=1e9)]

    with pytest.raises(StoreError, match=f"^{URL}/warmup") as caught:
        run(on(tmp_path / "a"), lose)
    assert "\\n" not in str(caught.value)
    quick_server.faults = []
    assert checkpoint_steps(f"{URL}/warmup") == [5]
    run(on(tmp_path / "a"))
    run(tmp_path / "local")
    expected = outcome(tiny_config(), tmp_path / "local")
    assert outcome(tiny_config(), on(tmp_path / "a")) == expected


def test_a_silent_server_is_asked_again(quick_server, tmp_path):
    begun = time.monotonic()
    quick_server.faults = [Fault("POST.*upload_id", 0, delay=300), Fault("GET.*/5/", 0, delay=20)]
    run(on(tmp_path / "a"))
    assert 12 in checkpoint_steps(f"{URL}/warmup") and not any(f.times for f in quick_server.faults)
    assert 15 < time.monotonic() - begun < 120
