"""Every benchmark at its smallest size, and the driver: what it shows and keeps, and when it
ends."""

import inspect
import itertools
import json
import os
import runpy
import signal
import time
from pathlib import Path

import processes
import pytest

from m3jax.bench import main
from m3jax.bench.main import BENCHMARKS, BROUGHT, Benchmark, run
from m3jax.bench.rounds import import_peer, quotients, timed
from m3jax.retrieval.search import import_scann

ROOT = Path(__file__).resolve().parents[2]
FAST = ("overlap", "bank")
EXPECTED = {
    "train": {"precomputed_over_warmup", "pipeline_over_precomputed", "guarded_over_plain"},
    "writer": {"encode_share"},
    "overlap": {"filter_over_windowed_row_512_train"},
    "bank": {"cold_over_pread", "compressed_over_bf16"},
    "checkpoint": {"checksums_over_save", "verify_over_restore"},
    "edits": {"edit_time", "open_time"},
    "quantizer": set(),
    "retrieval": {"recall_at_5", "time_over_exact"},
    "inference": {"explicit_over_none", "explicit_over_rag", "remote_over_none_1"},
}


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in BENCHMARKS],
)
def test_every_benchmark_runs_at_its_smallest_size(name, tmp_path):
    if name == "retrieval" and import_scann() is None:
        pytest.skip("ScaNN has no wheel here")
    file = tmp_path / "result.json"
    assert run(name, "smallest", count=1, json=file) == 0
    result = json.loads(file.read_text())
    assert EXPECTED[name] <= result["ratios"].keys()
    figures = {**result["ratios"], **result["seconds" if "seconds" in result else "ratios"]}
    assert figures.items() and all(value > 0 for value in figures.values())
    assert result["rounds"] == {"taken": 1, "of": 1, "ended": "the number of rounds"}


@pytest.fixture
def counting(monkeypatch):
    """A benchmark of rounds 0, 1, 2, …, which sets `closed` when it is ended."""
    state = {"closed": False, "seconds": 0.0, "signal": None}

    def rounds(step=1.0):
        try:
            for number in itertools.count():
                time.sleep(state["seconds"])
                if number == 3 and state["signal"]:
                    os.kill(os.getpid(), state["signal"])
                yield {"ratios": {"a_over_b": number * step}}
        finally:
            state["closed"] = True

    monkeypatch.setitem(main.BENCHMARKS, "counting", Benchmark(rounds, 5, {"step": 2.0}))
    return state


def test_medians_are_shown_and_written_after_every_round(counting, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert run("counting", json=file) == 0
    shown = capsys.readouterr().out
    medians = [line.split()[-1] for line in shown.splitlines() if line.startswith("round ")]
    assert medians == ["1", "1.5", "2", "2.5", "3"]  # the first round does not count
    result = json.loads(file.read_text())
    assert result["ratios"] == {"a_over_b": 3.0}
    assert result["spread"] == {"ratios": {"a_over_b": [1.0, 5.0]}}
    assert result["rounds"] == {"taken": 5, "of": 5, "ended": "the number of rounds"}
    assert result["environment"]["cores"] == os.cpu_count()
    assert counting["closed"] and "1 – 5" in shown


def test_sizes_and_options(counting, tmp_path):
    file = tmp_path / "result.json"
    for size, options, ratio in (
        ("smallest", {}, 2.0),
        ("full", {}, 1.0),
        ("full", {"step": 4}, 4),
    ):
        run("counting", size, count=1, json=file, workdir=None, **options)
        assert json.loads(file.read_text())["ratios"]["a_over_b"] == ratio


def test_no_round_begins_that_would_end_too_late(counting, tmp_path, capsys):
    counting["seconds"] = 0.2
    assert run("counting", count=100, minutes=1.0 / 60, json=tmp_path / "result.json") == 0
    state = json.loads((tmp_path / "result.json").read_text())["rounds"]
    assert 1 <= state["taken"] < 5 and state["ended"] == "--minutes=0.0166667"
    assert f"{state['taken']} of 100 rounds" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_measured_before_a_signal_is_kept(counting, tmp_path, number):
    counting["signal"] = number
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # by a shell's background
    before = signal.getsignal(number)
    file = tmp_path / "result.json"
    try:
        assert run("counting", json=file) == 130
        assert signal.getsignal(number) == before
    finally:
        signal.signal(signal.SIGINT, ignored)
    result = json.loads(file.read_text())
    assert result["ratios"] == {"a_over_b": 1.5}
    assert result["rounds"] == {"taken": 2, "of": 5, "ended": "a signal"}
    assert counting["closed"]


def test_the_script_runs_a_benchmark(tmp_path):
    command = ["python", "launch/bench.py", "overlap", "--size=smallest", "--rounds=2"]
    shown = processes.succeed([*command, f"--json={tmp_path}/result.json"])
    assert "round 2 of 2" in shown and "least – largest" in shown
    assert json.loads((tmp_path / "result.json").read_text())["rounds"]["taken"] == 2


def test_the_script_has_the_benchmarks_and_gives_them_what_they_take():
    commands = runpy.run_path(str(ROOT / "launch/bench.py"))["COMMANDS"]
    assert commands.keys() == BENCHMARKS.keys()
    shared = {flag.name for flag in commands["writer"].flags}
    for name, command in commands.items():
        own = {flag.name for flag in command.flags} - shared
        assert ("picture" in own) == (BENCHMARKS[name].draw is not None)
        taken = {*inspect.signature(BENCHMARKS[name].rounds).parameters}
        if name in BROUGHT:
            taken |= inspect.signature(BROUGHT[name].rounds).parameters.keys()
        assert own - {"picture"} <= taken


def test_a_bank_on_a_disk_is_no_url(tmp_path):
    command = ["python", ROOT / "launch" / "bench.py", "bank", f"--bank={tmp_path}"]
    done = processes.call(command)
    assert done.returncode == 2 and "takes the URL of a bank" in done.stderr
    assert "Traceback" not in done.stderr


def test_calls_are_timed_in_turn():
    called = []

    def long():
        called.append("A")
        time.sleep(0.02)

    seconds = timed({"long": long, "short": lambda: called.append("B")}, turns=4)
    assert "".join(called) == "ABBA" * 2
    assert seconds["long"] >= 0.02 > seconds["short"]
    assert quotients(seconds, "long_over_short", "long_over_missing").keys() == {"long_over_short"}
    assert timed({"sleep": long}, clock=time.process_time)["sleep"] < 0.02


def test_a_missing_peer_is_left_out_with_the_remedy(capsys):
    assert import_peer("a_over_b", "math") == [__import__("math")]
    assert import_peer("a_over_b", "no_such_peer") is None
    shown = capsys.readouterr().err
    assert "without a_over_b: no_such_peer is not installed: pip install" in shown
