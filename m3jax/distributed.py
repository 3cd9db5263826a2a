"""Several processes as one run: they meet, agree, watch one another, and end together.

JAX connects the processes and watches their heartbeats, but ends a process by `abort` when the
others do not come or one of them is gone. Here every such end has a bound, and words that say what
is missing and what to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax._src import clusters
from jax._src import distributed as jax_distributed
from ml_collections import ConfigDict

import m3jax

PROCESS_LOST = 3  # exit code of a process whose run lost another process
_ROOT = "m3jax"  # of our keys in the store of JAX's coordination service
_MARGIN = 5.0  # seconds that a failed process stays, so that the others can read why
_LONGEST_WAIT = 3600  # seconds that the first process at a meeting waits for the last
_AGAIN = "The same command, on all processes, continues from what was saved"

_meetings = itertools.count()

Report = Callable[[BaseException], int]
Result = TypeVar("Result")


class ProcessError(ValueError):
    """The processes cannot work together. The message names the process, the value, the remedy."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """How this process finds the others.

    Attributes:
      coordinator: `HOST:PORT` of process 0, where it listens; None: ask the cluster (TPU pod,
        Slurm, Open MPI, Kubernetes).
      count: number of processes; None as above.
      index: which one this is, from 0; None as above.
      join_timeout: seconds to wait for the others at the start.
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead.
      devices: numbers of the local devices that this process uses; None: all, or the cluster's.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    join_timeout: int = 300
    heartbeat_timeout: int = 100
    devices: tuple[int, ...] | None = None

    @staticmethod
    def of_flags(
        distributed: bool,
        coordinator: str | None,
        count: int | None,
        index: int | None,
        *,
        join_timeout: int,
        heartbeat_timeout: int,
    ) -> Processes | None:
        """What the flags of a launch script ask for; None for a process on its own.

        Raises:
          ProcessError: flags that do not go together, or a value out of range; names the flag.
        """
        flags = {"--coordinator": coordinator, "--processes": count, "--process_id": index}
        given = [name for name, value in flags.items() if value is not None]
        missing = [name for name in flags if name not in given]
        timeouts = {"join_timeout": join_timeout, "heartbeat_timeout": heartbeat_timeout}
        for name, seconds in timeouts.items():
            if seconds < 1:
                raise ProcessError(f"--{name}={seconds}: must be at least 1 second")
        if distributed and given:
            raise ProcessError(
                f"--distributed asks the cluster for everything; leave out {', '.join(given)}, or"
                " leave out --distributed"
            )
        if not given:
            found = Processes(join_timeout=join_timeout, heartbeat_timeout=heartbeat_timeout)
            return found if distributed else None
        if missing:
            raise ProcessError(
                f"{', '.join(given)} given, but not {', '.join(missing)}: several processes need"
                " --coordinator=HOST:PORT --processes=N --process_id=I; on a TPU pod or under"
                " Slurm --distributed alone"
            )
        assert coordinator is not None and count is not None and index is not None
        _address(coordinator)
        if count < 1:
            raise ProcessError(f"--processes={count}: must be at least 1")
        if not 0 <= index < count:
            raise ProcessError(
                f"--process_id={index}: must be in 0…{count - 1}, as --processes={count}"
            )
        return Processes(coordinator, count, index, join_timeout, heartbeat_timeout)


@contextlib.contextmanager
def joined(processes: Processes | None, config: ConfigDict, report: Report) -> Iterator[None]:
    """Makes this process one of several while the block runs; ends them together.

    Nothing may have used a device before. A block that ends normally, or by `SystemExit` with code
    0, waits until it has ended everywhere. If it fails, this process tells the others why and ends,
    and they end with `PROCESS_LOST`; so they do when a process dies without a word.

    Args:
      processes: how to find the others; None runs the block in this process alone.
      config: must be the same on all processes.
      report: shows an error and returns the exit code.

    Raises:
      ProcessError: the others do not answer in time, the port is taken, or they have another
        config or version. What happens later ends the process.
    """
    if processes is None:
        yield
        return
    end = time.monotonic() + processes.join_timeout
    processes = _detected(processes)
    # What would make JAX crash is tried before; what makes it abort is explained by last words.
    if processes.index == 0:
        _check_port(processes)
    else:
        _wait_for_port(processes, end)
    with contextlib.closing(_LastWords()) as last_words:
        _connect(processes, end, last_words)
        watch = _Watch(processes)
        last_words.speak = watch.last_words
        try:
            _agree(processes, _facts(config))
            yield
        except BaseException as error:
            if not (isinstance(error, SystemExit) and error.code in (0, None)):
                watch.fail(error, report)
            _leave(watch)
            raise
        _leave(watch)


