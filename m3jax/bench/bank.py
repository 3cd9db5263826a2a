"""Benchmark `bank`: random reads of memories of the 2.4B model, against reading the same bytes."""

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

# A memory of Memory³'s 2.4B model, bfloat16; and one of 64 bytes.
_SHAPE = section("model", layers=22, query_heads=8, kv_heads=8, head_dim=80) | section(
    "memory", layers=22, dtype="bfloat16"
)
_TINY = section("model", kv_heads=1, head_dim=8) | section("memory", layers=1, kept_tokens=2)
_READ = 160  # memories a read: 32 rows of a prompt chunk, five each
_THREADS = 16  # of the plain reads


def bank(memories: int = 2048, tiny_memories: int = 1_000_000) -> Rounds:
    """Measures the throughput of `Bank.read_stored` over 16 threads of `pread` of the same bytes.

    A read is of 160 random ones of `memories` of 450 560 bytes. Cold: the files are dropped from
    the page cache before every read. Warm: they are in it, but not in the bank's own cache.

    Yields:
      `ratios` of throughput (above 1: the bank is faster): `cold_over_pread`, `warm_over_pread`;
      `compressed_over_bf16`, memories a second of a bank by the vector quantizer, cold;
      `compressed_over_pread`, which is what the disk gives for pieces so small. `seconds` of a
      read, `rates`. `tiny`: of a bank of `tiny_memories` of 64 bytes: `seconds` to open it, and
      the largest resident `MB` of a process that reads it, with those `MB_before` it was opened.
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
    """Opens a bank in a new process and reads 100 batches of it."""
    command = [sys.executable, "-c", _READER, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, before, used = map(float, done.stdout.split())
    return {"seconds": seconds, "MB": used, "MB_before": before}


# Prints the seconds to open the bank, and the largest resident size before and after reading, MB.
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
    """Drops files from the page cache."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _preader(bank: Bank) -> Iterator[Callable[[np.ndarray], None]]:
    """Reads memories with plain `pread`, knowing where each lies."""
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
