"""Every command that writes, killed before a change of files or with a full disk, and run again.

It goes on, ends with the same exit code, and leaves what an undisturbed run leaves: no file more,
none less, none other. A sample of the moments is tried; every one of them with
`bash launch/test.sh --kills`.
"""

import os
import random
import runpy
import shlex
from collections.abc import Iterator
from typing import Any

import processes
import pytest
from kills.commands import COMMANDS, READERS, Killed, commands
from kills.harness import CLOSED, FULL, KILL, Place, Trial
from processes import ROOT

ALL = os.environ.get("M3JAX_KILLS") == "all"
SAMPLE = {KILL: 2, FULL: 1, CLOSED: 1}  # moments of a command
FAULTS = {"killed": KILL, "full": FULL, "closed": CLOSED}


def trials() -> Iterator[Any]:
    """Parameters of every trial: fault, script, command and how it is called."""
    for fault, number in FAULTS.items():
        readers = READERS if number == CLOSED else {}
        for (script, command), calls in [*COMMANDS.items(), *readers.items()]:
            for i, killed in enumerate(() if isinstance(calls, str) else calls):
                name = " ".join(filter(None, (fault, script, command, str(i), killed.state)))
                marks = [pytest.mark.every] if killed.slow else []
                yield pytest.param(number, script, command, killed, id=name, marks=marks)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if processes.moments() is None:
        pytest.skip("needs Linux and a C compiler")
    yield Place(tmp_path_factory.mktemp("kills"))


def test_every_command_is_killed_or_says_why_not() -> None:
    assert set(commands()) == set(COMMANDS)


def test_every_flag_exists() -> None:
    """Of the commands, also of those that run on request alone."""
    for (script, command), calls in [*COMMANDS.items(), *READERS.items()]:
        for killed in () if isinstance(calls, str) else calls:
            own = runpy.run_path(str(ROOT / "launch" / f"{script}.py"))["COMMANDS"][command].flags
            names = {flag.name for flag in own} | {"workdir"}
            given = [word for word in shlex.split(killed.words) if not word.startswith("--config.")]
            assert {word[2:].partition("=")[0] for word in given} <= names, (script, given)


def chosen(count: int, sample: int, name: str) -> list[int]:
    """Numbers of the moments to try, of 1 to `count`."""
    numbers = range(1, count + 1)
    return sorted(random.Random(name).sample(numbers, count if ALL else min(count, sample)))


@pytest.mark.parametrize(("fault", "script", "command", "killed"), list(trials()))
def test_it_goes_on(
    place: Place, fault: int, script: str, command: str, killed: Killed, request: Any
) -> None:
    trial, name = Trial(place, script, command, killed), request.node.name
    moments = trial.undisturbed(fault)
    attempt = {KILL: trial.killed_at, FULL: trial.full_at, CLOSED: trial.closed_at}[fault]
    problems = [attempt(number) for number in chosen(len(moments), SAMPLE[fault], name)]
    print(len(problems), "of", len(moments), "moments")
    assert not list(filter(None, problems))
