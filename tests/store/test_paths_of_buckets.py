"""Every path flag of every script: gs:// works, or is refused by its name before any work."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from absl import flags
from launch.test_mistakes import COMMANDS, IDS, NAMED, ROOT, Tree
from launch.test_writers import CONFIG
from ml_collections import ConfigDict
from store.cloud_storage import BUCKET, CloudStorage

from m3jax import cli
from m3jax.cli import Command, Flag
from m3jax.errors import UserError
from m3jax.mirror import Mirror
from m3jax.places import Place
from m3jax.printable import with_originals

EMPTY = f"gs://{BUCKET}/nothing/here"
# Flags that take gs://, besides --workdir, by what they hold.
TAKEN = {"bank", "base", "compressed_bank", "checkpoint", "init_from", "other", "compilation_cache"}
# Commands whose --workdir, and with it everything in it, is a local folder.
LOCAL = {
    *("bench bank", "bench edits", "bench inference", "bench overlap", "bench train"),
    "bench quantizer",
    "bench retrieval",
    *("quickstart", "quickstart chat", "quickstart smollm2", "sweep"),
}


def takes_buckets(flag: Flag) -> bool:
    return isinstance(flag.kind, Place) and "gs" in flag.kind.schemes


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return Tree(tmp_path)


def test_the_flags_that_take_buckets_are_these() -> None:
    for name, command in NAMED.items():
        named = {flag.name: flag for flag in command.flags}
        if "workdir" in named:
            assert takes_buckets(named["workdir"]) == (name not in LOCAL), name
            assert takes_buckets(named["workdir"]) == ("cache_dir" in named), name
        taken = {flag.name for flag in command.flags if takes_buckets(flag)} - {"workdir"}
        assert taken <= TAKEN, (name, taken)


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_a_flag_that_takes_no_bucket_says_so_by_its_name(command: Command, tree: Tree) -> None:
    before = tree.state()
    for flag in command.flags:
        if not isinstance(flag.kind, Place) or takes_buckets(flag):
            continue
        for value in (EMPTY, f"gs:/{BUCKET}/x"):
            values = flags.FlagValues()
            with pytest.raises((UserError, flags.Error)) as caught:
                flag.define(values, ["script"])
                values(["script", f"--{flag.name}={value}"])
            assert f"--{flag.name}=" in str(caught.value) and "gs://" in str(caught.value)
    assert tree.state() == before


def argument(flag: Flag) -> str | None:
    """A value with which the command can begin: of what takes buckets an empty place there."""
    if takes_buckets(flag) and flag.name != "compilation_cache":
        return EMPTY
    if not flag.required:
        return None
    if flag.kind is ConfigDict:
        return "config.py:stage=continual"
    if isinstance(flag.kind, Place):
        return "folder" if flag.kind.holds == "folder" else f"{flag.name}.jsonl"
    return "1" if flag.kind in (int, float) else flag.choices[0] if flag.choices else "a"


LINES = {
    "documents": '{"text": "a", "id": "a"}',
    "questions": '{"question": "a", "answer": "b"}',
    "tasks": '{"question": "a", "answer": "b"}',
    "needles": '{"prompt": "a", "answer": "b", "needle": "b"}',
    "chats": '{"prompt": "a", "response": "b"}',
}
OTHERS: dict[str, dict[str, str]] = {
    "generate": {"prompt": "a"},
    "select_memory heads": {"window": "20"},
    "select_memory counts": {"budget": "4", "each": "1"},
    "select_memory worth": {"budgets": "4"},
}
BUCKET_COMMANDS = {
    name: command
    for name, command in NAMED.items()
    if any(flag.name == "workdir" and takes_buckets(flag) for flag in command.flags)
}


@pytest.mark.parametrize("name", BUCKET_COMMANDS)
def test_an_empty_bucket_is_named_before_any_work(
    name: str, tree: Tree, quick_server: CloudStorage, tmp_path: Path
) -> None:
    command = BUCKET_COMMANDS[name]
    pytest.importorskip("gcsfs")
    if name == "evaluate tasks":
        pytest.importorskip("lm_eval")
    if name in ("prepare", "convert from_hf"):  # which make what is missing
        return
    for flag, line in LINES.items():
        (tree.home / f"{flag}.jsonl").write_text(line + "\n")
    (tree.home / "config.py").write_text(CONFIG)
    given = {own.name: argument(own) for own in command.flags}
    given |= {"cache_dir": str(tmp_path / "cache"), **OTHERS.get(name, {})}
    words = [f"--{flag}={value}" for flag, value in given.items() if value is not None]
    values = flags.FlagValues()
    script, *called = name.split()
    chosen = cli.parse(
        "", {"": command, **{word: command for word in called}}, [script, *called, *words], values
    )
    before = tree.state()
    with pytest.raises(UserError) as caught:
        chosen.main(values)
    text = with_originals(str(caught.value))
    assert f"gs://{BUCKET}/nothing" in text and "\n" not in text, text
    assert str(tmp_path / "cache") not in text
    made = {path for path in tree.state() if not re.search(r"/(cache|\.cache|\.config)\b", path)}
    assert made == {*before}
    assert not quick_server.buckets[BUCKET], [*quick_server.buckets[BUCKET]]

    if name in ("edit_bank list", "edit_bank verify", "prepare chats"):  # which tell otherwise
        return
    begun = Mirror(EMPTY, tmp_path / "maker")
    (begun.local / "tokenizer").mkdir()
    (begun.local / "tokenizer" / "tokenizer.json").write_text("{}")
    begun.publish("tokenizer")
    with pytest.raises(UserError) as caught:
        chosen.main(values)
    text = with_originals(str(caught.value)).partition(" (read from the copy")[0]
    assert EMPTY in text and "\n" not in text and str(tmp_path / "cache") not in text, text


def test_scripts_open_workdirs_by_their_mirror_alone() -> None:
    """A command with a workdir that may be in a bucket never takes its flag for a folder."""
    for path in sorted((ROOT / "launch").glob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            taken = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
            if taken and isinstance(node.left, ast.Attribute) and node.left.attr == "workdir":
                function = next(
                    f.name
                    for f in ast.walk(tree)
                    if isinstance(f, ast.FunctionDef)
                    and f.lineno <= node.lineno <= (f.end_lineno or 0)
                )
                named = f"{path.stem} {function}".removesuffix(" main")
                assert named in LOCAL, f"{path.name}:{node.lineno}"
    assert inspect.isfunction(cli.check_places)