def meet(name: str) -> None:
    """Returns when all processes have called this; uses no device.

    Before a first collective, because those of CPUs give up when a process comes 30 s late.

    Args:
      name: the same on all processes; all of them meet in the same order.
    """
    client = _client()
    if client is not None and jax.process_count() > 1:
        client.wait_at_barrier(f"{_ROOT}/meet/{next(_meetings)}/{name}", 1000 * _LONGEST_WAIT)


def first_alone(work: Callable[[], Result], seen: Callable[[], object]) -> Result:
    """Calls `work` in process 0, then in the others, which find done what needs doing once.

    Args:
      work: the same on all processes. Nobody goes on before all have done it.
      seen: called by the others before; raises where they do not see what process 0 did.
    """
    if jax.process_index() == 0:
        result = work()
        meet("first done")
    else:
        meet("first done")
        seen()
        result = work()
    meet("others done")
    return result


def _leave(watch: _Watch) -> None:
    """Waits for the others, which may still write, and disconnects."""
    watch.wait_for_all()
    watch.close()
    jax.distributed.shutdown()


def _detected(processes: Processes) -> Processes:
    """The same with what the cluster knows filled in."""
    if processes.coordinator is not None:
        return processes
    try:
        address, count, index, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, processes.join_timeout
        )
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ProcessError(f"--distributed: the cluster gives no processes: {error}") from error
    if address is None or count is None or index is None:
        raise ProcessError(
            "--distributed: no TPU pod, Slurm, Open MPI or Kubernetes job found here; give"
            " --coordinator=HOST:PORT --processes=N --process_id=I, or leave it out to run one"
            " process"
        )
    return dataclasses.replace(
        processes,
        coordinator=address,
        count=count,
        index=index,
        devices=None if devices is None else tuple(devices),
    )


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ProcessError(
            f"--coordinator={coordinator}: not HOST:PORT, for example 10.0.0.1:8476, the address of"
            " process 0 and a free port there"
        )
    return host.strip("[]"), int(port)


def _connect(processes: Processes, end: float, last_words: _LastWords) -> None:
    """JAX's connection of all processes."""
    address, index, timeout = processes.coordinator, processes.index, processes.join_timeout
    last_words.speak = lambda: (
        f"process {index} of {processes.count}: {address} answers, but not all processes met there"
        f" within {timeout} seconds. Start all {processes.count} of them, each with its own"
        " process id; or something else listens at that port, or a firewall closes it"
    )
    jax.distributed.initialize(
        address,
        processes.count,
        index,
        local_device_ids=processes.devices,
        cluster_detection_method="deactivate",  # it was asked before
        initialization_timeout=max(1, round(end - time.monotonic())),
        heartbeat_timeout_seconds=processes.heartbeat_timeout,
    )


def _check_port(processes: Processes) -> None:
    """Refuses a port that cannot be opened."""
    address = processes.coordinator
    assert address is not None
    _, port = _address(address)
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        # The rest of a connection of an earlier run does not count; a listener does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            raise ProcessError(
                f"process 0 cannot listen at port {port} of {address} ({error.strerror}): end what"
                " uses it, perhaps an earlier run, or give all processes another port"
            ) from error


def _wait_for_port(processes: Processes, end: float) -> None:
    """Waits until process 0 listens."""
    assert processes.coordinator is not None
    host, port = _address(processes.coordinator)
    while True:
        try:
            left = end - time.monotonic()
            socket.create_connection((host, port), timeout=max(0.1, min(5.0, left))).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise ProcessError(
                    f"process {processes.index} of {processes.count}: the coordinator"
                    f" {processes.coordinator} does not answer within {processes.join_timeout}"
                    f" seconds ({error}). Check that process 0 runs, that its address and port are"
                    " these, and that no firewall is between"
                ) from error
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))


def _facts(config: ConfigDict) -> dict[str, Any]:
    """What has to be the same on all processes."""
    facts: dict[str, Any] = {"m3jax": m3jax.__version__, "jax": jax.__version__}

    def add(prefix: str, tree: Mapping[str, Any]) -> None:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                add(f"{prefix}{name}.", value)
            else:
                facts[prefix + name] = value

    add("config.", config.to_dict())
    return facts


def _agree(processes: Processes, facts: Mapping[str, Any]) -> None:
    """Refuses other facts than those of process 0, on all processes alike."""
    client = _client()
    client.key_value_set(f"{_ROOT}/facts/{processes.index}", json.dumps(facts))
    assert processes.count is not None
    everyone = []
    for index in range(processes.count):
        try:
            key = f"{_ROOT}/facts/{index}"
            text = client.blocking_key_value_get(key, 1000 * processes.join_timeout)
        except jax.errors.JaxRuntimeError as error:
            raise ProcessError(
                f"process {index} came, but did not say its config within {processes.join_timeout}"
                " seconds; see its messages"
            ) from error
        everyone.append(json.loads(text))
    for index, theirs in enumerate(everyone):
        for name in sorted(theirs.keys() | everyone[0].keys()):
            there, first = (side.get(name, "absent") for side in (theirs, everyone[0]))
            if there != first:
                raise ProcessError(
                    f"process {index} has {name} = {there!r}, but process 0 has {first!r}; start"
                    " all processes with the same version and command but for --process_id"
                )


