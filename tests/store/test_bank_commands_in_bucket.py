"""write_bank and edit_bank on a workdir in a bucket: files and outputs are those of a local one."""

import concurrent.futures
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import processes
import pytest
from data.data_workdir import make_workdir, write_text
from launch.test_writers import CONFIG, stage_config
from store.bucket_commands import command, content
from store.cloud_storage import BUCKET, CloudStorage, Fault

from m3jax import store
from m3jax.errors import LockError, StoreError, VersionError
from m3jax.memory import storage
from m3jax.mesh import make_mesh
from m3jax.mirror import Mirror
from m3jax.store import Store
from m3jax.text.tokenizer import Tokenizer
from m3jax.train.checkpoints import Checkpoints
from m3jax.train.state import Program

URL = f"gs://{BUCKET}/runs/wiki"
PARTS = ("tokenizer", "corpus/train", "corpus/validation", "references", "index")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with a checkpoint of random weights, without a bank."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    folder.mkdir()
    config = stage_config()
    make_workdir(folder, config, write_text(folder))
    shutil.rmtree(folder / "bank")
    program = Program(config, make_mesh(config, jax.devices()[:1]))
    checkpoints = Checkpoints(
        folder / "warmup", config, Tokenizer.load(folder / "tokenizer").fingerprint
    )
    checkpoints.save(program.init(None), 1)
    checkpoints.close()
    (folder / "config.py").write_text(CONFIG)
    (folder / "new.jsonl").write_text('{"id": "new", "text": "new text"}\n')
    (folder / "newer.jsonl").write_text('{"id": "new", "text": "newer text"}\n')
    return folder


@pytest.fixture
def server(
    quick_server: CloudStorage, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CloudStorage]:
    monkeypatch.setattr(store, "LEASE", 1.0)
    monkeypatch.setattr(storage, "RETRIES", store.RETRIES)
    storage._context.cache_clear()
    mirror = Mirror(URL, tmp_path / "maker")
    shutil.copytree(prepared, mirror.local, dirs_exist_ok=True)
    for part in PARTS:
        mirror.publish(part)
    yield quick_server
    storage._context.cache_clear()


