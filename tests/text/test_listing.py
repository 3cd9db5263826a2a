"""Files of a spec: what a folder holds is read or named, nothing is read twice."""

import gzip
import json
import os

import pytest

from m3jax.errors import TextError
from m3jax.text.documents import read_documents
from m3jax.text.listing import inputs_of, list_files


def write(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts or ["t"]))
    return path


def names(spec, **options):
    return [part.name for part in list_files(str(spec), **options).parts]


def test_hidden_names_and_other_endings_are_left_out_and_named(tmp_path):
    write(tmp_path / "docs.jsonl")
    write(tmp_path / ".ipynb_checkpoints" / "docs-checkpoint.jsonl")
    write(tmp_path / "a" / ".git" / "b" / "c.jsonl")
    write(tmp_path / ".hidden.jsonl")
    write(tmp_path / "a" / "UPPER.JSONL.gz").write_bytes(gzip.compress(b'{"text": "t"}'))
    for number in range(5):
        (tmp_path / f"{number}.csv").touch()
    (tmp_path / "README.md").touch()
    (tmp_path / "c.json").touch()
    listing = list_files(str(tmp_path))
    assert [part.name for part in listing.parts] == ["a/UPPER.JSONL.gz", "docs.jsonl"]
    counts = {reason: len(paths) for reason, paths in listing.left_out.items()}
    assert counts == {
        "hidden folders": 2,
        "hidden files": 1,
        "files of other endings": 5,
        "files that are read only where they are named": 2,
    }
    for word in (".ipynb_checkpoints", "files of other endings (5: ", "0.csv", "and 2 more"):
        assert word in listing.describe()
    assert list_files(str(tmp_path / "docs.jsonl")).describe() == ""


def test_named_files_and_globs_may_have_more_endings(tmp_path):
    for name in ("a.md", "b.txt.zst", "c.json", "d.jsonl", "e.csv"):
        (tmp_path / name).touch()
    listing = list_files(str(tmp_path / "*"))
    assert [part.form for part in listing.parts] == [".md", ".txt", ".json", ".jsonl"]
    assert listing.left_out == {"files of other endings": [str(tmp_path / "e.csv")]}
    assert names(tmp_path / "*", rows_only=True) == ["c.json", "d.jsonl"]
    assert names(tmp_path, rows_only=True) == ["d.jsonl"]
    assert names(tmp_path / "a.md") == ["a.md"]
    for name in ("a.md", "e.csv"):
        with pytest.raises(TextError, match=f"{name} has an unknown ending; accepted: .jsonl"):
            list_files(str(tmp_path / name), rows_only=True)
    with pytest.raises(TextError, match=r"tfds:lm1b is a data set of documents"):
        list_files("tfds:lm1b", rows_only=True)


def test_folders_of_a_glob_are_read_too(tmp_path):
    write(tmp_path / "x" / "a" / "docs.jsonl")
    write(tmp_path / "y" / "docs.jsonl")
    write(tmp_path / "z.jsonl")
    assert names(tmp_path / "*") == ["z.jsonl", "x/a/docs.jsonl", "y/docs.jsonl"]
    assert names(tmp_path / "**" / "*.jsonl") == ["x/a/docs.jsonl", "y/docs.jsonl", "z.jsonl"]
    assert names(tmp_path / "*" / "docs.jsonl") == ["y/docs.jsonl"]


def test_links_are_followed_and_nothing_is_read_twice(tmp_path):
    outside, top = tmp_path / "outside", tmp_path / "top"
    write(outside / "far.jsonl")
    write(top / "near.jsonl")
    (top / "folder").symlink_to(outside)
    (top / "again").symlink_to(outside)
    (top / "file.jsonl").symlink_to(outside / "far.jsonl")
    (top / "so hard.jsonl").hardlink_to(top / "near.jsonl")
    (top / "loop").symlink_to(top)
    (top / "gone.jsonl").symlink_to(tmp_path / "nothing")
    os.mkfifo(top / "pipe.jsonl")
    listing = list_files(str(top))
    assert len(listing.parts) == 2
    assert {os.path.realpath(part.path) for part in listing.parts} == {
        *(str(outside / "far.jsonl"), str(top / "near.jsonl"))
    }
    counts = {reason: len(paths) for reason, paths in listing.left_out.items()}
    assert counts == {
        "folders reached before": 2,  # a second link, a loop
        "files reached before": 2,
        "links to nothing": 1,
        "pipes and devices": 1,
    }


def test_a_file_that_is_named_twice_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(path)
    for spec in (f"{path},{path}", f"{path},{tmp_path / 'b.jsonl'}", f"{tmp_path},{path}"):
        with pytest.raises(TextError, match=r"is read twice, also as .*; leave one of them out"):
            list_files(spec)


def test_default_ids_carry_the_path(tmp_path):
    write(tmp_path / "a" / "docs.jsonl", "1", "2")
    write(tmp_path / "b" / "docs.jsonl", "3")
    (tmp_path / "b" / "x.txt").write_text("4")
    expected = ["a/docs:1", "a/docs:2", "b/docs:1"]
    assert [d.id for d in read_documents(str(tmp_path))] == [*expected, "b/x"]
    for spec in (f"{tmp_path}/*/docs.jsonl", f"{tmp_path}/a,{tmp_path}/b/docs.jsonl"):
        documents = list(read_documents(spec))
        assert [d.id for d in documents] == expected
        assert documents[-1].source == documents[-1].place == "b/docs.jsonl:1"
    assert [d.id for d in read_documents(str(tmp_path / "b" / "docs.jsonl"))] == ["docs:1"]
    moved = tmp_path / "moved"
    before = inputs_of(str(tmp_path / "a"))
    (tmp_path / "a").rename(moved)
    assert inputs_of(str(moved)) == before


def test_a_path_with_a_comma_blanks_and_wildcards(tmp_path, monkeypatch):
    for name in ("a,b.jsonl", "c [1].jsonl", "d%#é.jsonl", "*.jsonl"):
        path = write(tmp_path / name)
        assert [part.path for part in list_files(str(path)).parts] == [str(path)]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/c [1].jsonl") == ["c [1].jsonl"]


def test_what_cannot_be_read_is_named(tmp_path):
    write(tmp_path / ".hidden" / "a.jsonl")
    with pytest.raises(TextError, match=r"matches no file .*; left out: hidden folders \(1: "):
        list_files(str(tmp_path))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(TextError, match=r"pipe\.jsonl is a pipe or a device"):
        list_files(str(tmp_path / "pipe.jsonl"))
