"""Blocks: together they are the documents in their order, whatever the format and the limit."""

import gzip
import json
import sys
import types
from collections import Counter

import pyarrow
import pytest
from pyarrow import parquet

from m3jax.errors import TextError
from m3jax.text.cleaning import blocks
from m3jax.text.cleaning.blocks import (
    blocks_of,
    number_of,
    place_of,
    read_block,
    sources_of,
)
from m3jax.text.documents import read_documents


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """A spec of every format, in small blocks."""
    rows = [{"id": f"j{i}", "text": f"line {i} " * 40, "title": "T"} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"packed {i} " * 30}) + "\n" for i in range(30))
    (tmp_path / "texts").mkdir()
    for i in range(9):
        (tmp_path / "texts" / f"t{i}.txt").write_text(f"text {i} " * 100)
    table = pyarrow.table({"text": [f"row {i}" for i in range(25)], "id": range(25)})
    parquet.write_table(table, tmp_path / "p.parquet", row_group_size=10)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)
    names = ("a.jsonl", "texts", "b.jsonl.gz", "p.parquet")
    return ",".join(str(tmp_path / name) for name in names)


def test_blocks_hold_the_documents_in_order(mixed):
    parts = [block for source in sources_of(mixed) for block in blocks_of([source])]
    found = [document for block in parts for document in read_block(block, Counter())]
    assert found == list(read_documents(mixed))
    assert len(found) == 30 + 9 + 30 + 25 and len(parts) > 12
    names = [block.name for block in parts]
    assert names == sorted(set(names))
    assert found[-1].id == "24" and found[-1].source == "p.parquet:25"


@pytest.mark.parametrize("limit", [1, 7, 30, 34, 45, 70, 85, 94, 500])
def test_a_limit_counts_documents_of_all_sources(mixed, limit):
    found = [d for b in blocks_of(sources_of(mixed), limit) for d in read_block(b, Counter())]
    assert found == list(read_documents(mixed))[:limit]


def test_numbers_are_places_in_reading_order():
    places = [("0000000-0000000", 0), ("0000000-0000000", 5), ("0000000-0000001", 0)]
    places += [("0000001-0000000", 0), ("1048575-1048575", (1 << 24) - 1)]
    numbers = [number_of(*place) for place in places]
    assert numbers == sorted(set(numbers)) and numbers[-1] == (1 << 64) - 1
    assert [place_of(number) for number in numbers] == places


def test_what_is_unreadable_is_handed_out(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [b'{"text": "fine"}', b"{", b'{"text": 3}', b"\xff\xfe\x00", b"[" * 9000, b"9" * 5000]
    path.write_bytes(b"\n".join([*lines, b'{"text": "\\ud800"}', b'{"text": "last"}']))
    (block,) = blocks_of(sources_of(str(path)))
    found = list(read_block(block, Counter()))
    bad = [str(item) for item in found if isinstance(item, TextError)]
    assert [item.text for item in found if not isinstance(item, TextError)] == ["fine", "last"]
    words = ("not valid JSON", "expected a string", "not UTF-8", "not valid JSON", "not valid JSON")
    for line, (reason, wanted) in enumerate(zip(bad, (*words, "lone surrogate"), strict=True), 2):
        assert f"x.jsonl:{line}: " in reason and wanted in reason


def test_parquet_without_text_and_damaged(tmp_path):
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"id": [1], "words": ["a"]}), path)
    with pytest.raises(TextError, match=r"p\.parquet: row 1: no field 'text'; it has: id"):
        list(read_documents(str(path)))
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(TextError, match="is no Parquet file"):
        list(read_documents(str(path)))


def test_examples_of_tensorflow_datasets(monkeypatch):
    examples = [{"text": f"example {i}".encode(), "title": b"T"} for i in range(2500)]
    module = types.SimpleNamespace(data_source=lambda name, split: examples)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    cut = list(blocks_of(sources_of("tfds:lm1b")))
    assert [block.count for block in cut] == [1024, 1024, 452]
    found = [document for block in cut for document in read_block(block, Counter())]
    assert found == list(read_documents("tfds:lm1b")) and len(found) == 2500
