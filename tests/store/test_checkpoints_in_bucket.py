"""Checkpoints in a bucket: saved, restored and deleted by Orbax at gs://, through faults and
kills."""

import re
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from store.cloud_storage import BUCKET, CloudStorage, Fault, lose_answers, serving
from train.tiny import FINGERPRINT, tiny_config

from m3jax.checkpoint import checkpoint_folder as folder_of
from m3jax.checkpoint import checkpoint_steps, read_meta, restore_params, stage_of
from m3jax.checkpoint_folder import COMMITTED, delete_step, to_folder
from m3jax.errors import CheckpointError, StoreError
from m3jax.make_model import make_model
from m3jax.mesh import make_mesh
from m3jax.train.checkpoints import Checkpoints
from m3jax.train.state import Program

pytest.importorskip("gcsfs")
CONFIG = tiny_config(model__layers=3, train__keep_last=2)
STAGE = f"gs://{BUCKET}/run/warmup"


@pytest.fixture(scope="module")
def state():
    return Program(CONFIG, make_mesh(CONFIG)).init()


@pytest.fixture
def server() -> Iterator[CloudStorage]:
    with serving() as server:
        yield server


def save(state, *steps: int) -> None:
    checkpoints = Checkpoints(STAGE, CONFIG, FINGERPRINT)
    try:
        for step in steps:
            checkpoints.save(state, step)
            checkpoints.wait()
    finally:
        checkpoints.close()


def there(server: CloudStorage, step: int) -> set[str]:
    begin = f"run/warmup/checkpoints/{step}/"
    return {name.removeprefix(begin) for name in server.buckets[BUCKET] if name.startswith(begin)}


@pytest.mark.slow
def test_a_checkpoint_in_a_bucket_is_that_of_a_folder(server, state):
    save(state, 2, 3, 4)
    assert checkpoint_steps(STAGE) == [3, 4] and not there(server, 2)
    gone = [line for line, _ in server.requests if re.match("DELETE.*checkpoints/2/", line)]
    mark = next(i for i, line in enumerate(gone) if line.endswith("/2/commit_success.txt"))
    assert len(gone) - mark > 10
    assert str(folder_of(STAGE)) == f"{STAGE}/checkpoints/4"
    assert str(folder_of(f"{STAGE}/checkpoints/3")) == f"{STAGE}/checkpoints/3"
    assert str(stage_of(f"{STAGE}/checkpoints/3")) == STAGE
    assert read_meta(folder_of(STAGE, 3))["step"] == 3
    restored, meta = restore_params(STAGE, make_model(CONFIG, ()))
    assert meta["step"] == 4
    jax.tree.map(np.testing.assert_array_equal, restored, jax.device_get(state.params))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9 .* there are \[3, 4\]"):
        restore_params(STAGE, make_model(CONFIG, ()), step=9)
    with pytest.raises(CheckpointError, match="no checkpoint in gs://bucket1/run/nothing"):
        folder_of(f"gs://{BUCKET}/run/nothing")


def test_only_whole_checkpoints_count_and_a_deletion_begins_with_the_mark(server, state):
    save(state, 3)
    objects = server.buckets[BUCKET]
    unfinished = {name.replace("/3/", "/7/") for name in objects if COMMITTED not in name}
    objects |= {name: objects[name.replace("/7/", "/3/")] for name in unfinished}
    assert checkpoint_steps(STAGE) == [3] and folder_of(STAGE).name == "3"
    with pytest.raises(CheckpointError, match="no checkpoint in gs://bucket1/run/warmup/check"):
        folder_of(f"{STAGE}/checkpoints/7")
    server.requests.clear()
    delete_step(to_folder(f"{STAGE}/checkpoints"), 3)
    gone = [line for line, _ in server.requests if line.startswith("DELETE")]
    assert "/3/commit_success.txt" in gone[0] and not there(server, 3) and len(gone) > 5
    save(state, 7)  # what a kill has left of step 7 is in nobody's way
    assert checkpoint_steps(STAGE) == [7]


@pytest.mark.slow
def test_a_deletion_stopped_at_any_request_leaves_no_step_that_looks_whole(server, state):
    save(state, 2, 3)
    before, count = dict(server.buckets[BUCKET]), len(there(server, 2))
    for passed in range(count):
        server.buckets[BUCKET] = dict(before)
        server.faults = [
            Fault("DELETE.*checkpoints/2/", 200, times=passed),
            Fault("DELETE.*checkpoints/2/", 403, times=1e9),
        ]
        with pytest.raises(StoreError, match="access denied"):
            save(state, 4)
        server.faults = []
        whole = [2] if passed == 0 else []
        assert checkpoint_steps(STAGE) == [*whole, 3, 4]
        assert there(server, 2)
        for step in checkpoint_steps(STAGE):
            restore_params(STAGE, make_model(CONFIG, ()), step)
        Checkpoints(STAGE, CONFIG, FINGERPRINT).close()
        assert checkpoint_steps(STAGE) == [3, 4] and not there(server, 2)


@pytest.mark.slow
def test_a_save_survives_failing_requests_and_cut_uploads(server, state):
    server.faults = [
        Fault("run/warmup", 503, times=1e9, share=0.15),
        Fault("POST.*run/warmup", cut=50, times=1e9, share=0.1),
    ]
    save(state, 1)
    restored, _ = restore_params(STAGE, make_model(CONFIG, ()))
    jax.tree.map(np.testing.assert_array_equal, restored, jax.device_get(state.params))


@pytest.mark.slow
def test_a_save_survives_the_loss_of_every_first_answer(server, state, monkeypatch):
    lose_answers(server, monkeypatch)
    save(state, 1)
    restored, _ = restore_params(STAGE, make_model(CONFIG, ()))
    jax.tree.map(np.testing.assert_array_equal, restored, jax.device_get(state.params))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["state/(d|ocdbt)", "commit_success|_METADATA"])
@pytest.mark.parametrize(
    ("status", "remedy"), [(503, "Run the same command again"), (403, "access denied. Give this")]
)
def test_what_lasts_is_one_sentence_in_bounded_time(server, state, what, status, remedy):
    save(state, 1)
    server.faults = [Fault(f"POST.*checkpoints/2/({what})", status, times=1e9)]
    begun = time.monotonic()
    with pytest.raises(StoreError, match=remedy) as caught:
        save(state, 2)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(STAGE)
    assert time.monotonic() - begun < 100
    server.faults = [Fault("GET.*checkpoints/1/", status, times=1e9)]
    with pytest.raises(StoreError, match=remedy):
        restore_params(STAGE, make_model(CONFIG, ()))
    assert time.monotonic() - begun < 200
    server.faults = []
    assert checkpoint_steps(STAGE) == [1]
    save(state, 2)
    assert checkpoint_steps(STAGE) == [1, 2]
