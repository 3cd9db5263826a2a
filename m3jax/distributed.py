"""Runs several processes as one: they connect, compare their configs, and end together.

JAX connects the processes and monitors their heartbeats, but aborts a process when others do not
connect or one of them dies. Here every such wait is bounded, and ends with a message that says what
is missing and what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
from ml_collections import ConfigDict

import m3jax
from m3jax.config import flatten
from m3jax.errors import ProcessError
from m3jax.files import json_text
from m3jax.private_apis import coordination_client, detect_cluster
from m3jax.watch import LONGEST_WAIT, ROOT, LastWords, Processes, Report, Watch, address_of
from m3jax.workdir import only_writer

_meetings = itertools.count()

Result = TypeVar("Result")


@contextlib.contextmanager
def joined(processes: Processes | None, config: ConfigDict, report: Report) -> Iterator[None]:
    """Connects this process with the others of a run while the block runs; ends all together.

    No device may have been used before. When the block ends normally, or by `SystemExit` with code
    0, this process waits until it has ended on all processes. When it fails, this process sends its
    error to the others and ends, and they end with exit code `PROCESS_LOST`, as they also do when a
    process dies without an error.

    Args:
      processes: addresses of the processes; None runs the block in this process alone.
      config: must be the same on all processes.
      report: shows an error and returns the exit code.

    Raises:
      ProcessError: no cluster is detected, the others do not answer in time, the port is taken, or
        another process has another config or version. Later failures end the process instead.
    """
    if processes is None:
        yield
        return
    end = time.monotonic() + processes.join_timeout
    processes = _detected(processes)
    # Errors that would crash JAX are checked before; its aborts are explained by `last_words`.
    if processes.index == 0:
        _check_port(processes)
    else:
        _wait_for_port(processes, end)
    with contextlib.closing(LastWords()) as last_words:
        _connect(processes, end, last_words)
        watch = Watch(processes)
        last_words.speak = watch.last_words
        try:
            _agree(processes, config)
            yield
        except BaseException as error:
            if not (isinstance(error, SystemExit) and error.code in (0, None)):
                watch.fail(error, report)
            _leave(watch)
            raise
        _leave(watch)


def meet(name: str) -> None:
    """Waits until all processes have called it (a barrier); uses no device.

    Needed before a first collective: collectives on CPUs fail when a process is 30 s late.

    Args:
      name: the same on all processes, which must call `meet` in the same order.
    """
    client = coordination_client()
    if client is not None and jax.process_count() > 1:
        client.wait_at_barrier(f"{ROOT}/meet/{next(_meetings)}/{name}", 1000 * LONGEST_WAIT)


def first_writes(folder: str | os.PathLike[str]) -> contextlib.AbstractContextManager[int | None]:
    """Locks a folder (`m3jax.workdir.only_writer`) by process 0, for all processes of the run."""
    return only_writer(folder) if jax.process_index() == 0 else contextlib.nullcontext()


def first_alone(work: Callable[[], Result], seen: Callable[[], object]) -> Result:
    """Calls `work` in process 0, then in the others, which reuse the files that process 0 made.

    Args:
      work: called by every process; each waits until all have finished it. Its result is returned.
      seen: called before `work` by all but process 0; raises if the files are not visible there.
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


def _leave(watch: Watch) -> None:
    """Waits for the other processes, which may still write files, and disconnects."""
    watch.wait_for_all()
    watch.close()
    jax.distributed.shutdown()


def _detected(processes: Processes) -> Processes:
    """Fills in the addresses from the cluster's environment, unless flags state them."""
    if processes.coordinator:
        return processes
    try:
        address, count, index, devices = detect_cluster(processes.join_timeout)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ProcessError(f"--distributed: the cluster gives no processes: {error}") from error
    if address is None or count is None or index is None:
        raise ProcessError(
            "--distributed: no TPU pod, Slurm, Open MPI or Kubernetes job found here; give"
            " --coordinator=HOST:PORT --processes=N --process_id=I, or leave it out to run one"
            " process"
        )
    return dataclasses.replace(
        processes, coordinator=address, count=count, index=index, devices=devices
    )


def _connect(processes: Processes, end: float, last_words: LastWords) -> None:
    """Connects all processes by `jax.distributed`, until the time `end` at the latest."""
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
        cluster_detection_method="deactivate",  # `_detected` has done it
        initialization_timeout=max(1, round(end - time.monotonic())),
        heartbeat_timeout_seconds=processes.heartbeat_timeout,
    )


def _check_port(processes: Processes) -> None:
    """Raises `ProcessError` if process 0 cannot listen at its port."""
    address = processes.coordinator
    _, port = address_of(address)
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        # Closed connections of an earlier run (TIME_WAIT) do not count; a listener does.
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
    """Waits until process 0 listens; raises `ProcessError` if it does not before `end`."""
    host, port = address_of(processes.coordinator)
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


def _agree(processes: Processes, config: ConfigDict) -> None:
    """Raises `ProcessError` on all processes if versions or configs differ from process 0's."""
    fields = {f"config.{path}": value for path, value in flatten(config).items()}
    facts = {"m3jax": m3jax.__version__, "jax": jax.__version__, **fields}
    client = coordination_client()
    client.key_value_set(f"{ROOT}/facts/{processes.index}", json_text(facts))
    everyone = []
    for index in range(processes.count):
        try:
            key = f"{ROOT}/facts/{index}"
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