def _client() -> Any:
    return jax_distributed.global_state.client


class _Watch:
    """Says every few seconds that this process lives, and hears of others that failed.

    JAX's own heartbeats decide whether a process is dead; those here tell which one it was.
    """

    def __init__(self, processes: Processes):
        assert processes.index is not None and processes.count is not None
        self.me, self.count, self.processes = processes.index, processes.count, processes
        self.interval = min(2.0, processes.heartbeat_timeout / 20)
        self._beats: dict[int, tuple[str, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="m3jax-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client, beat = _client(), 0
        while True:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # JAX ends what has no service
                client.key_value_set(f"{_ROOT}/beat/{self.me}", str(beat), allow_overwrite=True)
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
        pairs = _client().key_value_dir_get(f"{_ROOT}/{folder}/")
        return {int(key.rpartition("/")[2]): value for key, value in pairs}

    def _end_because(self, failed: Mapping[int, str]) -> None:
        index, reason = min(failed.items())
        _say(
            f"{self._name}: process {index} failed, so this one ends: {reason}. When that is"
            " solved, the same command continues from what was saved"
        )
        self._mark("ended", "")
        os._exit(PROCESS_LOST)

    @property
    def _name(self) -> str:
        return f"process {self.me} of {self.count}"

    def _mark(self, folder: str, text: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set(f"{_ROOT}/{folder}/{self.me}", text, allow_overwrite=True)

    def fail(self, error: BaseException, report: Report) -> None:
        """Tells the others why this process ends, and ends it."""
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._wait_for_cause()
        self._stop.set()
        code = report(error)
        self._mark("failed", f"{type(error).__name__}: {_first_line(error)}")
        end = time.monotonic() + _MARGIN
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            # Process 0 holds what the others read: it goes last.
            while self.me == 0 and time.monotonic() < end:
                if len(self._read("failed").keys() | self._read("ended").keys()) == self.count:
                    break
                time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _wait_for_cause(self) -> None:
        """Returns when the others live; else JAX, or `_run`, ends this process and names the cause.

        An error of the runtime may be the echo of another process's death: collectives break first.
        """
        start = time.monotonic()
        while time.monotonic() < start + self.processes.heartbeat_timeout + _MARGIN:
            time.sleep(self.interval / 2)
            beats = [when for _, when in list(self._beats.values())]
            if len(beats) == self.count and min(beats) > start + self.interval:
                return

    def last_words(self) -> str | None:
        """Who is missing, at the moment in which JAX ends this process; None if nobody is."""
        address, timeout = self.processes.coordinator, self.processes.heartbeat_timeout
        assert address is not None
        # JAX hears of a process every half of the timeout: a dead one has been silent for nearly as
        # long when its time is up, a living one was heard of in the last two intervals.
        limit = time.monotonic() - timeout / 4
        beats = sorted(self._beats.items())
        silent = [index for index, (_, when) in beats if when < limit]
        # All others are heard of through process 0.
        if self.me != 0 and (0 in silent or not _answers(address)):
            return (
                f"{self._name}: process 0, at {address}, is gone: it died, or its host or network"
                f" did. {_AGAIN}"
            )
        if not silent:
            return None
        names = " and ".join(f"process {index}" for index in silent)
        return (
            f"{self._name}: no sign of life from {names} for {timeout} seconds: it died, or its"
            f" host or network did. {_AGAIN}"
        )

    def wait_for_all(self) -> None:
        """Returns when all processes are here; `_run` or JAX ends the wait when one dies."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().wait_at_barrier(f"{_ROOT}/end", 1000 * _LONGEST_WAIT)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def _answers(address: str) -> bool:
    try:
        socket.create_connection(_address(address), timeout=2.0).close()
    except OSError:
        return False
    return True


class _LastWords:
    """Explains an `abort` of JAX and turns it into an exit code.

    Attributes:
      speak: returns what to say, or None when the abort has another cause: then it goes on.
    """

    def __init__(self) -> None:
        self.speak: Callable[[], str | None] = lambda: None
        # Not `signal.signal`: its handlers wait for the main thread, which an abort does not.
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
    """Past Python's buffers, which nobody may empty any more."""
    os.write(2, f"\nProcessError: {text}\n".encode())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:500]
