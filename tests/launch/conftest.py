"""Fixtures of the tests of launch/tpu_vm.sh."""

import shutil

import pytest
from launch.tpu_cloud import TOOLS, Cloud


@pytest.fixture
def bare(tmp_path):
    """A folder for PATH with what the script needs, and no gcloud."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for tool in TOOLS.split():
        (folder / tool).symlink_to(str(shutil.which(tool)))
    return folder


@pytest.fixture
def cloud(tmp_path):
    if shutil.which("setsid") is None or shutil.which("git") is None:
        pytest.skip("the workers' part needs setsid, as on Linux, and git")
    return Cloud(tmp_path)
