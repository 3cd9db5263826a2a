"""Runs scripts in forks of a process that has imported m3jax; see `processes.run_script`.

Importing JAX and what m3jax needs takes seconds, and tests of scripts start dozens of processes.
This one imports everything, and starts no thread and no backend of JAX. For each line of its input,
a JSON object, it forks; the fork has arguments, environment, folder and outputs of its own, as a
new interpreter has. The answer is its exit code.
"""

import atexit
import contextlib
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import threading
import time
import traceback
from typing import Any


def import_all() -> None:
    import m3jax.errors

    for module in pkgutil.walk_packages(m3jax.__path__, "m3jax."):
        with contextlib.suppress(ImportError, m3jax.errors.UserError):  # an extra is missing
            importlib.import_module(module.name)


def run(request: dict[str, Any]) -> None:
    """Makes this fork the process of a script, and ends it as an interpreter ends."""
    os.setsid()
    os.chdir(request["folder"])
    outputs = os.O_WRONLY | os.O_CREAT
    for number, path in enumerate((os.devnull, request["output"], request["errors"])):
        os.dup2(os.open(path, outputs if number else os.O_RDONLY), number)
    os.environ.clear()
    os.environ.update(request["environment"])
    configure_jax()
    if request["moment"] is not None:
        arm(**request["moment"])
    sys.argv = request["words"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    code: Any = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except Exception:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    # All of an interpreter's end but taking its modules apart, which takes more than a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def arm(folder: str, shared: str, at: int, fault: int) -> None:
    """Ends this process, or fills its disk, at a change of files; see `kills/moments.c`."""
    import ctypes

    ctypes.CDLL(None).moments_arm(
        os.fsencode(folder), os.fsencode(shared), ctypes.c_long(at), fault
    )


def configure_jax() -> None:
    """Gives JAX the variables that it reads when it is imported."""
    import jax

    for name, text in os.environ.items():
        old = jax.config.values.get(name.lower()) if name.startswith("JAX_") else None
        kind = str if old is None else type(old)
        if name.lower() in jax.config.values:
            value = text.lower() in ("1", "true") if kind is bool else kind(text)
            jax.config.update(name.lower(), value)


def wait(child: int, seconds: float) -> int:
    """Exit code of a fork, which is killed after some time; and whatever it has left is killed."""
    end, done = time.monotonic() + seconds, 0
    while not done:
        done, status = os.waitpid(child, os.WNOHANG)
        if not done and time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    import_all()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            run(request)
        print(wait(child, request["seconds"]), flush=True)


if __name__ == "__main__":
    main()