class Runner:
    """Runs a command on a local workdir and on that of the bucket, each time on a new host."""

    def __init__(self, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        self.local, self.tmp_path, self.capsys = tmp_path / "local", tmp_path, capsys
        shutil.copytree(prepared, self.local)
        self.host = 0

    def at_bucket(self) -> list[str]:
        self.host += 1
        return [f"--workdir={URL}", f"--cache_dir={self.tmp_path / str(self.host)}"]

    def __call__(self, words: str, *arguments: str) -> str:
        told = []
        fixed = [f"--config={self.local}/config.py"]
        if words not in ("edit_bank list", "edit_bank verify", "edit_bank rollback"):
            fixed.append(f"--checkpoint={self.local}/warmup")
        for at in ([f"--workdir={self.local}"], self.at_bucket()):
            self.capsys.readouterr()
            command(words, *fixed, *arguments, *at)
            output = self.capsys.readouterr().out.replace(str(self.local), "RUN")
            output = re.sub(r"[\d.]+ s, .*|, [^ ]+ free", "", output.replace(URL, "RUN"))
            told.append(re.sub(r"versions/(building|\d+)(/[0-9a-f]{16})?/bank", "NEW/bank", output))
        assert told[0] == told[1]
        return told[0]


@pytest.fixture
def run(
    server: CloudStorage, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> Runner:
    return Runner(prepared, tmp_path, capsys)


def in_bucket(part: str) -> str:
    """Path in the bucket of a part of a version: in the folder of the editor that has made it."""
    version, name = re.fullmatch(r"(versions/\d+)?/?(.*)", part).groups()
    data = version and json.loads(Store(URL).read(f"{version}/version.json"))["data"]
    return f"{data}/{name}" if data else name


def bank_files(run: Runner, part: str = "bank") -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Files of a bank on the disk and in the bucket, without manifests, which have paths."""
    folder, there = run.local / part, Store(f"{URL}/{in_bucket(part)}")
    paths = (path for path in folder.rglob("*") if path.is_file())
    local = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    bucket = {name: there.read(name) or b"" for name in there.names()}
    for files in (local, bucket):
        for name in (storage.MANIFEST, storage.COMPLETE):
            assert files.pop(name)
    return local, bucket


@pytest.mark.slow
def test_a_bank_is_written_and_edited_as_on_a_disk(run):
    assert "encoded" in run("write_bank")
    local, there = bank_files(run)
    assert local == there and "memories.zarr/c/0/0/0/0/0/0" in there
    assert " 0 encoded" in run("write_bank")
    run("edit_bank add", f"--documents={run.local}/new.jsonl")
    with pytest.raises(VersionError, match=f"{URL} was edited"):
        command("write_bank", f"--config={run.local}/config.py", *run.at_bucket())
    run("edit_bank replace", f"--documents={run.local}/newer.jsonl", "--note=newer")
    told = run("edit_bank list")
    assert "*      2  from    1  newer" in told
    run("edit_bank delete", "--keys=new")
    run("edit_bank rollback", "--to=2")
    assert "RUN: every file is as it was written" in run("edit_bank verify")
    local, there = bank_files(run, "versions/000002/bank")
    assert local == there
    assert "version 4 is current (compacted" in run("edit_bank compact")
    assert run("edit_bank list").count("\n") == 1
    shard = "versions/000004/bank/memories.zarr/c/0/0/0/0/0/0"
    (run.local / shard).unlink()
    Store(URL).delete(in_bucket(shard))
    assert "rewritten: " in run("edit_bank repair")
    local, there = bank_files(run, "versions/000004/bank")
    assert local == there


class Forks:
    """Runs edit_bank in processes of their own, each on another machine, one at a time."""

    def __init__(self, run: Runner, server: CloudStorage, tmp_path: Path) -> None:
        self.run, self.server, self.tmp_path = run, server, tmp_path
        self.pool = concurrent.futures.ThreadPoolExecutor(1)

    def start(self, words: str, *arguments: str, **environment: str) -> Any:
        self.run.host += 1
        self.home = self.tmp_path / f"home {self.run.host}"
        (self.home / "tmp").mkdir(parents=True)
        machine = {"HOME": self.home, "XDG_CACHE_HOME": self.home, "TMPDIR": self.home / "tmp"}
        fixed = [f"--config={self.run.local}/config.py", f"--workdir={URL}", *arguments]
        if words != "delete":
            fixed.append(f"--checkpoint={self.run.local}/warmup")
        script = str(processes.ROOT / "launch" / "edit_bank.py")
        options = {"devices": 1, **machine, **environment}
        return self.pool.submit(processes.run_script, script, words, *fixed, **options)

    def process(self, happened: str) -> int:
        """Id of the process that was started last, once it has sent a request."""
        processes.wait_until(
            lambda: any(re.search(happened, line) for line, _ in self.server.requests)
        )
        lock = next((self.home / "m3jax").glob("*/lock")).read_text()
        return int(re.search(r"process (\d+) ", lock)[1])


@pytest.mark.slow
def test_editors_are_killed_suspended_and_without_an_answer(run, server, tmp_path):
    (run.local / "other.jsonl").write_text('{"id": "other", "text": "other text"}\n')
    run("write_bank")
    forks = Forks(run, server, tmp_path)
    fixed = f"--config={run.local}/config.py", f"--checkpoint={run.local}/warmup"
    moments = {
        ("add", "new"): "POST.*versions/.*memories.zarr/c/",
        ("replace", "newer"): "POST.*versions/000002/version.json",
        ("add", "other"): "POST.*versions/current.json",
    }
    for (words, name), moment in moments.items():
        documents = f"--documents={run.local}/{name}.jsonl"
        server.requests.clear()
        server.faults = [Fault(moment, 200, delay=3, times=1e9)]
        killed = forks.start(words, documents)
        os.kill(forks.process(moment), signal.SIGKILL)
        assert killed.result().returncode == -signal.SIGKILL
        time.sleep(3.1)  # the server carries out what it has read
        server.faults = []
        for at in ([f"--workdir={run.local}"], run.at_bucket()):
            command(f"edit_bank {words}", *fixed, documents, *at)
    run("edit_bank list")
    for version in ("000001", "000002", "000003"):
        local, there = bank_files(run, f"versions/{version}/bank")
        assert local == there
        assert len(Mirror(URL, tmp_path / "any").folders(f"versions/{version}")) == 1

    server.requests.clear()
    server.faults = [Fault("POST.*versions/.*memories.zarr/c/", 200, delay=2, times=1e9)]
    suspended = forks.start("replace", f"--documents={run.local}/new.jsonl")
    process = forks.process("POST.*versions/.*memories.zarr/c/")
    os.kill(process, signal.SIGSTOP)
    server.faults = []
    run("edit_bank replace", f"--documents={run.local}/newer.jsonl")
    before = Store(URL).read("versions/current.json")
    os.kill(process, signal.SIGCONT)
    done = suspended.result()
    told = re.findall(r"^\w+Error: .*$", done.stderr, re.MULTILINE)
    assert done.returncode == 2 and len(told) == 1 and "run the same command again" in told[0]
    assert Store(URL).read("versions/current.json") == before
    local, there = bank_files(run, "versions/000004/bank")
    assert local == there

    silence = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1"}
    server.faults = [Fault(".", 0, delay=4, times=1e9, share=0.05)]
    done = forks.start("delete", "--keys=other", **silence).result()
    assert done.returncode == 0, done.stderr
    server.faults = [Fault(".", 0, delay=600, times=1e9)]
    begun = time.monotonic()
    done = forks.start("delete", "--keys=new", **silence).result()
    told = re.findall(r"^\w+Error: .*$", done.stderr, re.MULTILINE)
    assert done.returncode == 2 and len(told) == 1 and time.monotonic() - begun < 60
    assert told[0].startswith(f"StoreError: {URL}") and "Run the same command again" in told[0]
    server.faults = []
    command(
        "edit_bank delete",
        f"--config={run.local}/config.py",
        "--keys=other",
        f"--workdir={run.local}",
    )
    run("edit_bank list")


def test_a_bank_is_written_through_faults(run, server):
    server.faults = [
        Fault(".", 503, times=1e9, share=0.15),
        Fault("POST", cut=100, times=1e9, share=0.1),
    ]
    run("write_bank")
    local, there = bank_files(run)
    assert local == there


@pytest.mark.slow
def test_a_merge_takes_a_workdir_of_a_bucket(run, tmp_path):
    run("write_bank")
    config, writer = f"--config={run.local}/config.py", f"--checkpoint={run.local}/warmup"
    command("edit_bank add", config, writer, *run.at_bucket(), f"--documents={run.local}/new.jsonl")
    cache = f"--cache_dir={tmp_path / 'a'}"
    at = (config, writer, f"--workdir={run.local}", f"--other={URL}", cache, "--replace")
    command("edit_bank merge", *at)
    assert "1  from    0  merged with" in run_list(run)


def run_list(run: Runner) -> str:
    run.capsys.readouterr()
    command("edit_bank list", f"--config={run.local}/config.py", f"--workdir={run.local}")
    return run.capsys.readouterr().out


def test_who_writes_keeps_others_out(run, tmp_path):
    with Mirror(URL, tmp_path / "other").only_writer():
        for words in ("write_bank", "edit_bank compact", "edit_bank repair"):
            with pytest.raises((StoreError, LockError), match="another process is writing gs://"):
                command(words, f"--config={run.local}/config.py", *run.at_bucket())


def test_an_empty_place_is_named(run):
    at = f"--config={run.local}/config.py", f"--workdir=gs://{BUCKET}/nothing"
    for words in ("write_bank", "edit_bank compact", "edit_bank verify"):
        with pytest.raises(VersionError, match=f"there is no workdir gs://{BUCKET}/nothing; make"):
            command(words, *at, f"--cache_dir={run.tmp_path / 'cache'}")


@pytest.mark.slow
def test_what_is_selected_is_reported_in_the_bucket(run):
    fixed = f"--config={run.local}/config.py", f"--checkpoint={run.local}/warmup"
    for words in ("counts --references=4 --budget=4 --each=1", "heads --window=20"):
        name, *flags = words.split()
        for at in ([f"--workdir={run.local}"], run.at_bucket()):
            command(f"select_memory {name}", *fixed, *flags, *at)
    for name in ("counts.json", "heads-context-kv.json"):
        local = json.loads((run.local / "report" / name).read_bytes())
        assert json.loads(Store(URL).read(f"report/{name}") or b"") == local
    assert Store(URL).read("report/counts.png") and Store(URL).read("report/heads-context-kv.png")


def test_a_checkpoint_of_a_bucket_is_exported_and_taken_as_that_of_a_disk(run, tmp_path):
    pytest.importorskip("gcsfs")
    config = stage_config()
    program = Program(config, make_mesh(config, jax.devices()[:1]))
    fingerprint = Tokenizer.load(run.local / "tokenizer").fingerprint
    checkpoints = Checkpoints(f"{URL}/warmup", config, fingerprint)
    checkpoints.save(program.init(None), 1)
    checkpoints.close()
    command("convert to_hf", f"--workdir={run.local}", f"--folder={tmp_path / 'of disk'}")
    command("convert to_hf", *run.at_bucket(), f"--folder={tmp_path / 'of bucket'}")
    assert content(tmp_path / "of bucket") == content(tmp_path / "of disk") != {}
    fixed = f"--config={run.local}/config.py", "--config.stage=taken", "--config.memory.source=none"
    model = f"--model={tmp_path / 'of disk'}"
    places = {"disk": [f"--workdir={tmp_path / 'new'}"], "bucket": [f"--workdir=gs://{BUCKET}/new"]}
    for name, at in places.items():
        command("convert from_hf", *fixed, model, *at, f"--cache_dir={tmp_path / 'first'}")
        command("convert from_hf", *fixed, model, *at, f"--cache_dir={tmp_path / 'again'}")
        checkpoint = f"--checkpoint={at[0].partition('=')[2]}/taken"
        export = f"--folder={tmp_path / f'taken on {name}'}"
        command("convert to_hf", *at, checkpoint, export, f"--cache_dir={tmp_path / 'third'}")
    exported = content(tmp_path / "taken on bucket")
    assert exported == content(tmp_path / "taken on disk") != {}
    assert exported["model.safetensors"] == content(tmp_path / "of disk")["model.safetensors"]
