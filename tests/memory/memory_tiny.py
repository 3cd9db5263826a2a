"""A tiny writer and reference sets for the tests of this folder, and a build to be killed."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from m3jax.config import PREFIX_TOKENS, default, validate
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.memory.write import write_bank

LENGTH = 12


class TinyReferences:
    """Random references with the interface of `text.references.References`.

    Each is a document of its own, unless `sizes` says how many references every document has.
    """

    def __init__(
        self,
        count: int,
        seed: int = 0,
        length: int = LENGTH,
        sizes: Sequence[int] | None = None,
    ):
        random = np.random.default_rng(seed)
        self.sizes = [1] * count if sizes is None else sizes
        self.lengths = random.integers(1, length + 1, count).astype(np.int32)
        tokens = random.integers(5, 60, (count, length))
        self.table = np.where(np.arange(length) < self.lengths[:, None], tokens, 0).astype(np.int32)

    @property
    def record_hashes(self) -> np.ndarray:
        weights = 31 ** np.arange(1, self.table.shape[1] + 1, dtype=np.uint64)
        return (self.table.astype(np.uint64) * weights).sum(1, dtype=np.uint64)

    @property
    def fingerprint(self) -> str:
        return f"{len(self)}-{self.record_hashes.sum()}"

    def documents(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def __len__(self) -> int:
        return len(self.table)

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        return self.table[np.asarray(ids)]


def tiny_config(**changes: Any) -> ConfigDict:
    """Memory layers 1 and 2 of 3, 2 key-value heads; `memory__kept_tokens=3` changes a field."""
    values = {
        "model__layers": 3,
        "model__hidden": 16,
        "model__head_dim": 8,
        "model__query_heads": 4,
        "model__kv_heads": 2,
        "model__mlp_width": 24,
        "model__vocabulary": 260,
        "text__vocabulary": 260,
        "memory__first_layer": 1,
        "memory__layers": 2,
        "memory__reference_length": LENGTH,
        "memory__kept_tokens": 4,
        "memory__dtype": "float32",
        "writer__batch_references": 16,
        "writer__shard_memories": 10,
        **changes,
    }
    config = default()
    for path, value in values.items():
        section, field = path.split("__")
        config[section][field] = value
    return validate(config)


def tiny_params(config: ConfigDict, seed: int = 0) -> Any:
    """Random weights and norms from NumPy: compiling the real initialisation takes seconds."""
    random = np.random.default_rng(seed)
    shapes, _ = make_model(config, PREFIX_TOKENS).abstract()

    def values(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = random.normal(size=leaf.shape).astype(leaf.dtype)
        return 1 + 0.1 * noise if "norm" in jax.tree_util.keystr(path) else 0.2 * noise

    return jax.tree_util.tree_map_with_path(values, shapes)


def build(folder: Path, config: ConfigDict | None = None, **options: Any) -> dict[str, Any]:
    """Writes a bank of 37 references (or those given) by random weights of one seed."""
    config = tiny_config() if config is None else config
    model = make_model(config, PREFIX_TOKENS, mesh=options.pop("mesh", None))
    references = options.pop("references", TinyReferences(37))
    references.tokenizer_fingerprint = options.pop("tokenizer", "tokenizer")
    arguments = {
        "params": tiny_params(config, options.pop("weights", 0)),
        "references": references,
        "progress": False,
        **options,
    }
    return write_bank(config, model, folder=folder, **arguments)


def shard_files(folder: Path) -> dict[str, bytes]:
    """All shards of a bank by name."""
    array = Path(folder) / "memories.zarr" / "c"
    return {
        str(path.relative_to(array)): path.read_bytes()
        for path in sorted(array.rglob("*"))
        if path.is_file()
    }


def flip(path: Path, place: int) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def big(context: str) -> dict[str, Any]:
    """What the killed build writes: many shards, none the size of a batch or of a document."""
    config = tiny_config(
        memory__first_layer=0,
        memory__layers=1,
        memory__kept_tokens=12,
        memory__reference_length=64,
        model__head_dim=64,
        writer__shard_memories=48,
        writer__batch_references=64,
        writer__document_context=context == "document",
        writer__document_context_tokens=192,
    )
    sizes = [1, 5, 2, 3, 9] * 200
    return {"config": config, "references": TinyReferences(4000, length=64, sizes=sizes)}


if __name__ == "__main__":  # a build in a process of its own
    print(build(Path(sys.argv[1]), **big(sys.argv[2]))["encoded"], flush=True)
    Bank.open(Path(sys.argv[1]))


def read_by_threads(bank: Bank, values: np.ndarray) -> None:
    """Four threads read random memories of the bank at once, and find these values."""

    def work(seed: int) -> bool:
        random = np.random.default_rng(seed)
        ids = [random.integers(0, values.shape[1], 11) for _ in range(20)]
        return all(np.array_equal(bank.read(some).values, values[:, some]) for some in ids)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
