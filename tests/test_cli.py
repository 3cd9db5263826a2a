"""Errors of the user end with the message alone."""

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from m3jax import cli
from m3jax.errors import ConfigError

ROOT = Path(__file__).parents[1]


def failing(error):
    def main(argv):
        raise error

    return cli.guarded(main)


def test_user_error_ends_with_its_message(capsys):
    with pytest.raises(SystemExit) as caught:
        failing(ConfigError("config.seed = -1"))(["script"])
    assert caught.value.code == cli.USER_ERROR
    assert capsys.readouterr().err == "ConfigError: config.seed = -1\n"


def test_defects_keep_their_traceback():
    with pytest.raises(ValueError, match="from a library"):
        failing(ValueError("from a library"))(["script"])


@pytest.fixture
def cache_flag(monkeypatch):
    """Sets --compilation_cache, and puts JAX's folder back in the end."""
    before = jax.config.jax_compilation_cache_dir
    flags = types.SimpleNamespace(compilation_cache=None)
    monkeypatch.setattr(cli.flags, "FLAGS", flags)
    yield lambda folder: setattr(flags, "compilation_cache", str(folder))
    jax.config.update("jax_compilation_cache_dir", before)


def test_compilation_cache_is_made_and_used(cache_flag, tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    cli.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.chdir(tmp_path)
    cache_flag("some/cache")
    cli.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "some" / "cache")
    assert (tmp_path / "some" / "cache").is_dir()


def test_compilation_cache_that_cannot_be_used_is_refused(cache_flag, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    cache_flag(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"--compilation_cache=.*/file: File exists"):
        cli.use_compilation_cache()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cache_flag("gs://bucket/cache")
    with pytest.raises(ConfigError, match="gs://bucket/cache: pip install gcsfs"):
        cli.use_compilation_cache()


def test_train_script_refuses_a_bad_config(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "train.py"), f"--workdir={tmp_path}"]
    command += ["--config=configs/wiki_small.py", "--config.mesh.fsdp=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == cli.USER_ERROR, done.stderr
    assert done.stderr.strip() == "ConfigError: config.mesh.fsdp = 0: must be -1 or at least 1"


def test_a_workdir_in_a_bucket_is_refused():
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--workdir=gs://bucket/run"]
    command.append(f"--config={ROOT / 'configs' / 'quickstart.py'}")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == cli.USER_ERROR
    assert "--workdir=gs://bucket/run: workdirs in buckets are not supported yet" in done.stderr
