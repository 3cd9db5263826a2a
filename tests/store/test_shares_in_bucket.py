"""A corpus in a bucket that a host fetches only the shards of which it reads."""

from pathlib import Path

import numpy as np
import pytest
from data.data_workdir import tiny_config, write_text
from store.cloud_storage import BUCKET, Fault

from m3jax.data.pipeline import open_pipeline
from m3jax.errors import StoreError
from m3jax.mirror import Mirror
from m3jax.text.prepare import prepare_text

URL = f"gs://{BUCKET}/run"
PARTS = "tokenizer", "corpus/train", "corpus/validation"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workdir")
    documents, knowledge = write_text(folder)
    config = tiny_config(memory__source="none", text__shards=4)
    prepare_text(config, folder / "run", str(documents), str(knowledge), say=lambda line: None)
    return folder / "run"


@pytest.fixture
def published(quick_server, workdir, tmp_path):
    mirror = Mirror(URL, tmp_path / "prepared")
    for part in PARTS:
        mirror.publish(part, workdir / part)
    return quick_server


def shards(mirror: Mirror) -> list[int]:
    return sorted(int(p.stem[-5:]) for p in mirror.local.glob("corpus/train/*.array_record"))


def test_a_host_fetches_the_shards_of_its_rows(published, workdir, tmp_path):
    config = tiny_config(memory__source="none", data__shares=2)
    whole = open_pipeline(config, workdir)
    mirror = Mirror(URL, tmp_path / "host")
    pipeline = open_pipeline(config, mirror.local)
    assert shards(mirror) == []
    second = slice(2, 4)
    for step in range(30):
        tokens = pipeline.batch(step, second).tokens
        np.testing.assert_array_equal(tokens, whole.batch(step).tokens[second])
    assert shards(mirror) == [1, 3]
    there = {path.name: path.stat().st_ino for path in mirror.local.glob("corpus/train/*")}
    published.requests.clear()
    again = open_pipeline(config, mirror.local)  # as by the same command
    again.batch(0, second)
    assert not any(".array_record" in line for line, _ in published.requests)
    again.batch(0)  # of another number of hosts
    assert shards(mirror) == [0, 1, 2, 3]
    copied = {
        line.partition("?")[0][-18:-13] for line, _ in published.requests if "record?" in line
    }
    assert copied == {"00000", "00002"}
    assert (
        there.items()
        <= {p.name: p.stat().st_ino for p in mirror.local.glob("corpus/train/*")}.items()
    )
    published.requests.clear()
    open_pipeline(tiny_config(memory__source="none"), mirror.local).batch(0)
    assert not any(".array_record" in line for line, _ in published.requests)


def test_a_row_of_another_share_is_read_all_the_same(published, tmp_path):
    pipeline = open_pipeline(
        tiny_config(memory__source="none", data__shares=2), Mirror(URL, tmp_path).local
    )
    first = pipeline.read(np.array([0]))  # of the first documents: some shards of its share
    assert first.tokens.shape[0] == 1 and {*shards(Mirror(URL, tmp_path))} <= {0, 2}


def test_a_shard_that_cannot_be_fetched_is_one_sentence(published, tmp_path):
    config = tiny_config(memory__source="none", data__shares=2)
    pipeline = open_pipeline(config, Mirror(URL, tmp_path).local)
    published.faults = [Fault("GET.*array_record", 403, times=1e9)]
    with pytest.raises(StoreError, match="access denied"):
        pipeline.batch(0)
    published.faults = []
    assert pipeline.batch(0).tokens.shape[0] == 4
