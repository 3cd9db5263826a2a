"""Tests pass on every processor and at every load: what they may not do."""

import ast
import importlib
import re
from collections.abc import Callable
from pathlib import Path

import processes
import psutil
import pytest

from m3jax.errors import InferenceError

TESTS = Path(__file__).parent
REPLACED = {"allclose", "isclose", "assert_allclose", "assert_almost_equal"}


def absolute(node: ast.AST) -> bool:
    """Whether a comparison has a tolerance that knows nothing of the size of the numbers."""
    if isinstance(node, ast.Attribute):
        return node.attr in REPLACED
    if isinstance(node, ast.Call):
        return any(keyword.arg in ("atol", "abs") for keyword in node.keywords)
    if isinstance(node, ast.Compare) and isinstance(node.ops[-1], ast.Lt | ast.LtE):
        limit = node.comparators[-1]
        small = isinstance(limit, ast.Constant) and 0 < limit.value < 0.01
        calls = [part.func for part in ast.walk(node.left) if isinstance(part, ast.Call)]
        return small and any(ast.unparse(call).split(".")[-1] == "abs" for call in calls)
    return False


def starts_process(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) in {
        *("subprocess.Popen", "subprocess.run", "subprocess.check_output", "os.system"),
        "multiprocessing.Process",
    }


def test_processes_end_with_the_test_that_started_them() -> None:
    """Use `start`, `call` or `succeed` of tests/processes.py instead."""
    assert not seen(starts_process, but="processes.py")


def test_what_a_process_started_ends_with_it() -> None:
    """A process that is killed leaves its own child, and one that hangs is ended."""
    sleeper = "import subprocess, sys; print(subprocess.Popen(['sleep', '1000']).pid, flush=True)"
    process = processes.start(["python", "-c", sleeper + "; sys.stdin.read()"], stdin=-1)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert psutil.pid_exists(child)
    processes.end_all()
    processes.wait_until(lambda: not _runs(child))


def _runs(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_programs_in_strings_import_what_there_is() -> None:
    """No linter sees what a test gives an interpreter of its own."""
    line = re.compile(r"^ *(?:from|import) (m3jax[\w.]*)(?: import \(?([\w, ]+))?", re.MULTILINE)
    for path in sorted(TESTS.rglob("*.py")):
        for name, parts in line.findall(path.read_text(encoding="utf-8")):
            try:
                module = importlib.import_module(name)
            except InferenceError:  # needs an extra
                continue
            for part in filter(None, (word.split(" as ")[0].strip() for word in parts.split(","))):
                if not hasattr(module, part):
                    importlib.import_module(f"{name}.{part}")


def seen(refused: Callable[[ast.AST], bool], but: str) -> list[str]:
    """Places of the tests, `but` one file, that are refused."""
    return [
        f"{path.relative_to(TESTS)}:{line}"
        for path in sorted(TESTS.rglob("*.py"))
        if path.name != but
        for line in lines_of(path.read_text(encoding="utf-8"), refused)
    ]


def lines_of(text: str, refused: Callable[[ast.AST], bool]) -> list[int]:
    return [node.lineno for node in ast.walk(ast.parse(text)) if refused(node)]


def test_tolerances_are_relative_to_the_size_of_the_array() -> None:
    """Use `close` of tests/tolerance.py instead."""
    assert not seen(absolute, but="tolerance.py")


@pytest.mark.parametrize(
    "text",
    [
        "np.testing.assert_allclose(a, b)",
        "assert np.allclose(a, b, 1e-5)",
        "assert a == pytest.approx(b, abs=1e-5)",
        "assert equal(a, b, atol=1e-5)",
        "assert abs(a - b) < 1e-5",
        "assert np.abs(a - b).max() <= 1e-3",
    ],
)
def test_absolute_tolerances_are_seen(text: str) -> None:
    assert lines_of(text, absolute) == [1]


@pytest.mark.parametrize(
    "text", ["close(a, b, 1e-3)", "assert a == approx(b, rel=1e-3)", "assert abs(a) > 1e-3"]
)
def test_others_are_accepted(text: str) -> None:
    assert not lines_of(text, absolute)
