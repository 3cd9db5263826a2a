"""Training and its readers with a workdir in a bucket: figures are those of a local workdir."""

import importlib.util
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import processes
import pytest
from data.data_workdir import WORLD, write_text
from store.bucket_commands import command, write_config
from store.cloud_storage import BUCKET, CloudStorage, Fault, serving

from m3jax.checkpoint import checkpoint_steps
from m3jax.files import json_text
from m3jax.mirror import Mirror
from m3jax.selection import select

pytest.importorskip("gcsfs")
pytestmark = pytest.mark.slow
URL = f"gs://{BUCKET}/runs/wiki"
_FIGURES = ("step", "loss", "accuracy", "gradient_norm", "parameter_norm", "evaluation", "tokens")


@pytest.fixture(scope="module")
def server() -> Iterator[CloudStorage]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def local(server, tmp_path_factory) -> tuple[Path, Path]:
    """A config file and a local workdir, prepared; the bucket has the same workdir."""
    folder = tmp_path_factory.mktemp("texts")
    documents, knowledge = write_text(folder)
    config = write_config(folder)
    texts = f"--config={config}:warmup", f"--documents={documents}", f"--knowledge={knowledge}"
    command("prepare", *texts, f"--workdir={folder / 'local'}")
    command("prepare", *texts, f"--workdir={URL}", f"--cache_dir={folder / 'prepared'}")
    return config, folder / "local"


def machine(folder: Path) -> dict[str, str]:
    """Makes the home, temporary folder and caches of a machine; returns its environment."""
    names = {"HOME": "home", "TMPDIR": "tmp", "XDG_CACHE_HOME": "home/.cache"}
    for name in names.values():
        (folder / name).mkdir(parents=True, exist_ok=True)
    return {name: str(folder / path) for name, path in names.items()}


def run(script: str, *arguments: object, at: Path):
    script, *words = script.split()
    path = processes.ROOT / "launch" / f"{script}.py"
    return processes.start(["python", path, *words, *arguments], devices=1, env=machine(at), cwd=at)


