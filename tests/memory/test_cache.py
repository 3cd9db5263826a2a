"""The cache of memories: least recently used, bounded by bytes, counted, never a removed one."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from memory.memory_tiny import TinyReferences, build, read_by_threads

from m3jax.errors import BankError
from m3jax.memory.bank import Bank, join_banks
from m3jax.memory.cache import MemoryCache

ITEM = 2 * 2 * 2 * 4 * 8 * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank") / "bank"
    build(folder)
    return folder


def test_the_least_recently_used_leaves_first() -> None:
    cache = MemoryCache(100)
    memories = {name: np.full(40, i, np.uint8) for i, name in enumerate("abc")}
    cache.keep("a", memories["a"])
    cache.keep("b", memories["b"])
    assert cache.find(["a"])[0] is memories["a"]
    cache.keep("c", memories["c"])  # b was used longest ago
    a, b, c = cache.find(["a", "b", "c"])
    assert a is memories["a"] and b is None and c is memories["c"]
    assert cache.report() == {"cache_hits": 3, "cache_misses": 1, "cache_bytes": 80}
    cache.keep("a", memories["a"])  # again: counted once
    assert cache.bytes == 80
    cache.keep("large", np.zeros(101, np.uint8))
    assert cache.find(["large", "a", "c"])[0] is None and cache.bytes == 80


@pytest.mark.parametrize("memories", [0, 5, 37])
def test_reads_are_those_without_a_cache(folder: Path, memories: int) -> None:
    plain, cached = Bank.open(folder), Bank.open(folder, cache_bytes=memories * ITEM)
    asked = 0
    for seed in range(6):
        ids = np.random.default_rng(seed).integers(-1, 37, (3, 7))
        asked += len(np.unique(ids[ids >= 0]))
        for found, expected in zip(cached.read(ids), plain.read(ids), strict=True):
            np.testing.assert_array_equal(found, expected)
            found[:] = 7  # it is the reader's own
    counts = cached.report()
    assert counts["cache_bytes"] <= memories * ITEM
    assert counts["cache_hits"] + counts["cache_misses"] == (asked if memories else 0)
    assert (counts["cache_hits"] > 0) == (memories > 0)
    if memories == 37:
        assert counts["cache_misses"] == counts["cache_bytes"] // ITEM <= 37


def test_what_is_cached_is_not_read(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "bank"))
    bank = Bank.open(own, cache_bytes=1 << 20)
    before = bank.read(np.arange(5))
    shutil.rmtree(own / "memories.zarr" / "c" / "0")
    np.testing.assert_array_equal(bank.read(np.array([4, 0])).keys, before.keys[:, [4, 0]])
    with pytest.raises(BankError, match=r"is missing"):
        bank.read(np.array([4, 5]))


def test_threads_share_a_cache(folder: Path) -> None:
    bank = Bank.open(folder, cache_bytes=9 * ITEM)
    read_by_threads(bank, Bank.open(folder).read(np.arange(37)).values)
    assert bank.report()["cache_bytes"] == 9 * ITEM


def test_layers_share_one_limit_and_a_removed_memory_is_not_served(
    folder: Path, tmp_path: Path
) -> None:
    build(tmp_path / "added", references=TinyReferences(11, seed=5))
    layers = [Bank.open(path, cache_bytes=20 * ITEM) for path in (folder, tmp_path / "added")]
    both = join_banks(layers, np.zeros(0, np.int64), "references")
    everything = both.read(np.arange(48))
    np.testing.assert_array_equal(
        everything.keys[:, :37], Bank.open(folder).read(np.arange(37)).keys
    )
    assert both.report() == {"cache_hits": 0, "cache_misses": 48, "cache_bytes": 20 * ITEM}
    np.testing.assert_array_equal(both.read(np.array([40, 3])).keys, everything.keys[:, [40, 3]])
    assert both.report()["cache_hits"] == 1

    later = join_banks(layers, np.array([40]), "references")  # the same layers and cache
    with pytest.raises(BankError, match="reference id 40 .*an edit removed it"):
        later.read(np.array([3, 40]))
    np.testing.assert_array_equal(later.read(np.array([41])).keys, everything.keys[:, [41]])
