"""Files are committed whole or not at all."""

import os

import pytest

from m3jax.files import (
    checksum,
    committing,
    digest,
    read_sealed,
    write_atomically,
    write_sealed,
)


def test_write_atomically_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["file"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"one")
    with pytest.raises(OSError, match="full"), committing(path) as temporary:
        temporary.write_bytes(b"tw")
        assert path.read_bytes() == b"one"
        raise OSError("disk full")
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]


def test_two_writers_of_the_same_file_do_not_cut_each_other(tmp_path):
    path = tmp_path / "file"
    with committing(path, shared=True) as first:
        first.write_bytes(b"whole")
        with committing(path, shared=True) as second:
            second.write_bytes(b"who")  # begun when the first one had ended, and not at its end
            assert first.read_bytes() == b"whole"
            second.write_bytes(b"whole")
        assert path.read_bytes() == b"whole"
    assert path.read_bytes() == b"whole" and os.listdir(tmp_path) == ["file"]


def test_hashes(tmp_path):
    assert digest("a", "b") != digest("ab") != digest("ab", "")
    assert digest("ä") == digest("ä".encode()) and len(digest()) == 32
    (tmp_path / "f").write_bytes(b"x" * 100_000)
    before = checksum(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"x" * 99_999 + b"y")
    assert checksum(tmp_path / "f") != before


def test_a_sealed_file_is_read_back_and_any_flipped_byte_of_its_content_is_seen(tmp_path):
    path = tmp_path / "file.json"
    write_sealed(path, {"name": "ä", "count": 3})
    assert read_sealed(path) == {"name": "ä", "count": 3}
    whole = path.read_bytes()
    for place in (whole.index(b"3"), whole.index(b"name"), whole.index(b"checksum") + 12):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read_sealed(path) is None
    path.write_bytes(b"[]")
    assert read_sealed(path) is None
