"""Files are committed whole or not at all."""

import ast
import json
import math
import os
from pathlib import Path

import pytest
import xxhash

from m3jax.files import (
    checksum,
    committing,
    digest,
    fast_checksum,
    json_text,
    read_sealed,
    write_atomically,
    write_sealed,
)

ROOT = Path(__file__).parents[1]


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


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_a_mapped_file_has_the_hash_of_its_bytes(size, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content := os.urandom(size))
    expected = xxhash.xxh3_128(content).hexdigest()
    assert fast_checksum(path) == fast_checksum(path, mapped=True) == expected
    if size:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert fast_checksum(path) != expected


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


def test_a_number_that_is_not_finite_is_null_in_json():
    content = {"a": [1.5, math.nan], "b": {"c": math.inf, "d": (None, -math.inf, "NaN")}}
    expected = {"a": [1.5, None], "b": {"c": None, "d": [None, None, "NaN"]}}
    assert json.loads(json_text(content, indent=1)) == expected
    assert json_text({"ä": 1.0}, ensure_ascii=False) == '{"ä": 1.0}'


def test_no_json_is_written_that_could_hold_nan():
    """Every call of `json.dump(s)` says `allow_nan=False`; other modules call `json_text`."""
    calls = [
        (path.relative_to(ROOT), node.lineno, {k.arg: ast.unparse(k.value) for k in node.keywords})
        for folder in ("m3jax", "launch", "configs")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps")
    ]
    assert calls and not [
        path for path in (ROOT / "m3jax").rglob("*.py") if "from json import" in path.read_text()
    ]
    assert [call[:2] for call in calls if call[2].get("allow_nan") != "False"] == []
