"""Benchmark `bank`: random reads of the 2.4B model's memories, compared with plain `pread`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from m3jax.bench.made import configured, made_bank, section
from m3jax.bench.rounds import Rounds
from m3jax.memory import storage
from m3jax.memory.bank import Bank

# Config fields of a bank with the memories of Memory³'s 2.4B model in bfloat16, and of one with
# memories of 64 bytes.
_SHAPE = section("model", layers=22, query_heads=8, kv_heads=8, head_dim=80) | section(
    "memory", layers=22, dtype="bfloat16"
)
_TINY = section("model", kv_heads=1, head_dim=8) | section("memory", layers=1, kept_tokens=2)
_READ = 160  # memories per read: five for a prompt chunk of each of 32 rows
_THREADS = 16  # threads that call `pread`


def bank(memories: int = 2048, tiny_memories: int = 1_000_000) -> Rounds:
    """Measures the throughput of `Bank.read_stored` relative to `pread` in 16 threads.

    Every read fetches 160 random memories of a bank of `memories` memories of 450 560 bytes. Cold:
    the files are dropped from the page cache before every read. Warm: they are in the page cache,
    but not in the bank's own cache.

    Yields:
      `ratios` of throughput (above 1: the bank is faster): `cold_over_pread`, `warm_over_pread`;
      `compressed_over_pread`, the same for cold reads of a bank that the vector quantizer
      compressed, whose pieces are small; `compressed_over_bf16`, memories per second of that bank
      over those of the uncompressed bank, both cold. `seconds` of a read and `rates`. `tiny`: for a
      bank of `tiny_memories` memories of 64 bytes, the `seconds` to open it, and the peak resident
      size in `MB` of a process that reads it (`MB_before` it opened the bank).
    """
    random = np.random.default_rng(0)

    def read(bank: Bank, reader: Callable[[np.ndarray], object], cold: bool = True) -> float:
        ids = random.choice(memories, _READ, replace=False)
        if cold:
            _drop(Path(bank.folder))
        begin = time.perf_counter()
        reader(ids)
        return time.perf_counter() - begin

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        compressed = section("writer", compression="vector")
        plain = made_bank(folder / "plain", configured(_SHAPE), memories)
        vector = made_bank(folder / "vector", configured(_SHAPE, compressed), memories)
        large_shards = section("writer", shard_memories=4096)
        tiny = made_bank(folder / "tiny", configured(_SHAPE, _TINY, large_shards), tiny_memories)
        pread, pread_vector = (stack.enter_context(_preader(bank)) for bank in (plain, vector))
        while True:
            seconds = {
                "compressed_pread": read(vector, pread_vector),
                "compressed": read(vector, vector.read_stored),
                "cold": read(plain, plain.read_stored),
                "cold_pread": read(plain, pread),
                "warm_pread": read(plain, pread, cold=False),
                "warm": read(plain, plain.read_stored, cold=False),
            }
            ratios = {
                f"{kind}_over_pread": seconds[f"{kind}_pread"] / seconds[kind]
                for kind in ("cold", "warm", "compressed")
            }
            ratios["compressed_over_bf16"] = seconds["cold"] / seconds["compressed"]
            rates = {f"{kind}_memories": _READ / seconds[kind] for kind in ("cold", "compressed")}
            item = plain.bytes // plain.size / 1e6
            rates |= {f"{kind}_MB": _READ * item / seconds[kind] for kind in ("cold", "warm")}
            opened = _open_in_process(Path(tiny.folder))
            yield {"ratios": ratios, "seconds": seconds, "rates": rates, "tiny": opened}


def _open_in_process(folder: Path) -> dict[str, float]:
    """Opens a bank in a new process, reads 100 batches of memories, and returns the figures of
    `tiny` in `bank`."""
    command = [sys.executable, "-c", _READER, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, before, used = map(float, done.stdout.split())
    return {"seconds": seconds, "MB": used, "MB_before": before}


# Prints the seconds to open the bank, and the peak resident size before and after reading in MB.
_READER = """
import sys, time
import numpy as np
from m3jax.memory.bank import Bank
def used():  # not of getrusage: that counts the process from which this one was forked
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000
before, begin = used(), time.perf_counter()
bank = Bank.open(sys.argv[1])
seconds = time.perf_counter() - begin
random = np.random.default_rng(0)
for _ in range(100):
    bank.read_stored(random.integers(bank.size, size=160))
print(seconds, before, used())
"""


def _drop(folder: Path) -> None:
    """Drops all files in a folder from the page cache."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _preader(bank: Bank) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that reads memories with `pread` in threads, from offsets that are read
    beforehand from the shards' indexes."""
    shard, item = bank.manifest["shard_memories"], bank.bytes // bank.size
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(_THREADS))
        files, offsets = [], []
        for number in range(storage.shards_of(bank.manifest)):
            path = Path(bank.folder) / storage.shard_key(number)
            files.append(stack.enter_context(path.open("rb")).fileno())
            index = path.read_bytes()[-(16 * shard + 4) : -4]
            offsets.append(np.frombuffer(index, "<u8").reshape(shard, 2)[:, 0])

        def read(i: int) -> int:
            return len(os.pread(files[i // shard], item, int(offsets[i // shard][i % shard])))

        def pread(ids: np.ndarray) -> None:
            assert set(pool.map(read, ids.tolist())) == {item}

        yield pread
