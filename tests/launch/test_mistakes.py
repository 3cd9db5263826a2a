"""Every flag of every command of every launch script, with every mistake that its kind allows.

Flags are collected from the scripts, so that a new one is covered. A mistake ends with one line
that names the flag, exit code 2 and no new file; names with odd characters work.
"""

import dataclasses
import os
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from ml_collections import ConfigDict

from m3jax import cli
from m3jax.cli import Command, Flag
from m3jax.places import Place

ROOT = Path(__file__).parents[2]
SCRIPTS = {path.stem: runpy.run_path(str(path)) for path in sorted((ROOT / "launch").glob("*.py"))}
NAMED = {
    f"{script} {name}".strip(): command
    for script, scope in SCRIPTS.items()
    for name, command in scope["COMMANDS"].items()
}
IDS, COMMANDS = list(NAMED), list(NAMED.values())
CONFIG = f"{ROOT}/configs/wiki_small.py"
ODD = "a [1] %#ü?*&'!"
BINARY = bytes(range(256)) * 8


@dataclasses.dataclass
class Tree:
    """A home folder with things of every sort, as the current folder."""

    home: Path

    def __post_init__(self) -> None:
        (self.home / ODD / "folder").mkdir(parents=True)
        (self.home / "folder" / "inside").mkdir(parents=True)
        for name in ("file", "link.to", f"{ODD}/file", "folder/of.jsonl", f"{ODD}/folder/a.jsonl"):
            (self.home / name).write_text('{"text": "a"}\n')
        (self.home / "binary").write_bytes(BINARY)
        (self.home / "other.json").write_text('[{"learning_rate": NaN}, null, "\\ud800"]')
        (self.home / "link").symlink_to("link.to")
        (self.home / "link to folder").symlink_to("folder")
        (self.home / "dangling").symlink_to("missing")
        (self.home / "circle").symlink_to("circle")
        os.mkfifo(self.home / "pipe")

    def state(self) -> dict[str, tuple[int, int]]:
        """Names, and of files also sizes and times of change, of all that is there."""
        entries = {str(path): path.lstat() for path in self.home.rglob("*") if not path.is_dir()}
        folders = {str(path): (0, 0) for path in self.home.rglob("*") if path.is_dir()}
        sizes = {name: (entry.st_size, entry.st_mtime_ns) for name, entry in entries.items()}
        return sizes | folders


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return Tree(tmp_path)


def mistakes(flag: Flag) -> Iterator[str]:
    """Values that a flag must refuse."""
    kind = flag.kind
    if kind is bool:
        yield from ("maybe", "2")
    elif kind in (int, float):
        yield from ("x", "1 000", "0x", "1e", "--", *([] if flag.many else [""]))
        yield from ("nan", "inf", "-inf", "1" * 400)
        if kind is int:
            yield from ("1.5", "1e3", *([] if flag.high else ["9223372036854775808"]))
        if flag.low is not None:
            yield str(int(flag.low) - 1)
        if flag.high is not None:
            yield str(int(flag.high) + 1)
    elif flag.choices:
        yield from ("neither", "\udcff", f"{flag.choices[0]} ,x")
    elif kind is str:
        yield "a\udcffb"
        if flag.default is None and not flag.many:
            yield ""
    elif kind is ConfigDict:
        yield from ("missing.py", "folder", "gs://bucket/x.py", "s3:/x.py", "~nosuchuser/x.py", "")
        yield from ("binary", "other.json", "dangling", "circle", "a" * 300, "file/x.py", "\udcff")
        yield from (f"{CONFIG}:stgae=continual", f"{CONFIG}:stage=contniual", f"{CONFIG}:,x=1:y")
    else:
        assert isinstance(kind, Place)
        optional = flag.many and not flag.required  # an empty list is one
        yield from (v for v in wrong_places(kind) if v.strip() or not optional)


