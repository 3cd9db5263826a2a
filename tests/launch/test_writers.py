"""Two at once: every command that writes is refused while another process writes there."""

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import processes
import pytest
from absl import flags
from data.data_workdir import make_workdir, tiny_config, write_text
from ml_collections import ConfigDict

from m3jax import cli
from m3jax.errors import LockError, UserError
from m3jax.mesh import make_mesh
from m3jax.text.tokenizer import Tokenizer
from m3jax.train.checkpoints import Checkpoints
from m3jax.train.state import Program
from m3jax.workdir import LOCK, make_part, only_writer

ROOT = Path(__file__).parents[2]
CONFIG = """
from launch.test_writers import stage_config


def get_config(options=""):
    return stage_config(options.removeprefix("stage="))
"""
SWEEP = """
from m3jax.sweep.spec import Entry, Sweep


def get_sweep():
    return Sweep({config!r}, [Entry("a", stages=("warmup",))])
"""
# Command → its flags besides --config and --workdir, and the folder that another process writes;
# paths begin in the workdir.
WRITERS: dict[str, tuple[list[str], str]] = {
    "prepare": (["--documents={0}/documents.jsonl"], "."),
    "prepare chats": (["--chats={0}/chats.jsonl", "--config=:stage=sft"], "chats"),
    "prepare quality": (["--labelled={0}/labelled.jsonl", "--scorer={0}/scorer"], "scorer"),
    "train": ([], "warmup"),
    "write_bank": ([], "."),
    "write_bank --bank={0}/other": ([], "other"),
    "write_bank --refresh=all": (["--checkpoint={0}/warmup", "--config=:stage=continual"], "."),
    "write_bank --refresh=worst": (["--checkpoint={0}/warmup", "--config=:stage=continual"], "."),
    "edit_bank add": (["--documents={0}/new.jsonl"], "."),
    "edit_bank replace": (["--documents={0}/new.jsonl"], "."),
    "edit_bank delete": (["--keys=a"], "."),
    "edit_bank merge": (["--other={0}"], "."),
    "edit_bank rollback": (["--to=0"], "."),
    "edit_bank compact": ([], "."),
    "edit_bank repair": ([], "."),
    "select_memory references": (
        ["--config=:stage=continual", "--budget_bytes=100000", "--checkpoint={0}/warmup"],
        "report/usefulness/measured",
    ),
    "select_memory heads": (["--checkpoint={0}/warmup", "--window=20"], "report/heads"),
    "convert from_hf": (["--model={0}/llama", "--config=:stage=imported"], "imported"),
    "convert to_hf": (["--folder={0}/exported"], "exported"),
    "sweep": (["--sweep={0}/sweep.py", "--data={0}", "--retry"], "."),
    "sweep --prepare_only": (["--sweep={0}/sweep.py", "--data={0}"], "."),
    "quickstart": ([], "report"),
    "quickstart chat": ([], "report"),
    "quickstart smollm2": ([], "report"),
}
# Commands that write files of results alone, each whole, or folders of their own.
READERS = {
    *("bench train", "bench writer", "bench overlap", "bench bank", "bench quantizer"),
    *(
        "bench retrieval",
        "bench inference",
        "bench edits",
        "bench checkpoint",
        "compile",
        "plan",
        "generate",
    ),
    *("edit_bank list", "edit_bank verify", "write_bank --refresh=measure"),
    *("select_memory counts", "select_memory worth"),
    *("evaluate losses", "evaluate questions", "evaluate tasks", "evaluate retrieval"),
    *("evaluate leakage", "evaluate needle"),
}


