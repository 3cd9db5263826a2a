"""Benchmark `bank`: random reads of memories of the 2.4B model, against reading the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.bench.timing import Figures, paired
from m3jax.memory import codec as codecs
from m3jax.memory import storage
from m3jax.memory.bank import Bank, Binding
from m3jax.memory.codec import Codec
from m3jax.memory.quantizer import Codebook

# An explicit memory of Memory³'s 2.4B model: L layers, K heads, P tokens, H numbers, bfloat16.
_SHAPE = {"layers": 22, "kv_heads": 8, "kept_tokens": 8, "head_dim": 80}
_TINY = {"layers": 1, "kv_heads": 1, "kept_tokens": 2, "head_dim": 8}
_MANY = 1_000_000
_READ = 160  # memories a read: 32 rows of a prompt chunk, five each
_THREADS = 16  # of the plain reads


def bank(rounds: int = 9, memories: int = 2048) -> dict[str, Figures]:
    """Throughput of `Bank.read_stored` over that of 16 threads of `pread` of the same bytes.

    A read is of 160 random memories of 450 560 bytes. Cold: the files are dropped from the page
    cache before every read. Warm: they are in it, but not in the bank's own cache.

    Returns:
      `ratios`: `cold_over_pread`, `warm_over_pread` (above 1: the bank is faster);
      `compressed_over_bf16`, memories a second of a bank by the vector quantizer over those of
      bfloat16, both cold; `compressed_over_pread`, the former over the same bytes by `pread`, which
      is what the disk gives for pieces so small. `seconds`: medians of single reads. `rates`: MB
      and memories a second.
      `million`: of a bank of 1e6 memories of 64 bytes: `seconds` to open it, and the largest
      resident `MB` of a process that reads it, with those `MB_before` it was opened.
    """
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        plain = made_bank(Path(name) / "plain", codecs.plain(80, "bfloat16"), memories)
        vector = made_bank(Path(name) / "vector", random_codec(80, "bfloat16"), memories)
        banks = Bank.open(plain), Bank.open(vector)
        ids = [np.arange(_READ)]

        def warm() -> None:
            ids[0] = random.choice(memories, _READ, replace=False)

        def cold() -> None:
            warm()
            _drop(Path(name))

        seconds, ratios = {}, {}
        with _preader(vector) as pread:
            seconds["cold_compressed_pread"], _, ratios["compressed_over_pread"] = paired(
                lambda: pread(ids[0]), lambda: banks[1].read_stored(ids[0]), rounds, cold
            )
        with _preader(plain) as pread:
            for kind, before in (("cold", cold), ("warm", warm)):
                seconds[f"{kind}_pread"], seconds[kind], ratios[f"{kind}_over_pread"] = paired(
                    lambda: pread(ids[0]), lambda: banks[0].read_stored(ids[0]), rounds, before
                )
        seconds["cold_bf16"], seconds["cold_compressed"], ratios["compressed_over_bf16"] = paired(
            lambda: banks[0].read_stored(ids[0]),
            lambda: banks[1].read_stored(ids[0]),
            rounds,
            cold,
        )
        item = _item_bytes(banks[0])
        many = _open_many(Path(name) / "many")
    rates = {f"{kind}_MB": _READ * item / seconds[kind] / 1e6 for kind in ("cold", "warm")}
    rates |= {
        f"{kind}_memories": _READ / seconds[kind] for kind in ("cold_bf16", "cold_compressed")
    }
    return {"ratios": ratios, "seconds": seconds, "rates": rates, "million": many}


def random_codec(head_dim: int, dtype: str) -> Codec:
    """The paper's code with random tables: the time of reading does not depend on them."""
    random = np.random.default_rng(0)

    def table(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    rotation = jnp.linalg.qr(table(head_dim, head_dim))[0]
    coarse, fine = (2, 2**14, head_dim // 2), (8, 2**10, head_dim // 8)
    books = [Codebook(rotation, table(*coarse), table(*fine)) for _ in range(2)]
    return Codec(codecs.VECTOR, head_dim, dtype, (books[0], books[1]))


def made_bank(folder: Path, codec: Codec, memories: int, shape: Mapping[str, int] = _SHAPE) -> Path:
    """A bank of random numbers or codes, in shards of 256 memories (of 4096 where they are tiny).

    Args:
      folder: where; it must not be there.
      codec: how memories are stored; its head dim is that of the shape.
      memories: how many; those of all shards are the same.
      shape: layers, key-value heads, kept tokens and head dim.
    """
    layout = {**shape, "dtype": codec.dtype}
    binding = Binding("weights", "tokenizer", "references", layout)
    item = [shape[name] for name in ("layers", "kv_heads", "kept_tokens")]
    sides = {
        storage.LENGTHS: storage.npy_bytes(np.full(memories, shape["kept_tokens"], np.uint16)),
        storage.HASHES: storage.npy_bytes(np.arange(memories, dtype=np.uint64)),
    }
    if codec.codebooks is not None:
        sides[storage.CODEBOOK] = codecs.to_bytes(codec, binding.owner)
    shard = 256 if memories < 2**16 else 4096
    manifest: dict[str, Any] = {
        "format": storage.FORMAT,
        "binding": vars(binding),
        "info": {"writer_step": 0, "writer_path": ""},
        "codec": codec.name,
        "shape": [memories, 2, *item, codec.width],
        "dtype": codec.stored_dtype,
        "shard_memories": shard,
        "checksums": {name: storage.checksum(data) for name, data in sides.items()},
    }
    text = json.dumps(manifest).encode()
    folder.mkdir()
    array = storage.open_array(folder, manifest, create=True)
    dtype = np.dtype(jnp.dtype(codec.stored_dtype))
    random = np.random.default_rng(1)
    size = (min(shard, memories), *manifest["shape"][1:])
    if codec.plain:
        block = random.standard_normal(size, np.float32).astype(dtype)
    else:
        block = random.integers(0, 256, size, dtype=np.uint8)
    for low in range(0, memories, shard):
        high = min(low + shard, memories)
        array[low:high].write(block[: high - low]).result()
    sides |= {storage.MANIFEST: text, storage.COMPLETE: storage.complete_stamp(text)}
    for file, data in sides.items():
        storage.write_file(folder, file, data)
    return folder


def _open_many(folder: Path, rounds: int = 5) -> dict[str, float]:
    """Opens a bank of a million tiny memories in new processes, and reads 100 batches of it."""
    made_bank(folder, codecs.plain(_TINY["head_dim"], "bfloat16"), _MANY, _TINY)
    command = [sys.executable, "-c", _READER, str(folder)]
    found = []
    for _ in range(rounds):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append([float(word) for word in done.stdout.split()])
    seconds, idle, used = np.median(np.array(found), axis=0).tolist()
    return {"seconds": seconds, "MB": used, "MB_before": idle}


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


def _item_bytes(bank: Bank) -> int:
    return bank.bytes // bank.size


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _drop(folder: Path) -> None:
    """Drops files from the page cache."""
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@contextlib.contextmanager
def _preader(folder: Path) -> Iterator[Any]:
    """Reads memories with plain `pread`, knowing where each lies."""
    bank, shard = Bank.open(folder), 256
    item = _item_bytes(bank)
    descriptors, offsets = [], []
    for i in range(storage.shards_of(bank.manifest)):
        path = folder / storage.shard_key(i)
        descriptors.append(os.open(path, os.O_RDONLY))
        index = path.read_bytes()[-(16 * shard + 4) : -4]
        offsets.append(np.frombuffer(index, "<u8").reshape(shard, 2)[:, 0])
    pool = ThreadPoolExecutor(_THREADS)

    def one(i: int) -> bytes:
        return os.pread(descriptors[i // shard], item, int(offsets[i // shard][i % shard]))

    def pread(ids: np.ndarray) -> None:
        found = list(pool.map(one, ids.tolist()))
        assert all(len(data) == item for data in found)

    try:
        yield pread
    finally:
        pool.shutdown()
        for descriptor in descriptors:
            os.close(descriptor)