def wrong_places(place: Place) -> Iterator[str]:
    """Values that a path of a sort must refuse."""
    yield from ("", " ", "~nosuchuser/x", "~nosuchuser", "file/below", "circle", "a" * 300)
    yield from ("x\udcff", "nul\0", "az://bucket/x", "hdfs:/x")
    yield from {f"{name}://host/x" for name in ("gs", "s3", "http", "file")} - {
        f"{name}://host/x" for name in place.schemes
    }
    yield from {f"{name}:/host/x" for name in ("gs", "s3", "http", "file")}
    if place.exists:
        yield from ("missing", "missing/below", "dangling", f"{ODD}/missing", "~/missing")
    if place.written:
        yield from ("/proc/x", "/proc/x/y", "dangling/below", "a" * 250)
        yield ("/" + "/".join(["a" * 200] * 20))[:3900]
    if place.holds == "file":
        yield from ("folder", "~", ".", "link to folder", ODD, "/")
    if place.holds == "folder":
        yield from ("file", "link", "~/file", f"{ODD}/file", "/dev/null")
    if place.holds == "file" and place.written:
        yield from ("/dev/null", "pipe")


def right_places(place: Place) -> Iterator[str]:
    """Values that a path of a sort must accept: there, or to be made."""
    if place.holds != "folder":
        yield from (f"{ODD}/file", f"~/{ODD}/file", "./file", f"folder/../{ODD}/file", "link")
    if place.holds != "file":
        yield from (ODD, f"~/{ODD}", f"~/{ODD}/", f"./{ODD}/folder", "link to folder", "~", ".")
    if place.written:
        yield from (f"{ODD}/new/x", f"~/new/{ODD}", "link to folder/new")
    if place.holds == "file" and place.written:
        yield "dangling"
    yield from (f"{name}://bucket/{ODD}" for name in place.schemes)


def read(flag: Flag, value: str) -> Any:
    """The value of a flag, checked, as a command that takes no other flag gets it."""
    command = Command(print, (flag,))
    values = flags.FlagValues()
    cli.parse("Script.", {"": command}, ["script.py", f"--{flag.name}={value}"], values)
    cli.check_places(command, values)
    return values[flag.name].value


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_mistakes_are_refused_by_name(
    command: Command, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    before, wrong = tree.state(), []
    for flag in command.flags:
        for value in mistakes(flag):
            try:
                read(flag, value)
                code, shown = 0, "accepted"
            except Exception as error:
                code = cli.show_error(error)
                shown = capsys.readouterr().err
            named = f"--{flag.name}" in shown or ascii(f"--{flag.name}={value}") in shown
            if flag.kind is ConfigDict and ":" in value:
                named = named or "config option" in shown
            if value == "other.json":  # it fails as it runs
                named = named or "other.json:1: " in shown
            if code != cli.USER_ERROR or shown.count("\n") != 1 or not named or len(shown) > 1200:
                wrong.append(f"--{flag.name}={value!a:.60} → {code}: {shown[-300:]}")
    assert not wrong, "\n".join(wrong)
    assert tree.state() == before


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_every_path_has_a_sort(command: Command) -> None:
    """By the words of its help: what speaks of files is a path, and one to write is written."""
    for flag in command.flags:
        about = flag.help.split(". ")[0]
        if flag.kind is str:
            assert not re.search(r"\b([Ff]iles?|[Ff]olders?|[Ww]orkdir|\.jsonl)\b", about), about
        if isinstance(flag.kind, Place):
            to_write = re.search(r"to write|for the table|are kept|it makes|made where", about)
            reads = re.match("Folder or URL of a bank|.*must not hold", about)
            assert reads or flag.kind.written == bool(to_write), (flag.name, about)


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_odd_names_are_accepted(command: Command, tree: Tree) -> None:
    before = tree.state()
    for flag in command.flags:
        if not isinstance(flag.kind, Place):
            continue
        for value in right_places(flag.kind):
            value = value.replace(",", "")
            path = read(flag, value)
            path = path[0] if isinstance(path, list) else path
            assert ("://" in value) == (str(path) == value and "://" in str(path))
            if "://" not in value:
                expected = os.path.realpath(os.path.expanduser(value))
                assert os.path.realpath(path) == expected, (flag.name, value)
                assert "~" not in str(path)
    assert tree.state() == before
