"""Errors of the user end with the message alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from m3jax import launching
from m3jax.config import ConfigError

ROOT = Path(__file__).parents[1]


def failing(error):
    def main(argv):
        raise error

    return launching.guarded(main)


def test_user_error_ends_with_its_message(capsys):
    with pytest.raises(SystemExit) as caught:
        failing(ConfigError("config.seed = -1"))(["script"])
    assert caught.value.code == launching.USER_ERROR
    assert capsys.readouterr().err == "ConfigError: config.seed = -1\n"


def test_defects_keep_their_traceback():
    with pytest.raises(ValueError, match="from a library"):
        failing(ValueError("from a library"))(["script"])


def test_train_script_refuses_a_bad_config(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "train.py"), f"--workdir={tmp_path}"]
    command += ["--config=configs/wiki_small.py", "--config.mesh.fsdp=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == launching.USER_ERROR, done.stderr
    assert done.stderr.strip() == "ConfigError: config.mesh.fsdp = 0: must be -1 or at least 1"
