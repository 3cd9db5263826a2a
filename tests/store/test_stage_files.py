"""Small files of a stage: copied to the bucket, taken from it elsewhere, one writer at a time."""

from pathlib import Path

import pytest
from store.cloud_storage import BUCKET, Fault

from m3jax import checkpoint_folder
from m3jax.checkpoint_folder import to_folder
from m3jax.errors import StoreError
from m3jax.mirror import Mirror
from m3jax.train import stage_files
from m3jax.train.metrics import Metrics, read_metrics
from m3jax.train.stage_files import StageFiles

URL = f"gs://{BUCKET}/run"


def stage(cache: Path) -> StageFiles:
    """Returns the files of the stage `warmup` on a machine with its own cache."""
    return StageFiles(Mirror(URL, cache).local / "warmup")


def write(files: StageFiles, name: str, text: str) -> None:
    path = files.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def posts(server) -> list[str]:
    return [line.partition("name=")[2] for line, _ in server.requests if line.startswith("POST")]


def test_files_are_copied_when_they_change_and_taken_elsewhere(quick_server, tmp_path):
    first, second = stage(tmp_path / "a"), stage(tmp_path / "b")
    assert first.place == f"{URL}/warmup"
    write(first, "metrics.jsonl", "one\n")
    write(first, "tensorboard/events.1", "event")
    first.put("metrics.jsonl", "tensorboard", "config.json")
    assert posts(quick_server) == ["run/warmup/metrics.jsonl", "run/warmup/tensorboard/events.1"]
    first.put("metrics.jsonl", "tensorboard")
    assert len(posts(quick_server)) == 2
    write(first, "metrics.jsonl", "one\ntwo\n")
    first.put("metrics.jsonl", "tensorboard")
    assert len(posts(quick_server)) == 3
    write(second, "guard.json", "of a stage that was deleted")
    second.take("metrics.jsonl", "guard.json")
    assert (second.folder / "metrics.jsonl").read_text() == "one\ntwo\n"
    assert not (second.folder / "guard.json").exists()
    second.put("metrics.jsonl")  # which came from there
    assert len(posts(quick_server)) == 3
    second.delete("metrics.jsonl")
    assert [*quick_server.buckets[BUCKET]] == ["run/warmup/tensorboard/events.1"]


def test_of_long_metrics_the_end_is_copied_and_parts_never_mix(quick_server, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_files, "_PART", 100)
    name, lines = "metrics.jsonl", [f'{{"step": {i}}}\n' for i in range(60)]
    first, objects = stage(tmp_path / "a"), quick_server.buckets[BUCKET]

    def there(cache: str) -> str:
        other = stage(tmp_path / cache)
        other.take(name)
        return (other.folder / name).read_text()

    for stop in (1, 8, 9, 20, 60):  # 13 bytes a line
        write(first, name, "".join(lines[:stop]))
        quick_server.requests.clear()
        first.put(name)
        assert there("b") == "".join(lines[:stop])
        assert posts(quick_server)[-1] == f"run/warmup/{name}"
    assert len(posts(quick_server)) == 1 + 5 and len(objects) == 1 + 7  # of 770 bytes
    size = len(objects[f"run/warmup/{name}"].data)
    quick_server.requests.clear()
    write(first, name, "".join(lines) + "x")
    first.put(name)
    assert posts(quick_server) == [f"run/warmup/{name}"]  # nothing but the end
    assert len(objects[f"run/warmup/{name}"].data) == size + 1
    second = stage(tmp_path / "b")  # goes on from an earlier checkpoint, with other lines
    second.take(name)
    cut = "".join(lines[:30]) + "other\n" * 30
    write(second, name, cut)
    quick_server.faults = [Fault(f"POST.*{name}$", 403, times=1e9)]
    with pytest.raises(StoreError):  # killed before the end is there
        second.put(name)
    quick_server.faults = []
    assert there("c") == "".join(lines) + "x"
    third = stage(tmp_path / "c")
    write(third, name, cut)
    third.put(name)
    assert there("d") == cut and len(objects) == 1 + (len(cut) - 1) // 100
    write(third, name, "short\n")
    third.put(name)
    assert there("d") == "short\n" and [*objects] == [f"run/warmup/{name}"]


def test_long_metrics_that_were_copied_by_other_means_are_read(quick_server, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_files, "_PART", 100)
    files = stage(tmp_path / "a")
    files.folder.mkdir(parents=True)
    metrics = Metrics(files.folder, 0)
    for step in range(1, 10):
        metrics.write({"step": step, "loss": 1.0})
    metrics.close()
    files.put("metrics.jsonl")
    names = {name: stored.data for name, stored in quick_server.buckets[BUCKET].items()}
    for name, data in names.items():
        (tmp_path / Path(name).name).write_bytes(data)
    assert len(names) > 4 and read_metrics(tmp_path) == read_metrics(files.folder)
    missing = next(tmp_path.glob("metrics.jsonl.00001-*"))
    missing.unlink()
    with pytest.raises(StoreError, match=f"{missing.name} is missing; copy it from"):
        read_metrics(tmp_path)


def test_between_checkpoints_a_copy_a_minute_that_may_fail(quick_server, tmp_path, monkeypatch):
    files = stage(tmp_path)
    write(files, "metrics.jsonl", "one\n")
    files.put_at_times("metrics.jsonl")
    assert not posts(quick_server)
    monkeypatch.setattr(stage_files, "_EVERY", 0.0)
    quick_server.faults = [Fault("POST", 503, times=1e9)]
    files.put_at_times("metrics.jsonl")
    with pytest.raises(StoreError, match="Run the same command again"):
        files.put("metrics.jsonl")
    quick_server.faults = []
    files.put_at_times("metrics.jsonl")
    assert [*quick_server.buckets[BUCKET]] == ["run/warmup/metrics.jsonl"]


def test_of_a_local_workdir_nothing_is_copied(quick_server, tmp_path):
    files = StageFiles(tmp_path / "warmup")
    write(files, "metrics.jsonl", "one\n")
    for call in (files.take, files.put, files.put_at_times):
        call("metrics.jsonl")
    assert (files.folder / "metrics.jsonl").read_text() == "one\n"
    files.delete("metrics.jsonl")
    assert not (files.folder / "metrics.jsonl").exists() and not quick_server.requests
    assert files.place == tmp_path / "warmup"


def test_a_folder_of_a_mirror_is_that_of_the_bucket(quick_server, tmp_path):
    pytest.importorskip("gcsfs")
    local = Mirror(URL, tmp_path).local
    for path in ("warmup", "warmup/checkpoints/3"):
        assert str(to_folder(local / path)) == f"{URL}/{path}"
    assert to_folder(tmp_path / "run" / "warmup") == tmp_path / "run" / "warmup"


def test_without_gcsfs_one_line_names_the_extra(monkeypatch):
    checkpoint_folder._reach_buckets.cache_clear()
    monkeypatch.setattr(checkpoint_folder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match=r"^checkpoints in a bucket .* pip install -e '.\[gcs\]'$"):
        to_folder(f"{URL}/warmup")


@pytest.mark.slow
def test_a_stage_has_one_writer(quick_server, tmp_path):
    with stage(tmp_path / "a").only_writer():
        with (
            pytest.raises(StoreError, match=f"another process is writing {URL}/warmup"),
            stage(tmp_path / "b").only_writer(),
        ):
            pass
        with StageFiles(Mirror(URL, tmp_path / "b").local / "continual").only_writer():
            pass
    assert not quick_server.buckets[BUCKET]
