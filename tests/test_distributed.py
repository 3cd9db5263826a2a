"""Several processes: flags, how they meet, and what they say when they do not."""

import faulthandler
import signal
import socket
import subprocess
import time
from pathlib import Path

import processes
import pytest

from m3jax import cli, distributed
from m3jax.config import default
from m3jax.distributed import joined
from m3jax.errors import ProcessError
from m3jax.watch import PROCESS_LOST, Processes, Watch

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys, time
from m3jax import cli
from m3jax.config import default
from m3jax.distributed import joined
from m3jax.watch import Processes

address, count, index, task = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config = default()
config.seed = index if task == "seeds" else 0
join = 2 if task == "lonely" else 600
processes = Processes(address, count, index, join_timeout=join, heartbeat_timeout=20)
with joined(processes, config, cli.show_error):
    if task == "fail" and index == 1:
        raise OSError("no such disk")
    if task == "abort" and index == 1:
        import os
        os.abort()
    if task == "fail":
        time.sleep(60)
    print("ended well", flush=True)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def start(task, count, indices):
    """Processes of SCRIPT; for each its exit code and what it printed."""
    address = f"localhost:{free_port()}"
    started = [
        processes.start(
            ["python", "-c", SCRIPT, address, count, index, task], stderr=subprocess.STDOUT
        )
        for index in indices
    ]
    ended = [processes.finish(process) for process in started]
    return [(done.returncode, done.stdout) for done in ended]


def of_flags(**given):
    flags = dict.fromkeys(("coordinator", "processes", "process_id"))
    flags |= {"distributed": False, "join_timeout": 7, "heartbeat_timeout": 9}
    return Processes.of_flags(**(flags | given))


def test_flags_name_the_processes():
    assert of_flags() is None
    assert of_flags(distributed=True) == Processes(join_timeout=7, heartbeat_timeout=9)
    flags = {"coordinator": "[::1]:80", "processes": 4, "process_id": 3}
    assert of_flags(**flags) == Processes("[::1]:80", 4, 3, 7, 9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "a:1"}, "--coordinator given, but not --processes, --process_id"),
        (
            {"processes": 2, "process_id": 0},
            "--processes, --process_id given, but not --coordinator",
        ),
        ({"distributed": True, "process_id": 0}, "leave out --process_id"),
        ({"coordinator": "a", "processes": 2, "process_id": 0}, "--coordinator=a: not HOST:PORT"),
        ({"coordinator": "a:70000", "processes": 2, "process_id": 0}, "a:70000: not HOST:PORT"),
        ({"coordinator": "a:1", "processes": 2, "process_id": 2}, "--process_id=2: must be in 0…1"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message):
    with pytest.raises(ProcessError, match=message):
        of_flags(**flags)


def enter(processes):
    with joined(processes, default(), cli.show_error):
        raise AssertionError("joined nobody")


def test_a_coordinator_that_does_not_answer_ends_the_wait():
    address, began = f"localhost:{free_port()}", time.monotonic()
    with pytest.raises(ProcessError, match=f"coordinator {address} does not answer within 1 sec"):
        enter(Processes(address, 2, 1, join_timeout=1))
    assert time.monotonic() - began >= 1
    with pytest.raises(ProcessError, match=r"nowhere.invalid:80 .*Check that process 0 runs"):
        enter(Processes("nowhere.invalid:80", 2, 1, join_timeout=1))


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ProcessError, match=f"cannot listen at port {port} of localhost:{port}"):
            enter(Processes(f"localhost:{port}", 2, 0))


def test_no_cluster_is_an_error(monkeypatch):
    nothing = (None, None, None, None)
    monkeypatch.setattr(distributed, "detect_cluster", lambda _: nothing)
    with pytest.raises(ProcessError, match="no TPU pod, Slurm, Open MPI or Kubernetes job found"):
        enter(Processes())


def test_one_process_needs_nobody():
    ran = []
    with joined(None, default(), cli.show_error):
        ran.append(faulthandler.is_enabled())
    assert ran


@pytest.mark.slow
def test_processes_that_agree_end_together():
    for code, text in start("agree", 2, [0, 1]):
        assert code == 0 and "ended well" in text, text


@pytest.mark.slow
def test_another_config_is_refused_by_name():
    ended = start("seeds", 2, [0, 1])
    assert {code for code, _ in ended} <= {cli.USER_ERROR, PROCESS_LOST}
    for _, text in ended:
        assert "process 1 has config.seed = 1, but process 0 has 0" in text
        assert "Traceback" not in text and "ended well" not in text


@pytest.mark.slow
def test_the_others_hear_why_a_process_failed():
    (lost, text), (failed, trace) = start("fail", 2, [0, 1])
    assert (lost, failed) == (PROCESS_LOST, 1), text + trace
    assert "process 1 failed, so this one ends: OSError: no such disk" in text
    assert "Traceback" in trace and "OSError: no such disk" in trace


@pytest.mark.slow
def test_an_abort_of_another_kind_stays_one():
    _, (code, text) = start("abort", 2, [0, 1])
    assert code == -signal.SIGABRT and "ProcessError" not in text, text


@pytest.mark.slow
def test_a_process_whose_others_do_not_come_ends():
    [(code, text)] = start("lonely", 2, [0])
    assert code == PROCESS_LOST, text
    assert "not all processes met there within 2 seconds. Start all 2 of them" in text


@pytest.mark.parametrize("timeout", [8, 100])
def test_who_was_silent_when_jax_gives_up(timeout: int) -> None:
    """JAX may have heard of a dead process half a timeout before it died; the living beat on."""
    watch = object.__new__(Watch)
    watch.me, watch.count, watch.name = 0, 2, "process 0 of 2"
    watch.processes = distributed.Processes("localhost:1", 2, 0, heartbeat_timeout=timeout)
    interval = min(2.0, timeout / 20)
    now = time.monotonic()
    watch._beats = {0: ("9", now), 1: ("7", now - (timeout / 2 - 2 * interval))}
    words = watch.last_words()
    assert words is not None and f"process 1 for {timeout} seconds" in words
    watch._beats[1] = ("9", now - 2 * interval)
    assert watch.last_words() is None
