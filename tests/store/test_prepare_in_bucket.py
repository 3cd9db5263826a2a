"""A workdir in a bucket is prepared in a mirror, part by part, and equals a local one."""

import json
from pathlib import Path

import pytest
from data.data_workdir import write_text
from store.bucket_commands import command, content, write_config
from store.cloud_storage import BUCKET, CloudStorage, Fault

from m3jax.errors import CommandError, StoreError
from m3jax.mirror import Mirror
from m3jax.text import prepare

URL = f"gs://{BUCKET}/runs/wiki"
PARTS = ("tokenizer", "corpus/validation", "corpus/train", "references", "index")


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    documents, knowledge = write_text(tmp_path)
    config = f"--config={write_config(tmp_path)}:warmup"
    return [config, f"--documents={documents}", f"--knowledge={knowledge}"]


@pytest.fixture
def local(tmp_path: Path, texts: list[str]) -> dict[str, bytes]:
    command("prepare", *texts, f"--workdir={tmp_path / 'local'}")
    return content(tmp_path / "local")


def on_host(tmp_path: Path, name: str) -> tuple[str, str]:
    return f"--workdir={URL}", f"--cache_dir={tmp_path / name}"


def test_a_bucket_is_prepared_as_a_folder_also_through_faults(
    quick_server: CloudStorage, tmp_path, texts, local, capsys
):
    quick_server.faults = [
        Fault(".", 503, times=1e9, share=0.15),
        Fault("POST|alt=media", cut=100, times=1e9, share=0.1),
    ]
    command("prepare", *texts, *on_host(tmp_path, "first"))
    assert content(Mirror(URL, tmp_path / "first").local) == local
    second = Mirror(URL, tmp_path / "second")
    second.fetch(*PARTS)
    assert content(second.local) == local
    names = {name.removeprefix("runs/wiki/") for name in quick_server.buckets[BUCKET]}
    assert names == {*local, *(f"{part}/published.json" for part in PARTS)}
    capsys.readouterr()
    command("prepare", *texts, *on_host(tmp_path, "third"))
    told = capsys.readouterr().out
    assert told.count("finished before, kept") == 4 and f"in {URL}/index" in told


@pytest.mark.parametrize("last", ["tokenizer", "corpus/train"])
def test_another_machine_goes_on_from_what_was_published(
    quick_server, tmp_path, texts, local, monkeypatch, capsys, last
):
    real = Mirror.publish

    def die(mirror, part, source=None):
        real(mirror, part, source)
        if part == last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Mirror, "publish", die)
        command("prepare", *texts, *on_host(tmp_path, "first"))
    assert "runs/wiki/references/published.json" not in quick_server.buckets[BUCKET]
    capsys.readouterr()
    command("prepare", *texts, *on_host(tmp_path, "second"))
    done = ("tokenizer", "corpus/validation", "corpus/train")
    kept = done[: done.index(last) + 1]
    told = capsys.readouterr().out.splitlines()
    assert {line.partition(":")[0] for line in told if "kept" in line} == {*kept}
    assert content(Mirror(URL, tmp_path / "second").local) == local


@pytest.mark.slow
def test_documents_cleaned_on_one_machine_are_not_cleaned_on_another(
    quick_server, tmp_path, texts, monkeypatch, capsys
):
    texts = [*texts, "--config.clean.enabled", "--config.clean.entropy_min=0", "--workers=1"]
    texts = [word for word in texts if not word.startswith("--knowledge")]
    command("prepare", *texts, f"--workdir={tmp_path / 'local'}")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            prepare.Tokenizer, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        command("prepare", *texts, *on_host(tmp_path, "first"))
    assert "runs/wiki/clean/published.json" in quick_server.buckets[BUCKET]
    capsys.readouterr()
    command("prepare", *texts, *on_host(tmp_path, "second"))
    assert "clean: " in capsys.readouterr().out
    there = content(Mirror(URL, tmp_path / "second").local)
    assert there == content(tmp_path / "local")
    capsys.readouterr()
    command("prepare", *texts, *on_host(tmp_path, "first"))
    assert capsys.readouterr().out.count("finished before, kept") == 5


def test_chats_are_prepared_in_a_bucket(quick_server, tmp_path, texts):
    config = [texts[0].replace(":warmup", ":sft")]
    chats = tmp_path / "chats.jsonl"
    lines = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(60)]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    at = on_host(tmp_path, "first")
    with pytest.raises(StoreError, match="nothing is finished at .*tokenizer"):
        command("prepare chats", *config, *at, f"--chats={chats}")
    command("prepare", *texts, *at)
    command("prepare chats", *config, *on_host(tmp_path, "second"), f"--chats={chats}")
    second, third = Mirror(URL, tmp_path / "second"), Mirror(URL, tmp_path / "third")
    third.fetch("chats", "tokenizer")
    assert content(third.local) == content(second.local)


def test_what_cannot_work_is_refused_before_work(quick_server, tmp_path, texts):
    at = on_host(tmp_path, "first")
    with pytest.raises(CommandError, match="--beam needs a workdir"):
        command("prepare", *texts, *at, "--beam=--runner=FnApiRunner")
    with pytest.raises(StoreError, match="there is no bucket gs://missing"):
        command("prepare", *texts, "--workdir=gs://missing/run", f"--cache_dir={tmp_path / 'a'}")
    with pytest.raises(Exception, match="names of buckets"):
        command("prepare", *texts, "--workdir=gs://x/run")
    assert not quick_server.buckets[BUCKET]
