"""Monitors the processes of a run: heartbeats, reported failures, and an exit with a message."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import jax

from m3jax.errors import ProcessError
from m3jax.private_apis import coordination_client

PROCESS_LOST = 3  # exit code of a process whose run lost another process
ROOT = "m3jax"  # prefix of keys in the store of JAX's coordination service
LONGEST_WAIT = 3600  # seconds that the first process at a barrier waits for the last
_MARGIN = 5.0  # seconds that a failed process stays alive, so that others can read its error
_AGAIN = "The same command, on all processes, continues from what was saved"

Report = Callable[[BaseException], int]


def address_of(coordinator: str) -> tuple[str, int]:
    """Parses `HOST:PORT`; raises `ProcessError` if it is malformed."""
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ProcessError(
            f"--coordinator={coordinator}: not HOST:PORT, for example 10.0.0.1:8476, the address of"
            " process 0 and a free port there"
        )
    return host.strip("[]"), int(port)


class Watch:
    """Sends heartbeats of this process, and ends it when another process reports a failure.

    JAX's own heartbeats decide that a process is dead; the heartbeats here identify the process.
    """

    def __init__(self, processes: Processes):
        self.me, self.count, self.processes = processes.index, processes.count, processes
        self.name = f"process {self.me} of {self.count}"
        self.interval = min(2.0, processes.heartbeat_timeout / 20)
        self._beats: dict[int, tuple[str, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="m3jax-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client, beat = coordination_client(), 0
        while True:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # without its service JAX exits
                client.key_value_set(f"{ROOT}/beat/{self.me}", str(beat), allow_overwrite=True)
                beat += 1
                for index, text in self._read("beat").items():
                    if self._beats.get(index, ("", 0.0))[0] != text:
                        self._beats[index] = (text, time.monotonic())
                failed = self._read("failed")
                failed.pop(self.me, None)
                if failed and not self._stop.is_set():
                    self._end_because(failed)
            if self._stop.wait(self.interval):
                return

    def _read(self, folder: str) -> dict[int, str]:
        pairs = coordination_client().key_value_dir_get(f"{ROOT}/{folder}/")
        return {int(key.rpartition("/")[2]): value for key, value in pairs}

    def _end_because(self, failed: Mapping[int, str]) -> None:
        index, reason = min(failed.items())
        _say(
            f"{self.name}: process {index} failed, so this one ends: {reason}. When that is solved,"
            " the same command continues from what was saved"
        )
        self._mark("ended", "")
        os._exit(PROCESS_LOST)

    def _mark(self, folder: str, text: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            coordination_client().key_value_set(
                f"{ROOT}/{folder}/{self.me}", text, allow_overwrite=True
            )

    def fail(self, error: BaseException, report: Report) -> None:
        """Shows an error by `report`, sends it to the other processes, and ends this one."""
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._wait_for_cause()
        self._stop.set()
        code = report(error)
        self._mark("failed", f"{type(error).__name__}: {_first_line(error)}")
        end = time.monotonic() + _MARGIN
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            # Process 0 holds the messages that other processes read: it ends last.
            while self.me == 0 and time.monotonic() < end:
                if len(self._read("failed").keys() | self._read("ended").keys()) == self.count:
                    break
                time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _wait_for_cause(self) -> None:
        """Waits until a new heartbeat of every process has come, within bounded time.

        If one is dead, JAX or `_run` ends this process meanwhile and names it: an error of the
        runtime may be a consequence of that death, because collectives break first.
        """
        start = time.monotonic()
        while time.monotonic() < start + self.processes.heartbeat_timeout + _MARGIN:
            time.sleep(self.interval / 2)
            beats = [when for _, when in list(self._beats.values())]
            if len(beats) == self.count and min(beats) > start + self.interval:
                return

    def last_words(self) -> str | None:
        """Returns a message that names dead processes when JAX aborts this one; None if none is."""
        address, timeout = self.processes.coordinator, self.processes.heartbeat_timeout
        # JAX checks heartbeats every half timeout. When it gives up, a dead process has been silent
        # for nearly that long; a live one has sent a heartbeat in the last two intervals.
        limit = time.monotonic() - timeout / 4
        beats = sorted(self._beats.items())
        silent = [index for index, (_, when) in beats if when < limit]
        # Heartbeats of all other processes come through process 0.
        if self.me != 0 and (0 in silent or not _answers(address)):
            return (
                f"{self.name}: process 0, at {address}, is gone: it died, or its host or network"
                f" did. {_AGAIN}"
            )
        if not silent:
            return None
        names = " and ".join(f"process {index}" for index in silent)
        return (
            f"{self.name}: no sign of life from {names} for {timeout} seconds: it died, or its"
            f" host or network did. {_AGAIN}"
        )

    def wait_for_all(self) -> None:
        """Waits until all processes have called it; `_run` or JAX ends this one if another dies."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            coordination_client().wait_at_barrier(f"{ROOT}/end", 1000 * LONGEST_WAIT)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def _answers(address: str) -> bool:
    try:
        socket.create_connection(address_of(address), timeout=2.0).close()
    except OSError:
        return False
    return True


