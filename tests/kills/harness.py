"""Runs a command killed before its k-th change of files, and again; compares what is left."""

import hashlib
import json
import mmap
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import processes
import tensorstore as ts
from kills.commands import STATES, Killed, write_inputs
from train.tiny import TIMES

KILL, FULL, CLOSED = 1, 2, 3  # as in moments.c
_CLOCKS = (*TIMES, "crc32c")  # of a line of metrics, whose checksum covers them
# What differs between two undisturbed runs: pictures' times, checksums of metrics with clocks, and
# random names of Orbax.
_UNLIKE = re.compile(
    r"/tensorboard/.*|/meta/metadata$|/checksums\.json$|/_CHECKPOINT_METADATA$|/d/[0-9a-f]{32}$|/manifest\.ocdbt$|\.png$"
)


def snapshot(folder: Path) -> dict[str, str]:
    """Content of every file by its path, and of every folder nothing; times are left out."""
    content = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name == "lock":  # held by a descriptor: a file that is left locks nobody out
            continue
        if _UNLIKE.search(name):
            content[_UNLIKE.sub("", name)] = "unlike"
        elif path.is_dir():
            content[name] = "folder"
        elif path.name == "metrics.jsonl":
            content[name] = str(_metrics(path))
        else:
            content[name] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        if path.name == "manifest.ocdbt":
            content[f"{name}/arrays"] = _arrays(path.parent)
    return content


def _metrics(path: Path) -> list[dict]:
    """The last line of each step, without clocks."""
    lines: dict[tuple, dict] = {}
    for text in path.read_text().splitlines():
        line = {key: value for key, value in json.loads(text).items() if key not in _CLOCKS}
        if line.keys() != {"step"}:
            lines[line["step"], "evaluation" in line] = line
    return [lines[key] for key in sorted(lines)]


def _arrays(folder: Path) -> str:
    """Digest of what a checkpoint's database holds."""
    store = ts.KvStore.open(f"file://{folder}/|ocdbt:").result()
    total = hashlib.blake2b(digest_size=8)
    for key in sorted(store.list().result()):
        total.update(key + store.read(key).result().value)
    return total.hexdigest()


class Place:
    """A workdir that is put back into a state again and again, and the inputs beside it."""

    def __init__(self, folder: Path) -> None:
        self.inputs, self.workdir = folder / "inputs", folder / "run"
        self._states, self._shared = folder / "states", folder / "moments"
        write_inputs(self.inputs)

    def state(self, name: str) -> Path:
        """The folder of a state, which is made by the commands that lead to it."""
        folder = self._states / name
        if not folder.exists():
            before, commands = STATES[name]
            if before:
                self.begin(before)
            else:
                self.workdir.mkdir()
            for command in commands:
                script, *words = command.split()
                if script == "rm":
                    (self.workdir / words[0]).unlink()
                    continue
                script, _, stage = script.partition(":")
                flags = ("workdir",) if script == "convert.py" else ("config", "workdir")
                done = self.run(script, *words, options=stage and f":stage={stage}", flags=flags)
                assert done.returncode == 0, (command, done.stderr)
            folder.parent.mkdir(exist_ok=True)
            self.workdir.rename(folder)
        return folder

    def begin(self, state: str) -> None:
        """Makes the workdir what it is in a state."""
        source = self.state(state)
        shutil.rmtree(self.workdir, ignore_errors=True)
        shutil.copytree(source, self.workdir)

    def run(
        self,
        script: str,
        *words: str,
        options: str = "",
        flags: Sequence[str] = ("config", "workdir"),
        at: int | None = None,
        fault: int = KILL,
    ) -> subprocess.CompletedProcess:
        """Runs a command to its end, or to its change of files number `at`; 0 counts them."""
        values = {"config": f"{self.inputs}/config.py{options}", "workdir": self.workdir}
        named = [f"--{name}={values[name]}" for name in flags]
        places = {"input": self.inputs, "workdir": self.workdir, "states": self._states}
        filled = [word.format(**places) for word in words]
        first = 1 if filled and not filled[0].startswith("-") else 0
        moment = None
        if at is not None:
            self._shared.write_bytes(bytes(_SIZE))
            shared = str(self._shared)
            moment = {"folder": str(self.workdir), "shared": shared, "at": at, "fault": fault}
        arguments = [*filled[:first], *named, *filled[first:]]
        return processes.run_script(f"launch/{script}", *arguments, devices=1, moment=moment)

    def moments(self) -> list[str]:
        """What the last armed run did to files, up to its end."""
        with self._shared.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as m:
            count = int.from_bytes(m[:8], "little")
            lines = m[8 : m.find(b"\0", 8)].decode(errors="replace").splitlines()
        return lines + ["?"] * (count - len(lines))


