"""Benchmark `quantizer`: speed and error of the vector quantizer over those of FAISS."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.bench.timing import Figures, paired
from m3jax.errors import BenchmarkError
from m3jax.memory import quantizer as ours
from m3jax.memory.bank import Bank
from m3jax.memory.codebooks import train
from m3jax.memory.quantizer import Codebook

_TESTED = 16_384  # vectors encoded and decoded, none of them trained on


def quantizer(
    rounds: int = 5, vectors: int = 65_536, workdir: str | Path | None = None
) -> dict[str, Figures]:
    """Encoding and decoding with FAISS's own tables, and the error of tables trained by both.

    Args:
      rounds: how often encoding and decoding are timed.
      vectors: training vectors. FAISS asks for 638 976.
      workdir: folder whose bank (uncompressed) gives the vectors; default: made ones of 80 numbers.

    Returns:
      `ratios`: `encode_over_faiss` and `decode_over_faiss`, vectors a second over those of FAISS
      with the same tables and threads (above 1: we are faster); `error_over_faiss`, relative error
      of our tables and codes over that of FAISS's, on vectors not trained on. `seconds`, `errors`.

    Raises:
      BenchmarkError: FAISS is not installed, or the bank is compressed or too small.
    """
    faiss = _import_faiss()
    x = _made(vectors + _TESTED) if workdir is None else _of_bank(Path(workdir), vectors + _TESTED)
    x, held_out = x[:-_TESTED], x[-_TESTED:]
    dim = x.shape[1]
    index = faiss.index_factory(dim, f"OPQ{dim // 4}_{dim},Residual2x14,PQ8x10")
    begin = time.perf_counter()
    index.train(x)
    seconds = {"train_faiss": time.perf_counter() - begin}
    begin = time.perf_counter()
    trained = jax.block_until_ready(train(x))
    seconds["train"] = time.perf_counter() - begin

    book, placed = codebook_of_faiss(faiss, index), jnp.asarray(held_out)
    codes = index.sa_encode(held_out)
    encode = jax.jit(lambda x: ours.encode(book, x, candidates=1))
    known = jax.tree.map(np.asarray, book)  # as a bank's codec has it
    decode = jax.jit(lambda codes: ours.decode(known, codes))
    ratios = {}
    seconds["encode_faiss"], seconds["encode"], ratios["encode_over_faiss"] = paired(
        lambda: index.sa_encode(held_out), lambda: encode(placed).block_until_ready(), rounds
    )
    placed_codes = jnp.asarray(codes)
    seconds["decode_faiss"], seconds["decode"], ratios["decode_over_faiss"] = paired(
        lambda: index.sa_decode(codes), lambda: decode(placed_codes).block_until_ready(), rounds
    )
    errors = {
        "faiss": _error(index.sa_decode(codes), held_out),
        "faiss_training": _error(index.sa_decode(index.sa_encode(x[:_TESTED])), x[:_TESTED]),
    }
    for name, vectors_ in (("", held_out), ("_training", x[:_TESTED])):
        code = ours.encode(trained, vectors_)
        errors[f"m3jax{name}"] = ours.relative_error(trained, vectors_, code)
    plain = ours.encode(trained, held_out, candidates=1)
    errors["m3jax_one_candidate"] = ours.relative_error(trained, held_out, plain)
    ratios["error_over_faiss"] = errors["m3jax"] / errors["faiss"]
    return {"ratios": ratios, "seconds": seconds, "errors": errors}


def codebook_of_faiss(faiss: ModuleType, index: Any) -> Codebook:
    """The tables of a trained `OPQ…,Residual2x…,PQ8x…`."""
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))
    layers = faiss.downcast_index(index.index)

    def table(pq: Any) -> jax.Array:
        return jnp.asarray(faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub))

    return Codebook(
        jnp.asarray(faiss.vector_to_array(rotation.A).reshape(rotation.d_in, rotation.d_in)),
        table(faiss.downcast_index(layers.q1.quantizer).pq),
        table(layers.pq),
    )


def _error(found: np.ndarray, x: np.ndarray) -> float:
    return float(((found - x) ** 2).sum() / (x**2).sum())


def _import_faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise BenchmarkError(
            "faiss is not installed: pip install -c constraints.txt -e '.[parity]'"
        ) from error
    return faiss


def _made(count: int, dim: int = 80) -> np.ndarray:
    """Vectors near a few thousand centres, in directions of unequal width."""
    random = np.random.default_rng(0)
    turn = np.linalg.qr(random.normal(size=(dim, dim)))[0]
    width = np.geomspace(2.0, 0.1, dim)
    centres = random.normal(size=(4000, dim)) * width
    x = centres[random.integers(4000, size=count)] + 0.5 * random.normal(size=(count, dim)) * width
    return (x @ turn).astype(np.float32)


def _of_bank(workdir: Path, count: int) -> np.ndarray:
    """Keys and values, in a random order, of a bank's real slots."""
    bank = Bank.open(workdir / "bank")
    if not bank.codec.plain:
        raise BenchmarkError(f"{workdir / 'bank'} is compressed; give one of config.memory.dtype")
    random = np.random.default_rng(0)
    per_memory = int(np.prod(bank.manifest["shape"][1:-2]))
    slots = np.asarray(bank.lengths, np.int64) * per_memory
    order = random.permutation(bank.size)
    ids = np.sort(order[: int(np.searchsorted(np.cumsum(slots[order]), count)) + 1])
    memory = bank.read(ids)
    real = np.arange(memory.keys.shape[3]) < np.asarray(memory.length)[:, None]
    parts = [np.asarray(x).transpose(0, 3, 1, 2, 4)[real] for x in (memory.keys, memory.values)]
    x = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]).astype(np.float32)
    if len(x) < count:
        raise BenchmarkError(f"{workdir / 'bank'} has {len(x)} vectors; {count} are needed")
    return random.permutation(x)[:count]