def succeed(script: str, *arguments: object, at: Path) -> str:
    at.mkdir(exist_ok=True)
    done = processes.finish(run(script, *arguments, at=at))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def together(script: str, *arguments: object, at: list[Path]) -> str:
    """Runs a script in two processes, each on a machine of its own; returns what the first says."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for path in at:
        path.mkdir(exist_ok=True)
    flags = f"--coordinator=127.0.0.1:{port}", "--processes=2"
    started = [
        run(script, *arguments, *flags, f"--process_id={index}", at=path)
        for index, path in enumerate(at)
    ]
    done = [processes.finish(process) for process in started]
    for each in done:
        assert each.returncode == 0, each.stderr[-3000:]
    return done[0].stdout


def figures(text: bytes) -> list[str]:
    """Returns the lines of metrics without times."""
    lines = [json.loads(line) for line in text.splitlines()]
    kept = [{name: line[name] for name in _FIGURES if name in line} for line in lines]
    return [json_text(line) for line in kept if len(line) > 1]


def mirrors(at: Path) -> set[str]:
    """Returns what a machine has of the workdir in the bucket: names of folders and files."""
    mirror = Mirror(URL, at / "home" / ".cache" / "m3jax").local
    return {path.name for path in mirror.iterdir()} if mirror.is_dir() else set()


def shards(at: Path) -> set[int]:
    """Returns the shards of the corpus that a machine has."""
    corpus = Mirror(URL, at / "home" / ".cache" / "m3jax").local / "corpus" / "train"
    return {int(path.stem[-5:]) for path in corpus.glob("*.array_record")}


def in_bucket(server: CloudStorage, name: str) -> bytes:
    return server.buckets[BUCKET][f"runs/wiki/{name}"].data


def test_a_killed_run_goes_on_elsewhere_with_the_figures_of_a_local_one(server, local, tmp_path):
    config, workdir = local
    succeed("train", f"--config={config}:warmup", f"--workdir={workdir}", at=tmp_path / "disk")
    at_bucket = f"--config={config}:warmup", f"--workdir={URL}"
    server.faults = [Fault("POST.*checkpoints/6/state/.*", 503, times=1e9, delay=60)]
    (tmp_path / "one").mkdir()
    killed = run("train", *at_bucket, at=tmp_path / "one")
    while not any("checkpoints/6/state" in line for line, _ in server.requests):
        assert killed.poll() is None, killed.communicate()[1][-2000:]
        time.sleep(0.1)
    killed.kill()
    processes.finish(killed)
    server.faults = [
        Fault("runs/wiki", 503, times=1e9, share=0.15),
        Fault("POST.*runs/wiki", cut=100, times=1e9, share=0.1),
    ]
    assert checkpoint_steps(f"{URL}/warmup") == [3]
    shown = succeed("train", *at_bucket, at=tmp_path / "two")
    server.faults = []
    assert f"checkpoint: {URL}/warmup/checkpoints/6" in shown
    assert checkpoint_steps(f"{URL}/warmup") == [3, 6]
    there = in_bucket(server, "warmup/metrics.jsonl")
    assert figures(there) == figures((workdir / "warmup" / "metrics.jsonl").read_bytes())
    names = {name.removeprefix("runs/wiki/warmup/") for name in server.buckets[BUCKET]}
    assert {"config.json", "loss.png"} <= names
    assert sum(name.startswith("tensorboard/events") for name in names) == 2
    assert not any(re.search(r"lock$|seen_by_all|\.tmp", name) for name in names)
    shared = {path.name for path in (tmp_path / "one").rglob("*") if "gs:" in path.name}
    assert not shared  # no folder that is called like a URL


@pytest.mark.parametrize(
    ("status", "remedy"), [(503, "Run the same command again"), (403, "access denied. Give this")]
)
def test_what_lasts_ends_a_run_with_one_sentence(server, local, tmp_path, status, remedy):
    config, _ = local
    server.faults = [Fault("POST.*checkpoints/3/", status, times=1e9)]
    words = f"--config={config}:warmup", f"--config.stage=lost_{status}", f"--workdir={URL}"
    begun = time.monotonic()
    (tmp_path / "one").mkdir()
    done = processes.finish(run("train", *words, at=tmp_path / "one"))
    server.faults = []
    told = [
        line for line in done.stderr.splitlines() if not re.match(r"I\d{4} |copying |lost_", line)
    ]
    assert done.returncode == 2 and len(told) == 1, done.stderr[-3000:]
    assert told[0].startswith(f"StoreError: {URL}/lost_{status}") and remedy in told[0]
    assert time.monotonic() - begun < 180
    assert checkpoint_steps(f"{URL}/lost_{status}") == []


def reports(folder: Path) -> dict[str, list[str]]:
    """Commands that write a report, with their flags."""
    people = WORLD.people
    files = {
        "questions": [{"prompt": "pet of Nobody", "answer": " otter"}],
        "tasks": [{"question": "pet of Nobody", "choices": ["otter", "lynx"], "answer": 0}],
        "needles": [{"needle": people[0].text, "prompt": people[0].name, "answer": " otter"}],
        "documents": [
            {"text": " ".join(person.text for person in people[i : i + 20]), "id": str(i)}
            for i in range(60)
        ],
    }
    given = {}
    for name, lines in files.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        given[name] = f"--{name}={path}"
    commands = {
        "select_memory counts": ["--budget=6"],
        "evaluate leakage": [],
        "evaluate retrieval": [],
        "evaluate questions": [
            given["questions"],
            "--new_tokens=2",
            "--conditions=none,memory_found",
        ],
        "evaluate needle": [
            given["needles"],
            "--lengths=50",
            "--count=1",
            "--window=20",
            "--cut=8",
        ],
        "select_memory worth": [given["documents"], "--budgets=4", "--texts=21", "--rules=uniform"],
        "select_memory references": ["--budget_bytes=9999", "--dry_run", "--check=8", "--draws=1"],
    }
    if importlib.util.find_spec("lm_eval"):
        commands["evaluate tasks"] = [given["tasks"]]
    return commands


def test_two_processes_without_a_common_folder_do_what_two_with_one_do(
    server, local, tmp_path, monkeypatch
):
    config, workdir = local
    at = {str(workdir): [tmp_path / "disk 0", tmp_path / "disk 1"]}
    at[URL] = [tmp_path / "one", tmp_path / "two"]
    warmup = f"--config={config}:warmup", "--config.stage=pair", "--config.data.shares=2"
    continual = (f"--config={config}:continual",)
    losses: list[dict] = []
    texts: list[str] = []
    for place, machines in at.items():
        run, begun = (f"--workdir={place}",), f"{place}/pair"
        shown = together("train", *warmup, *run, at=machines)
        assert f"checkpoint: {begun}/checkpoints/6" in shown
        if place == URL:
            assert [shards(machine) for machine in machines] == [{0, 2}, {1, 3}]
        together("write_bank", *continual, *run, f"--checkpoint={begun}", at=machines)
        together("train", *continual, *run, f"--init_from={begun}", at=machines)
        report = tmp_path / "losses.json"
        succeed("evaluate losses", *continual, *run, f"--json={report}", at=machines[1])
        # Counters of retrieval also count batches that were read ahead.
        read = json.loads(report.read_text())
        losses.append({**read, "checkpoint": None, "retrieval": None})
        prompt = "--prompt=The pet of", "--new_tokens=5"
        texts.append(succeed("generate", *continual, *run, *prompt, at=tmp_path / "new"))
    # A model of six steps gains nothing from memories: any will do.
    monkeypatch.setattr(select, "choose", lambda *_: np.arange(4))
    for words, flags in reports(tmp_path).items():
        told = []
        for place in at:
            report = tmp_path / "report.json"
            options = *continual, f"--workdir={place}", f"--cache_dir={tmp_path / 'cache'}"
            command(words, *options, *flags, f"--json={report}")
            read = {**json.loads(report.read_text()), "checkpoint": None}
            told.append({k: v for k, v in read.items() if "second" not in k and "time" not in k})
        assert told[0] == told[1], words
    assert in_bucket(server, "report/leakage.png").startswith(b"\x89PNG")
    assert in_bucket(server, "report/counts.png").startswith(b"\x89PNG")
    for stage in ("pair", "continual"):
        expected = figures((workdir / stage / "metrics.jsonl").read_bytes())
        assert figures(in_bucket(server, f"{stage}/metrics.jsonl")) == expected
        assert len(expected) >= 5
    lines = [json.loads(line) for line in in_bucket(server, "continual/metrics.jsonl").splitlines()]
    reads = [line["retrieval"] for line in lines if "bank_read_p99" in line.get("retrieval", {})]
    assert reads and all(0 < read["bank_read_p99"] < 60 for read in reads)
    assert any(read.get("bank_bytes_per_second", 0) > 0 for read in reads)
    assert losses[0] == losses[1] and texts[0] == texts[1]
    assert {"corpus", "tokenizer", "references"} <= mirrors(at[URL][1])
    assert "bank" not in mirrors(at[URL][0])  # which is read by ranges
    living = (
        "--config.stage=living",
        "--config.train.refresh_every=3",
        "--config.train.keep_every=3",
    )
    for place in at:  # with a bank that is rewritten on the way
        start = f"--workdir={place}", f"--init_from={place}/pair"
        succeed("train", *continual, *living, *start, at=tmp_path / "living")
    expected = figures((workdir / "living" / "metrics.jsonl").read_bytes())
    assert figures(in_bucket(server, "living/metrics.jsonl")) == expected


def test_preferences_are_learned_in_a_bucket(server, local, tmp_path):
    config, workdir = local
    pairs = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": f"question {i}", "chosen": f"answer {i}", "rejected": f"nothing {i}"}
        for i in range(60)
    ]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone = "--config.mesh.fsdp=1"
    dpo = f"--config={config}:dpo", "--config.memory.source=none", alone
    for place in (workdir, URL):
        at = f"--workdir={place}", f"--cache_dir={tmp_path / 'one'}"
        command("train", f"--config={config}:warmup", "--config.stage=start", alone, *at)
        command("prepare chats", *dpo, *at, f"--chats={pairs}")
        command("train", *dpo, *at, f"--init_from={place}/start", "--profile_steps=2:2")
    expected = figures((workdir / "dpo" / "metrics.jsonl").read_bytes())
    assert figures(in_bucket(server, "dpo/metrics.jsonl")) == expected and len(expected) > 1
    names = {name.removeprefix("runs/wiki/dpo/") for name in server.buckets[BUCKET]}
    assert any(name.startswith("profile/") for name in names)
    command("train", *dpo, f"--workdir={URL}", f"--cache_dir={tmp_path / 'two'}")
    stored = "dpo/base_logprobs/train/logprobs.npy"
    there = Mirror(URL, tmp_path / "two").local / stored
    assert there.read_bytes() == (workdir / stored).read_bytes()