_SIZE = 8 + (1 << 20) + 8


def _lines(done: subprocess.CompletedProcess) -> list[str]:
    """The messages of a command; none if there is a traceback."""
    lines = [line for line in done.stderr.splitlines() if re.match(r"\w+Error: ", line)]
    return [] if "Traceback" in done.stderr else lines


class Trial:
    """A command from a state: undisturbed, then killed at any moment and run again."""

    def __init__(self, place: Place, script: str, command: str, killed: Killed) -> None:
        self.place, self.killed = place, killed
        self.words = [f"{script}.py", *filter(None, [command]), *shlex.split(killed.words)]
        self.expected: dict[str, str] = {}

    def undisturbed(self, fault: int = KILL) -> list[str]:
        """Runs the command to its end; the moments at which it could have been killed."""
        if self.killed.also:
            self.place.state(self.killed.also)
        self.place.begin(self.killed.state)
        done = self._run(at=0, fault=fault)
        assert done.returncode == 0, (self.words, done.stderr)
        self.expected = snapshot(self.place.workdir)
        return self.place.moments()

    def killed_at(self, at: int) -> str:
        """Kills the command and runs it again; what is wrong then, or nothing."""
        self.place.begin(self.killed.state)
        done = self._run(at=at)
        moment = f"before {at}: {(self.place.moments() or ['?'])[-1]}"
        if done.returncode not in (-9, 0):  # threads: now and then it ends with fewer changes
            return f"{moment}: ended with {done.returncode}: {done.stderr[-500:]}"
        return self._again(moment)

    def full_at(self, at: int) -> str:
        """Fills the disk and runs the command again when there is room."""
        self.place.begin(self.killed.state)
        done = self._run(at=at, fault=FULL)
        moment = f"full at {at}: {[*self.place.moments(), '?'][:at][-1]}"
        if done.returncode == 0:  # a report or picture, which is no loss
            return self._again(moment)
        if len(_lines(done)) != 1 or done.returncode != 2:
            return f"{moment}: code {done.returncode}: {done.stderr[-1500:]}"
        return self._again(moment)

    def closed_at(self, at: int) -> str:
        """Refuses to open more files and runs the command again when it may."""
        self.place.begin(self.killed.state)
        done = self._run(at=at, fault=CLOSED)
        moment = f"closed at {at}: {[*self.place.moments(), '?'][:at][-1]}"
        lines = _lines(done)
        named = [line.startswith("MachineError: Too many open files") for line in lines] == [True]
        if done.returncode and (done.returncode != 2 or not named):
            return f"{moment}: code {done.returncode}: {done.stderr[-1500:]}"
        return self._again(moment)

    def _again(self, moment: str) -> str:
        done = self._run()
        if done.returncode:
            return f"{moment}: again, code {done.returncode}: {done.stderr[-1000:]}"
        now = snapshot(self.place.workdir)
        names = sorted({*now, *self.expected})
        unlike = [
            f"{name} {now.get(name, 'missing')}, expected {self.expected.get(name, 'nothing')}"
            for name in names
            if now.get(name) != self.expected.get(name)
        ]
        return f"{moment}: {', '.join(unlike[:6])}" if unlike else ""

    def _run(self, **fault: int) -> subprocess.CompletedProcess:
        killed = self.killed
        return self.place.run(*self.words, options=killed.options, flags=killed.flags, **fault)
