"""Benchmark `quantizer`: speed and error of the vector quantizer relative to FAISS."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.bench.rounds import Rounds, import_peer, timed
from m3jax.errors import BenchmarkError
from m3jax.memory import quantizer as quantization
from m3jax.memory.bank import Bank
from m3jax.memory.binding import slots_of
from m3jax.memory.codebooks import train
from m3jax.memory.quantizer import Codebook


def quantizer(
    vectors: int = 65_536,
    workdir: str | Path | None = None,
    tested: int = 16_384,
    coarse_bits: int = 14,
    fine_bits: int = 10,
) -> Rounds:
    """Measures quantizing and dequantizing with FAISS's tables, and the errors of both trainings.

    Without FAISS, which the extra `parity` installs, measures only our speed and errors.

    Args:
      vectors: number of training vectors. FAISS recommends 638 976.
      workdir: folder with an uncompressed bank, whose vectors are used; None: synthetic vectors of
        80 numbers.
      tested: number of held-out vectors to quantize and dequantize.
      coarse_bits, fine_bits: sizes of the tables, as in `codebooks.train`.

    Yields:
      `ratios`: `encode_over_faiss` and `dequantize_over_faiss`, vectors per second with FAISS's
      tables and as many threads (above 1: ours is faster); `error_over_faiss`, relative error with
      our tables over that with FAISS's, on held-out vectors; `error_single_over_four`, error of
      codes that try one coarse entry over codes that try four. `seconds` and `errors`.

    Raises:
      BenchmarkError: the bank is compressed or has too few vectors.
    """
    count = vectors + tested
    x = _made(count) if workdir is None else bank_vectors(Path(workdir), count)
    x, held_out = x[:-tested], x[-tested:]
    begin, errors = time.perf_counter(), {}
    book = jax.block_until_ready(train(x, coarse_bits=coarse_bits, fine_bits=fine_bits))
    training = {"train": time.perf_counter() - begin}
    for name, sample in (("m3jax", held_out), ("m3jax_training", x[:tested])):
        code = quantization.quantize(book, sample)
        errors[name] = quantization.relative_error(book, sample, code)
    code = quantization.quantize(book, held_out, candidates=1)
    errors["m3jax_single_candidate"] = quantization.relative_error(book, held_out, code)

    calls: dict[str, Callable[[], Any]] = {}
    peer = import_peer("the ratios over FAISS", "faiss")
    if peer is not None:
        dim = x.shape[1]
        described = f"OPQ{dim // 4}_{dim},Residual2x{coarse_bits},PQ8x{fine_bits}"
        index = peer[0].index_factory(dim, described)
        begin = time.perf_counter()
        index.train(x)
        training["train_faiss"] = time.perf_counter() - begin
        for name, sample in (("faiss", held_out), ("faiss_training", x[:tested])):
            difference = index.sa_decode(index.sa_encode(sample)) - sample
            errors[name] = float((difference**2).sum() / (sample**2).sum())
        book, code = codebook_of_faiss(peer[0], index), index.sa_encode(held_out)
        calls["encode_faiss"] = lambda: index.sa_encode(held_out)
        calls["dequantize_faiss"] = lambda: index.sa_decode(code)
    placed, placed_code = jnp.asarray(held_out), jnp.asarray(code)
    encode = jax.jit(lambda x: quantization.quantize(book, x, candidates=1))
    known = jax.tree.map(np.asarray, book)  # NumPy constants, as in a bank's codec
    dequantize = jax.jit(lambda code: quantization.dequantize(known, code))
    calls["encode"] = lambda: encode(placed).block_until_ready()
    calls["dequantize"] = lambda: dequantize(placed_code).block_until_ready()
    while True:
        seconds = timed(calls)
        ratios = {"error_single_over_four": errors["m3jax_single_candidate"] / errors["m3jax"]}
        if peer is not None:
            ratios["error_over_faiss"] = errors["m3jax"] / errors["faiss"]
            for name in ("encode", "dequantize"):
                ratios[f"{name}_over_faiss"] = seconds[f"{name}_faiss"] / seconds[name]
        yield {"ratios": ratios, "seconds": {**training, **seconds}, "errors": errors}


def codebook_of_faiss(faiss: Any, index: Any) -> Codebook:
    """Converts the tables of a trained FAISS index `OPQ…,Residual2x…,PQ8x…` to a `Codebook`."""
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))
    layers = faiss.downcast_index(index.index)

    def table(pq: Any) -> jax.Array:
        return jnp.asarray(faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub))

    return Codebook(
        jnp.asarray(faiss.vector_to_array(rotation.A).reshape(rotation.d_in, rotation.d_in)),
        table(faiss.downcast_index(layers.q1.quantizer).pq),
        table(layers.pq),
    )


def _made(count: int, dim: int = 80) -> np.ndarray:
    """Draws vectors around 4000 centres, with unequal variances along random directions."""
    random = np.random.default_rng(0)
    turn = np.linalg.qr(random.normal(size=(dim, dim)))[0]
    width = np.geomspace(2.0, 0.1, dim)
    centres = random.normal(size=(4000, dim)) * width
    x = centres[random.integers(4000, size=count)] + 0.5 * random.normal(size=(count, dim)) * width
    return (x @ turn).astype(np.float32)


def bank_vectors(workdir: Path, count: int) -> np.ndarray:
    """Reads `count` keys and values in random order from a bank, skipping empty slots.

    Returns `(count, H)` float32. Raises `BenchmarkError` if the bank is compressed or has too few.
    """
    bank = Bank.open(workdir / "bank")
    if not bank.codec.plain:
        raise BenchmarkError(f"{workdir / 'bank'} is compressed; give one of config.memory.dtype")
    random = np.random.default_rng(0)
    layout = slots_of(bank.binding.layout)
    of_length = np.minimum(np.arange(layout.largest + 1)[:, None], layout.counts_LK.ravel()).sum(1)
    slots = 2 * of_length[np.asarray(bank.lengths)]
    order = random.permutation(bank.size)
    ids = np.sort(order[: int(np.searchsorted(np.cumsum(slots[order]), count)) + 1])
    memory = bank.read(ids)
    real = layout.real(np.asarray(memory.length))
    parts = [np.moveaxis(np.asarray(x), 0, 1)[real] for x in (memory.keys, memory.values)]
    x = np.concatenate(parts).astype(np.float32)
    if len(x) < count:
        raise BenchmarkError(f"{workdir / 'bank'} has {len(x)} vectors; {count} are needed")
    return random.permutation(x)[:count]
