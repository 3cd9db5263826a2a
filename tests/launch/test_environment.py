"""The interpreter that launch/environment.sh takes for a new environment."""

from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[2]
# Answers the question of is_python for a version in its place.
FAKE_PYTHON = """#!/bin/bash
case "$1 ${2:-}" in
  "-c import ensurepip"*) [[ VERSION == "$3"* && VERSION != 3.10* ]] ;;
  "-c import sys"*) echo VERSION ;;
  "--version "*) echo "Python VERSION" ;;
  "-m venv") /bin/mkdir -p "$3/bin" && /bin/cp "$0" "$3/bin/python" ;;
  "-m pip") echo "${@:2}" >>"$HOME/pip" ;;
esac
"""
FAKE_PYENV = """#!/bin/bash
[[ -d "$HOME/pyenv/$2" ]] && echo "$HOME/pyenv/$2"
"""


@pytest.fixture
def place(tmp_path):
    """Makes fake interpreters, by path and version."""

    def make(**versions):
        for name, version in versions.items():
            path = tmp_path / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(FAKE_PYTHON.replace("VERSION", version))
            path.chmod(0o755)
        return tmp_path

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pyenv").write_text(FAKE_PYENV)
    (tmp_path / "bin/pyenv").chmod(0o755)
    for tool in ("dirname", "cat", "cksum"):
        (tmp_path / "bin" / tool).symlink_to(Path("/usr/bin") / tool)
    return make


def call(folder, command, **environment):
    """Runs a bash command with the functions of the script, in a home with the fakes alone."""
    command = f"set -euo pipefail; source {ROOT}/launch/environment.sh; {command}"
    environment = {"PATH": f"{folder}/bin", "HOME": folder, **environment}
    return processes.call(["/bin/bash", "-c", command], inherit=False, env=environment)


def test_the_newest_that_works_is_taken(place):
    folder = place(bin__python3="3.10.4")
    nothing = call(folder, "find_python")
    assert nothing.returncode == 1 and "M3JAX_PYTHON" in nothing.stderr and not nothing.stdout
    place(bin__python3="3.14.1")
    assert call(folder, "find_python").stdout == "python3\n"
    place(bin__python3_11="3.11.9")
    assert call(folder, "find_python").stdout == "python3.11\n"
    place(pyenv__3_12__bin__python="3.12.1")
    assert call(folder, "find_python").stdout == f"{folder}/pyenv/3.12/bin/python\n"
    place(bin__python3_13="3.10.0")  # a shim with another behind it
    assert call(folder, "find_python").stdout == f"{folder}/pyenv/3.12/bin/python\n"
    place(bin__python3_13="3.13.0")
    assert call(folder, "find_python").stdout == "python3.13\n"


def test_the_named_one_is_taken_or_refused(place):
    folder = place(bin__python3_13="3.13.0", bin__python3_11="3.11.9", bin__old="3.10.0")
    assert call(folder, "find_python", M3JAX_PYTHON="python3.11").stdout == "python3.11\n"
    refused = call(folder, "find_python", M3JAX_PYTHON="old")
    assert refused.returncode == 1 and "M3JAX_PYTHON=old is no Python 3.11" in refused.stderr


def test_a_home_in_quotes_is_one(place):
    folder = place(bin__python3_13="3.13.0")
    made = call(folder, "prepare_environment test; echo $python", M3JAX_VENV="~/a venv [1]")
    assert (made.returncode, made.stdout) == (0, f"{folder}/a venv [1]/bin/python\n"), made.stderr
    assert not (folder / "~").exists() and (folder / "a venv [1]").is_dir()


def test_an_environment_is_made_once_and_says_with_what(place):
    folder = place(bin__python3_13="3.13.0", bin__python3_11="3.11.9")
    venv = {"M3JAX_VENV": str(folder / "venv")}
    made = call(folder, "prepare_environment test", **venv)
    assert made.returncode == 0 and "with Python 3.13.0 (python3.13)" in made.stderr
    again = call(folder, "prepare_environment test; echo $python", **venv)
    assert (again.stdout, again.stderr) == (f"{folder}/venv/bin/python\n", "")
    other = call(folder, "prepare_environment test constraints-beam.txt", **venv)
    assert "installing m3jax[test]" in other.stderr
    calls = (folder / "pip").read_text().splitlines()
    assert [line.split(" -c ")[1] for line in calls] == [
        f"{ROOT}/{name} -e {ROOT}[test]" for name in ("constraints.txt", "constraints-beam.txt")
    ]
    mixed = call(folder, "prepare_environment test", **venv, M3JAX_PYTHON="python3.11")
    assert mixed.returncode == 1 and "has Python 3.13.0, not that of M3JAX_PYTHON" in mixed.stderr
