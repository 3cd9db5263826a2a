"""Paths that a user gives: homes, links, lists, and folders that may not be read or written."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from m3jax import places
from m3jax.config.fields import FIELDS
from m3jax.config_files import PATHS
from m3jax.errors import CommandError
from m3jax.places import check_path, read_path

NOBODY = 65534


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A folder in which this process, for the test not root, may neither read nor write."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    (folder / "secret").mkdir()
    (folder / "secret" / "file").write_text("a")
    (folder / "file").write_text("a")
    (folder / "file").chmod(0)
    (folder / "secret").chmod(0)
    folder.chmod(0o555)
    before = os.geteuid()
    with contextlib.ExitStack() as stack:
        if before == 0:
            stack.callback(os.seteuid, before)
            os.seteuid(NOBODY)
        yield folder
    for path in (folder, folder / "secret"):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "place", "words"),
    [
        ("file", places.FILE, "cannot be read: Permission denied"),
        ("secret", places.FOLDER, "cannot be read: Permission denied"),
        ("secret/file", places.FILE, "cannot be read: Permission denied"),
        ("secret", places.WORKDIR, "cannot be read: Permission denied"),
        ("secret/new", places.NEW_FOLDER, "cannot be made: Permission denied"),
        ("new", places.NEW_FOLDER, "cannot be made: Permission denied"),
        ("new/below", places.NEW_FILE, "cannot be made: Permission denied"),
        ("", places.NEW_FOLDER, "cannot be written: Permission denied"),
        ("secret/file", places.NEW_FILE, "cannot be made: Permission denied"),
    ],
)
def test_folders_of_another_user_are_refused(
    foreign: Path, name: str, place: places.Place, words: str
) -> None:
    path = read_path("--a", str(foreign / name), place)
    with pytest.raises(CommandError, match=f"^--a {words}$"):
        check_path("--a", path, place)


def test_a_list_has_files_globs_and_names_of_data_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.txt", "b[1].txt"):
        (tmp_path / name).write_text("a")
    spec = read_path("--a", "~/a.txt, tfds:wiki:train ,~/b[1].txt,~/*.txt", places.TEXTS)
    parts = [f"{tmp_path}/a.txt", "tfds:wiki:train", f"{tmp_path}/b[1].txt", f"{tmp_path}/*.txt"]
    assert spec == ",".join(parts)
    check_path("--a", spec, places.TEXTS)
    for wrong, words in (("c.txt", "there is no such file"), ("*.csv", "no file matches")):
        with pytest.raises(CommandError, match=words):
            check_path("--a", f"{spec},{tmp_path}/{wrong}", places.TEXTS)


def test_a_file_is_written_where_its_link_leads(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    assert read_path("--a", tmp_path / "link", places.NEW_FILE) == tmp_path / "target"
    assert read_path("--a", tmp_path / "link", places.FILE) == tmp_path / "link"


@pytest.mark.parametrize("value", ["train", "validation"])
def test_values_that_are_no_paths_stay(value: str) -> None:
    assert read_path("--a", value, places.FILE_OR_SPLIT) == value
    assert read_path("--a", "module.of:name", places.FOLDER_OR_FUNCTION) == "module.of:name"


def test_every_field_of_a_folder_is_a_path() -> None:
    named = {name for name, (_, meaning, _) in FIELDS.items() if "folder" in meaning}
    assert named - set(PATHS) == {"stage", "retrieval.pooling"} and set(PATHS) <= named
