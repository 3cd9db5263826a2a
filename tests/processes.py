"""Processes that tests start: each in a group of its own, which ends with the test."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quick import xla_flags

ROOT = Path(__file__).parents[1]
# Seconds after which a process hangs: many times what any takes, at any load.
HANG = 1800.0
_started: list[subprocess.Popen] = []
_forks: subprocess.Popen | None = None


def start(
    command: Sequence[object], devices: int | None = None, inherit: bool = True, **options: Any
) -> Any:
    """Starts a process that can import m3jax and the tests, in a session of its own.

    Args:
      command: words, of any type; "python" as the first is this interpreter.
      devices: virtual ones of JAX; None: as many as here.
      inherit: whether it has the variables of this process besides those of `env`.
      options: of `subprocess.Popen`; outputs are pipes of text and the folder is the repository's
        if they do not say otherwise.
    """
    words = [str(word) for word in command]
    if words[0] == "python":
        words[0] = sys.executable
    environment = _environment(devices, inherit, options.pop("env", {}))
    pipe = subprocess.PIPE
    options = {"stdout": pipe, "stderr": pipe, "text": True, "cwd": ROOT, **options}
    process = subprocess.Popen(words, env=environment, start_new_session=True, **options)
    _started.append(process)
    return process


def _environment(
    devices: int | None = None, inherit: bool = True, changes: Mapping[str, object] = {}
) -> dict[str, str]:
    environment = {}
    if inherit:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    if devices is not None:
        environment["XLA_FLAGS"] = xla_flags(devices)
    return environment | {name: str(value) for name, value in changes.items()}


@functools.cache
def moments() -> Path | None:
    """The library of `kills/moments.c`, compiled; None where it cannot be."""
    if sys.platform != "linux" or not shutil.which("cc"):
        return None
    library = Path(tempfile.mkdtemp(prefix="moments")) / "moments.so"
    source = ROOT / "tests" / "kills" / "moments.c"
    done = subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"])
    return None if done.returncode else library


def run_script(
    script: str,
    *arguments: object,
    devices: int | None = None,
    moment: Mapping[str, object] | None = None,
    **environment: object,
) -> subprocess.CompletedProcess:
    """Runs a Python script to its end, in a process that need not import m3jax.

    See `forked.py`. `moment`: arguments of its `arm`. A test that kills a process at any other
    moment, or talks with it, takes `start`.
    """
    global _forks
    if _forks is None:
        pipe = subprocess.PIPE
        command = [sys.executable, str(ROOT / "tests" / "forked.py")]
        preload = {} if moments() is None else {"LD_PRELOAD": moments()}
        _forks = subprocess.Popen(
            command, env=_environment(changes=preload), stdin=pipe, stdout=pipe, text=True, cwd=ROOT
        )
    assert _forks.stdin is not None and _forks.stdout is not None
    words = [script, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        output, errors = (Path(folder) / name for name in ("output", "errors"))
        request = {
            **{"words": words, "folder": str(ROOT), "seconds": HANG},
            **{"output": str(output), "errors": str(errors)},
            "environment": _environment(devices, changes=environment),
            "moment": moment,
        }
        _forks.stdin.write(json.dumps(request) + "\n")
        _forks.stdin.flush()
        code = int(_forks.stdout.readline())
        return subprocess.CompletedProcess(words, code, output.read_text(), errors.read_text())


def end_forks() -> None:
    """Ends the process that `run_script` forks."""
    if _forks is not None:
        _forks.communicate()


def finish(process: subprocess.Popen, text: str | None = None) -> subprocess.CompletedProcess:
    """Gives a process `text` to read and waits for its end; exit code and outputs."""
    output, errors = process.communicate(text, timeout=HANG)
    _end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def call(
    command: Sequence[object], text: str | None = None, **options: Any
) -> subprocess.CompletedProcess:
    """Runs a process to its end; arguments as for `start` and `finish`."""
    if text is not None:
        options["stdin"] = subprocess.PIPE
    return finish(start(command, **options), text)


def succeed(command: Sequence[object], **options: Any) -> str:
    """Runs a process to an end without error; what it printed."""
    done = call(command, **options)
    assert done.returncode == 0, f"{done.args}: {done.stderr}"
    return str(done.stdout)


def wait_until(happened: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Returns when something has happened while processes run; fails when one has ended before."""
    end = time.monotonic() + HANG
    while not happened():
        for process in processes:
            if process.poll() is not None and not happened():
                raise AssertionError(f"ended too early: {process.args}, {process.communicate()}")
        assert time.monotonic() < end, "does not happen"
        time.sleep(0.002)


def end_all() -> None:
    """Kills what is left of the groups of all started processes."""
    for process in list(_started):
        _end(process)


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    _started.remove(process)