def stage_config(stage: str = "warmup") -> ConfigDict:
    memory = "none" if stage in ("warmup", "imported", "") else "precomputed"
    packing = {"data__packing": "chats", "retrieval__ids": "stored"} if stage == "sft" else {}
    return tiny_config(stage=stage or "warmup", memory__source=memory, mesh__fsdp=1, **packing)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with a bank and a checkpoint of random weights, and a file for every flag."""
    folder = tmp_path_factory.mktemp("writers") / "run"
    folder.mkdir()
    config = stage_config()
    make_workdir(folder, stage_config("continual"), write_text(folder))
    program = Program(config, make_mesh(config, jax.devices()[:1]))
    tokenizer = Tokenizer.load(folder / "tokenizer").fingerprint
    checkpoints = Checkpoints(folder / "warmup", config, tokenizer)
    state = program.init(None)
    other = jax.tree.map(lambda x: x * 1.5, state.params)  # other weights than the bank's
    checkpoints.save(state._replace(params=other), 1)
    checkpoints.close()
    (folder / "config.py").write_text(CONFIG)
    (folder / "sweep.py").write_text(SWEEP.format(config=str(folder / "config.py")))
    (folder / "new.jsonl").write_text('{"id": "new", "text": "new text"}\n')
    turns = '{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}'
    (folder / "chats.jsonl").write_text(f'{{"messages": [{turns}]}}\n' * 20)
    rows = [f'{{"text": "text {score} of a kind", "score": {score}}}\n' for score in range(6)]
    (folder / "labelled.jsonl").write_text("".join(rows) * 2)
    return folder


def commands() -> list[str]:
    """All commands of all launch scripts, as words behind `launch/`."""
    scripts = sorted((ROOT / "launch").glob("*.py"))
    named = {path.stem: runpy.run_path(str(path))["COMMANDS"] for path in scripts}
    return [f"{stem} {name}".strip() for stem, own in named.items() for name in own]


def test_every_command_is_listed_as_a_writer_or_a_reader() -> None:
    listed = {name.partition(" --")[0] for name in (*WRITERS, *READERS)}
    assert set(commands()) == listed


def words_of(name: str, workdir: Path) -> tuple[str, list[str]]:
    """The script of a writer, and the words behind it on its command line."""
    flags, _ = WRITERS[name]
    script, *words = [word.format(workdir) for word in (*name.split(), *flags)]
    options = [word for word in words if word.startswith("--config=:")]
    words = [word for word in words if word not in options]
    command = " ".join(word for word in words if not word.startswith("--"))
    known = runpy.run_path(str(ROOT / "launch" / f"{script}.py"))["COMMANDS"]
    both = {"config": f"{workdir}/config.py{''.join(options)[9:]}", "workdir": workdir}
    taken = {flag.name for flag in known[command].flags}
    words += [f"--{flag}={value}" for flag, value in both.items() if flag in taken]
    return f"{script}.py", words


@pytest.mark.parametrize("name", WRITERS)
def test_a_second_writer_is_refused_by_name(
    name: str, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("m3jax.sweep.run.PATIENCE", 0.0)
    script, words = words_of(name, workdir)
    scope = runpy.run_path(str(ROOT / "launch" / script))
    place = (workdir / WRITERS[name][1]).resolve()
    before = set(workdir.rglob("*"))
    with only_writer(place), pytest.raises(UserError) as refused:
        values = flags.FlagValues()
        command = cli.parse(scope["__doc__"], scope["COMMANDS"], [script, *words], values)
        command.main(values)
    assert isinstance(refused.value, LockError) and cli.show_error(refused.value) == 2
    assert f"another process (process {os.getpid()} on " in capsys.readouterr().err
    assert f"is writing {place};" in str(refused.value)
    written = {path for path in set(workdir.rglob("*")) - before if "__pycache__" not in str(path)}
    assert not written, "a refused writer has written"


def test_a_refused_process_ends_with_code_2(workdir: Path) -> None:
    script, words = words_of("edit_bank delete", workdir)
    with only_writer(workdir):
        done = processes.run_script(f"launch/{script}", *words, devices=1)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("LockError: another process (process ")


def test_the_lock_ends_with_a_killed_owner(tmp_path: Path) -> None:
    code = "import sys, time; from m3jax.workdir import only_writer\n"
    code += "with only_writer(sys.argv[1]): print('locked', flush=True); time.sleep(1000)"
    owner = processes.start([sys.executable, "-c", code, tmp_path / "part"])
    assert owner.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=rf"process {owner.pid} on .* is writing .*part; wait"):
        make_part(tmp_path / "part", {"a": 1}, lambda folder: None)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert (tmp_path / "part" / LOCK).exists()
    assert not make_part(tmp_path / "part", {"a": 1}, lambda folder: None)
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["inputs.json"]
    (tmp_path / "part" / LOCK).touch()  # killed after its last file
    assert make_part(tmp_path / "part", {"a": 1}, lambda folder: None)
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["inputs.json"]


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    with only_writer(deep):
        assert (deep / LOCK).is_file()
    assert not list(tmp_path.iterdir())
    with only_writer(deep):
        (deep / "file").write_text("")
    assert [path.name for path in deep.iterdir()] == ["file"]


def test_a_lock_that_its_owner_removes_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner ends between the other's opening and locking of the same file."""
    import fcntl

    from m3jax import workdir

    lock, calls = fcntl.flock, []

    def slow(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        lock(descriptor, how)

    monkeypatch.setattr(workdir.fcntl, "flock", slow)
    with only_writer(tmp_path):
        assert len(calls) == 2 and (tmp_path / LOCK).is_file()
        with pytest.raises(ValueError, match="another process"), only_writer(tmp_path):
            pass


@pytest.mark.parametrize("error", [OSError(95, "no locks here"), None])
def test_without_locks_and_rights_a_folder_is_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    from m3jax import workdir

    def refuse(*_: object) -> None:
        raise error or PermissionError(13, "read-only")

    monkeypatch.setattr(*((workdir.fcntl, "flock") if error else (workdir.os, "open")), refuse)
    made: list[Callable[[Path], None]] = []
    assert not make_part(tmp_path, {}, lambda folder: made.append(folder)) if error else True
    with only_writer(tmp_path) as descriptor:
        assert (descriptor is None) == (error is None)
