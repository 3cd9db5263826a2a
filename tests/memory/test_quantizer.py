"""The vector quantizer: its codes, against loops and FAISS; and what training is for."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import close
from tqdm import tqdm

from m3jax.errors import QuantizerError
from m3jax.memory import codebooks, quantizer
from m3jax.memory.codebooks import train
from m3jax.memory.quantizer import Codebook, dequantize, nearest_of, quantize, relative_error

H = 16
BITS = {"coarse_bits": 5, "fine_bits": 4}


def vectors(n: int, dim: int = H, seed: int = 0) -> np.ndarray:
    """Clusters of unequal width, turned: what a quantizer can make use of."""
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(dim, dim)))[0]
    centers = np.random.default_rng(2).normal(size=(40, dim)) * 2
    spread = np.linspace(0.1, 1.0, dim)
    x = centers[random.integers(40, size=n)] + random.normal(size=(n, dim)) * spread
    return (x @ turn).astype(np.float32)


@pytest.fixture(scope="module")
def trained() -> Codebook:
    return train(vectors(2000), **BITS, iterations=8, refinements=3)


def loops(codebook: Codebook, x: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """Nearest coarse entry of each half, then the nearest fine entries, one vector at a time."""
    rotation, coarse, fine = (np.asarray(table, np.float64) for table in codebook)
    found = []
    for v in x:
        y = rotation @ v
        first = [
            int(np.argmin(((part - coarse[i]) ** 2).sum(-1)))
            for i, part in enumerate(np.split(y, 2))
        ]
        rest = y - np.concatenate([coarse[i][j] for i, j in enumerate(first)])
        second = [
            int(np.argmin(((part - fine[i]) ** 2).sum(-1)))
            for i, part in enumerate(np.split(rest, len(fine)))
        ]
        found.append((first, second))
    return found


def stream_of_bits(indices: list[int], bits: int) -> bytes:
    total = sum(value << (i * bits) for i, value in enumerate(indices))
    return total.to_bytes(-(-len(indices) * bits // 8), "little")


def test_codes_equal_the_loops(trained: Codebook) -> None:
    x = vectors(50, seed=3)
    codes = np.asarray(quantize(trained, jnp.asarray(x), candidates=1))
    assert codes.shape == (50, trained.code_bytes) == (50, 2 + 4)
    for code, (first, second) in zip(codes, loops(trained, x), strict=True):
        assert bytes(code) == stream_of_bits(first, 5) + stream_of_bits(second, 4)


def test_decoded_are_the_sums_of_entries_turned_back(trained: Codebook) -> None:
    x = vectors(50, seed=3)
    found = np.asarray(dequantize(trained, quantize(trained, jnp.asarray(x), candidates=1)))
    for row, (first, second) in zip(found, loops(trained, x), strict=True):
        entries = np.concatenate([trained.coarse[i][j] for i, j in enumerate(first)])
        entries = entries + np.concatenate([trained.fine[i][j] for i, j in enumerate(second)])
        close(row, np.asarray(trained.rotation).T @ entries)


@pytest.mark.parametrize("count, bits", [(2, 14), (8, 10), (1, 1), (3, 7), (5, 16), (4, 8)])
def test_packing_is_a_stream_of_bits(count: int, bits: int) -> None:
    indices = np.random.default_rng(bits).integers(2**bits, size=(20, count))
    packed = np.asarray(quantizer._pack(jnp.asarray(indices), bits))
    for row, code in zip(indices, packed, strict=True):
        assert bytes(code) == stream_of_bits([int(value) for value in row], bits)
    np.testing.assert_array_equal(quantizer._unpack(jnp.asarray(packed), count, bits), indices)


def test_papers_code_has_14_bytes() -> None:
    tables = {"coarse": (2, 2**14, 40), "fine": (8, 2**10, 10), "rotation": (80, 80)}
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in tables.items()}
    assert Codebook(**shapes).code_bytes == 14


@pytest.mark.slow
def test_more_candidates_and_refinement_lower_the_error(trained: Codebook) -> None:
    x = vectors(3000, seed=4)

    def error(codebook: Codebook, candidates: int) -> float:
        return relative_error(
            codebook, x, quantize(codebook, jnp.asarray(x), candidates=candidates)
        )

    errors = [error(trained, candidates) for candidates in (1, 2, 8)]
    assert errors[2] < errors[1] < errors[0] < 0.2
    plain = train(vectors(2000), **BITS, iterations=8, refinements=0)
    assert error(trained, 8) < error(plain, 8)


def test_axes_are_principal_and_balanced() -> None:
    random = np.random.default_rng(0)
    turn = np.linalg.qr(random.normal(size=(H, H)))[0]
    x = (random.normal(size=(20_000, H)) * np.geomspace(1, 0.01, H)) @ turn
    rotation = np.asarray(codebooks._balanced_axes(jnp.asarray(x), 8))
    close(rotation @ rotation.T, np.eye(H))
    covariance = np.cov((x @ rotation.T).T)
    spread = np.sqrt(np.diag(covariance))
    close(covariance / np.outer(spread, spread), np.eye(H), 0.01)
    products = spread.reshape(8, -1).prod(1)
    assert products.max() / products.min() < 1.2  # 4000 in the order of the axes


def test_axes_of_vectors_that_do_not_fill_the_space() -> None:
    flat = np.concatenate([vectors(200)[:, :10], np.zeros((200, 6))], axis=1)
    for x in (flat, np.ones((200, H))):
        rotation = np.asarray(codebooks._balanced_axes(jnp.asarray(x), 8))
        close(rotation @ rotation.T, np.eye(H))


def test_what_a_coarse_entry_leaves_of_a_vector_it_has_not_seen() -> None:
    random = np.random.default_rng(0)
    x = np.repeat(np.arange(5.0), [1, 2, 3, 4, 5])[:, None] * 100 + random.normal(size=(15, 4))
    of = np.repeat(np.arange(5), [1, 2, 3, 4, 5])
    means = np.array([x[of == i].mean(0) for i in range(5)])
    expected = np.empty_like(x)
    for i in range(15):
        others = np.flatnonzero((of == of[i]) & (np.arange(15) != i))
        mean = x[others].mean(0) if len(others) else means[1]  # the next one
        expected[i] = x[i] - mean
    found = codebooks._unseen_rest(jnp.asarray(x, jnp.float32), jnp.asarray(means, jnp.float32))
    close(found, expected, 1e-4)


@pytest.mark.slow
def test_vectors_not_seen_have_less_error_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, held_out = vectors(1000, seed=5), jnp.asarray(vectors(3000, seed=6))
    few = {"coarse_bits": 8, "fine_bits": 4, "iterations": 8, "refinements": 0}

    def error() -> float:
        codebook = train(x, **few)
        return relative_error(codebook, held_out, quantize(codebook, held_out))

    found = error()
    monkeypatch.setattr(
        codebooks, "_unseen_rest", lambda x, entries: x - entries[nearest_of(x, entries)]
    )
    assert found < 0.97 * error()


def test_all_candidates_give_the_best_pair(trained: Codebook) -> None:
    x = vectors(10, seed=5)
    entries = 2**5
    codes = quantize(trained, jnp.asarray(x), candidates=entries)
    found = ((np.asarray(dequantize(trained, codes)) - x) ** 2).sum(-1)
    rotation, coarse, fine = (np.asarray(table, np.float64) for table in trained)
    for v, error in zip(x, found, strict=True):
        least = 0.0
        for i, half in enumerate(np.split(rotation @ v, 2)):
            tried = []
            for entry in coarse[i]:
                rest = np.split(half - entry, 4)
                parts = (((fine[4 * i + j] - part) ** 2).sum(-1) for j, part in enumerate(rest))
                tried.append(sum(part.min() for part in parts))
            least += min(tried)
        close(error, least, 1e-4)


def test_training_is_a_function_of_vectors_and_seed(trained: Codebook) -> None:
    again = train(vectors(2000), **BITS, iterations=8, refinements=3)
    for one, other in zip(trained, again, strict=True):
        np.testing.assert_array_equal(one, other)
    close(trained.rotation @ trained.rotation.T, np.eye(H))


def test_no_entry_is_without_vectors_when_there_are_enough() -> None:
    # 4 places, 16 entries: entries begin on equal vectors, and all but four of them are empty.
    places = np.random.default_rng(0).normal(size=(4, 8))
    noise = np.random.default_rng(1).normal(size=(2000, 8)) * 0.1
    x = jnp.asarray(places[np.arange(2000) % 4] + noise, jnp.float32)
    entries = codebooks._kmeans(x, jax.random.key(0), 16, 10, tqdm(disable=True))
    assert len(np.unique(nearest_of(x, entries))) == 16
    again = codebooks._kmeans(
        jnp.repeat(x[:4], 500, axis=0), jax.random.key(0), 16, 10, tqdm(disable=True)
    )
    assert np.isfinite(np.asarray(again)).all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((100, 12), np.float32), "vectors of 12 numbers do not split"),
        (np.zeros((20, 16), np.float32), "20 training vectors for codebooks of 32 entries"),
        (np.full((100, 16), np.nan, np.float32), "NaN or infinity"),
    ],
)
def test_what_cannot_be_trained_is_refused(x: Any, message: str) -> None:
    with pytest.raises(QuantizerError, match=message):
        train(x, **BITS)


def test_codes_of_another_size_are_refused(trained: Codebook) -> None:
    with pytest.raises(QuantizerError, match="codes of 14 bytes, the codebook's have 6"):
        dequantize(trained, jnp.zeros((3, 14), jnp.uint8))


def of_faiss(faiss: ModuleType, index: Any) -> Codebook:
    """The codebook of a trained `OPQ…,Residual2x…,PQ8x…`."""
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))
    dim = rotation.d_in
    layers = faiss.downcast_index(index.index)
    coarse = faiss.downcast_index(layers.q1.quantizer).pq

    def table(pq: Any) -> np.ndarray:
        return faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)

    return Codebook(
        jnp.asarray(faiss.vector_to_array(rotation.A).reshape(dim, dim)),
        jnp.asarray(table(coarse)),
        jnp.asarray(table(layers.pq)),
    )


@pytest.mark.parity
@pytest.mark.parametrize("dim", [16, 80])
def test_faiss(require: Callable[[str], ModuleType], dim: int) -> None:
    """Its codebooks: our codes are its codes, our decode is its decode. Ours: no larger error."""
    faiss = require("faiss")
    x, held_out = vectors(5000, dim), vectors(2000, dim, seed=7)
    index = faiss.index_factory(dim, f"OPQ{dim // 4}_{dim},Residual2x6,PQ8x5")
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))
    rotation.niter = rotation.niter_pq_0 = 10  # FAISS's own 50 and 40 take a minute
    index.train(x)
    theirs = index.sa_encode(held_out)
    codebook = of_faiss(faiss, index)
    assert codebook.bits == (6, 5) and codebook.code_bytes == theirs.shape[1]
    decoded = index.sa_decode(theirs)
    close(dequantize(codebook, jnp.asarray(theirs)), decoded)
    ours = np.asarray(quantize(codebook, jnp.asarray(held_out), candidates=1))
    assert (ours == theirs).all(-1).mean() > 0.999  # two entries may be equally near

    # At 16 numbers a few of the 64 entries decide, and which of both is better is chance.
    if dim == 80:
        trained = train(x, coarse_bits=6, fine_bits=5)
        error = relative_error(trained, held_out, quantize(trained, jnp.asarray(held_out)))
        assert error <= ((held_out - decoded) ** 2).sum() / (held_out**2).sum()