class LastWords:
    """Handles SIGABRT: prints why JAX aborts this process and exits with `PROCESS_LOST` instead.

    Attributes:
      speak: returns the message, or None if the abort has another cause and must proceed.
    """

    def __init__(self) -> None:
        self.speak: Callable[[], str | None] = lambda: None
        # Not `signal.signal`: its handlers run in the main thread, for which abort does not wait.
        self._signal = ctypes.CDLL(None).signal
        self._signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        self._signal.restype = ctypes.c_void_p
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._handle)  # kept alive here
        pointer = ctypes.cast(self._handler, ctypes.c_void_p)
        self._previous = self._signal(signal.SIGABRT, pointer)

    def _handle(self, number: int) -> None:
        self.close()
        try:
            words = self.speak()
        except Exception as error:
            words = f"aborted ({error!r})"
        if words is not None:
            _say(words)
            os._exit(PROCESS_LOST)

    def close(self) -> None:
        self._signal(signal.SIGABRT, self._previous)


def _say(text: str) -> None:
    """Writes an error to stderr directly: Python's buffers may never be flushed again."""
    os.write(2, f"\nProcessError: {text}\n".encode())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:500]


@dataclasses.dataclass(frozen=True)
class Processes:
    """Addresses of the processes of a run.

    Attributes:
      coordinator: `HOST:PORT` at which process 0 listens; "": the cluster (TPU pod, Slurm, Open
        MPI, Kubernetes) states it, and `count`, `index` and `devices`.
      count: number of processes.
      index: number of this process, from 0.
      join_timeout: seconds to wait for the other processes at the start.
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead.
      devices: numbers of the local devices that this process uses; None uses all of them.
    """

    coordinator: str = ""
    count: int = 0
    index: int = 0
    join_timeout: int = 300
    heartbeat_timeout: int = 100
    devices: Sequence[int] | None = None

    @classmethod
    def of_flags(
        cls,
        *,
        distributed: bool,
        coordinator: str | None,
        processes: int | None,
        process_id: int | None,
        join_timeout: int,
        heartbeat_timeout: int,
    ) -> Processes | None:
        """Makes the addresses from the flags of a launch script; None for a single process.

        Raises:
          ProcessError: flags contradict each other, are missing or out of range; names them.
        """
        timeouts = join_timeout, heartbeat_timeout
        flags = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
        given = ", ".join(f"--{name}" for name, value in flags.items() if value is not None)
        missing = ", ".join(f"--{name}" for name, value in flags.items() if value is None)
        if distributed and given:
            raise ProcessError(
                f"--distributed asks the cluster for everything; leave out {given}, or leave out"
                " --distributed"
            )
        if not given:
            return cls("", 0, 0, *timeouts) if distributed else None
        if coordinator is None or processes is None or process_id is None:
            raise ProcessError(
                f"{given} given, but not {missing}: several processes need --coordinator=HOST:PORT"
                " --processes=N --process_id=I; on a TPU pod or under Slurm --distributed alone"
            )
        address_of(coordinator)
        if process_id >= processes:
            raise ProcessError(
                f"--process_id={process_id}: must be in 0…{processes - 1}, as"
                f" --processes={processes}"
            )
        return cls(coordinator, processes, process_id, *timeouts)
