"""Training of the vector quantizer (`m3jax.memory.quantizer`).

First the principal axes are distributed over the parts so that the products of variances are
balanced (the optimal rotation for a Gaussian, Ge et al. 2013); then k-means fits each table; then
rounds of refinement fit rotation, coarse and fine entries to each other. A coarse entry is the mean
of few training vectors and lies nearer to them than to unseen vectors, so fine entries are fitted
to leave-one-out residuals: against the mean of the *other* vectors of the coarse entry.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from m3jax.errors import QuantizerError
from m3jax.memory.quantizer import (
    CANDIDATES,
    HALVES,
    Codebook,
    by_block,
    comparable,
    indices_of,
    nearest_few,
    nearest_of,
    parts_of,
    rotated,
    with_one,
)
from m3jax.random_key import random_key

COARSE_BITS, FINE_PARTS, FINE_BITS = 14, 8, 10  # of Memory³
# K-means: the sample of all but the last iterations has 10 vectors per entry, at least 2^16 (all
# vectors if there are fewer); the last 5 iterations use all vectors.
_SAMPLED_OF_ENTRY, _SAMPLED, _LAST = 10, 2**16, 5


def train(
    vectors: Float[Array | np.ndarray, "n H"],
    *,
    seed: int = 0,
    coarse_bits: int = COARSE_BITS,
    fine_bits: int = FINE_BITS,
    iterations: int = 25,
    refinements: int = 6,
    progress: str | None = None,
) -> Codebook:
    """Fits the codebook of a vector quantizer.

    It is a rotation, a coarse table for each half of a vector, and a fine table for each eighth of
    the residual.

    Args:
      vectors: n training vectors, at least as many as the larger kind of table has entries.
      seed: seed of the sample and of the initial entries.
      coarse_bits, fine_bits: bits of an index; a code takes 2 · coarse_bits and 8 · fine_bits, each
        rounded up to whole bytes.
      iterations: k-means iterations for each table; all but the last five use a sample.
      refinements: final rounds that fit the rotation and all tables to each other.
      progress: label of the progress bar; None = no bar.

    Raises:
      QuantizerError: too few vectors, numbers that are not finite, or a head dim that is
        not divisible by 8.
    """
    x = jnp.asarray(vectors, jnp.float32)
    _check(x, coarse_bits, fine_bits)
    keys = jax.random.split(random_key(seed))
    rotation = _balanced_axes(x, FINE_PARTS)
    total = (HALVES + FINE_PARTS) * iterations + refinements
    with tqdm(total=total, desc=progress, unit="round", disable=progress is None) as bar:
        halves = parts_of(x @ rotation.T, HALVES)
        coarse = _kmeans_of_parts(halves, keys[0], 2**coarse_bits, iterations, bar)
        rest = jnp.concatenate(
            [_unseen_rest(*half) for half in zip(halves, coarse, strict=True)], axis=1
        )
        fine = _kmeans_of_parts(parts_of(rest, FINE_PARTS), keys[1], 2**fine_bits, iterations, bar)
        codebook = Codebook(rotation, coarse, fine)
        for _ in range(refinements):
            codebook = jax.block_until_ready(_refined(codebook, x))
            bar.update()
    return codebook


def _check(x: Array, coarse_bits: int, fine_bits: int) -> None:
    n, H = x.shape
    if H % FINE_PARTS:
        raise QuantizerError(
            f"vectors of {H} numbers do not split into {HALVES} halves and {FINE_PARTS} parts; the"
            f" head dim must be a multiple of {FINE_PARTS}, or store memories without compression"
        )
    least = 2 ** max(coarse_bits, fine_bits)
    if n < least:
        raise QuantizerError(
            f"{n} training vectors for codebooks of {least} entries; take more references, or"
            " fewer bits"
        )
    if not bool(jnp.isfinite(x).all()):
        raise QuantizerError("training vectors hold NaN or infinity; the writer's weights diverged")


def _numbers(nearest: Array, count: int) -> Array:
    """Counts the vectors that are nearest to each entry."""
    return jnp.zeros(count).at[nearest].add(1.0)


@functools.partial(jax.jit, static_argnames="count")
def _means(x: Array, nearest: Array, count: int) -> tuple[Array, Array]:
    """Returns the mean (0 if there is none) and the number of the vectors of each entry."""
    numbers = _numbers(nearest, count)
    sums = jnp.zeros((count, x.shape[1])).at[nearest].add(x)
    return sums / jnp.maximum(numbers, 1.0)[:, None], numbers


@jax.jit
def _split_large(means: Array, numbers: Array) -> Array:
    """Splits the entries with the most vectors in two, to replace entries without vectors."""
    order = jnp.argsort(-numbers)
    empty = numbers == 0
    donor = order[jnp.cumsum(empty) - 1]  # the i-th empty entry splits the i-th largest
    apart = 1e-3
    moved = jnp.zeros_like(empty).at[jnp.where(empty, donor, len(numbers))].set(True, mode="drop")
    kept = means * jnp.where(moved, 1 - apart, 1.0)[:, None]
    return jnp.where(empty[:, None], means[donor] * (1 + apart), kept)


def _kmeans(x: Array, key: Array, count: int, iterations: int, bar: tqdm) -> Array:
    """Fits entries `(count, d)` by Lloyd's algorithm; all but the last iterations use a sample."""
    order = jax.random.permutation(key, len(x))
    sample = x[order[: max(_SAMPLED_OF_ENTRY * count, _SAMPLED)]]
    entries = sample[:count]
    for i in range(iterations):
        of = x if i >= iterations - _LAST else sample
        entries = _split_large(*_means(of, nearest_of(of, entries), count))
        entries.block_until_ready()
        bar.update()
    return entries


def _kmeans_of_parts(parts: Array, key: Array, count: int, iterations: int, bar: tqdm) -> Array:
    keys = jax.random.split(key, len(parts))
    return jnp.stack(
        [_kmeans(x, k, count, iterations, bar) for x, k in zip(parts, keys, strict=True)]
    )


@jax.jit
def _unseen_rest(x: Array, entries: Array) -> Array:
    """Returns leave-one-out residuals: each vector minus the mean of its entry's other vectors.

    A vector that is alone in its entry is compared with the second nearest entry.
    """
    columns = comparable(entries)
    two = by_block(lambda block: nearest_few(with_one(block) @ columns, 2), x)
    numbers = _numbers(two[:, 0], len(entries))[two[:, :1]]
    rest = x - entries[two[:, 0]]
    return jnp.where(numbers > 1, rest * numbers / (numbers - 1), x - entries[two[:, 1]])


def _balanced_axes(x: Array, parts: int) -> Array:
    """Returns the principal axes as a rotation, with balanced products of variances per part."""
    variances, axes = np.linalg.eigh(np.cov(np.asarray(x), rowvar=False))
    sizes = np.log(np.maximum(variances, 1e-9 * variances[-1] + 1e-30))
    room = len(axes) // parts
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for axis in reversed(range(len(axes))):  # largest variance first
        open_parts = (part for part in chosen if len(part) < room)
        least = min(open_parts, key=lambda part: sum(sizes[part] - sizes[0]))
        least.append(axis)
    return jnp.asarray(axes[:, np.concatenate(chosen)].T, jnp.float32)


def _procrustes(x: Array, target: Array) -> Array:
    """Returns the orthonormal matrix A that minimizes ‖A x − target‖ (orthogonal Procrustes)."""
    u, _, vt = jnp.linalg.svd(target.T @ x, full_matrices=False)
    return u @ vt


def _refined(codebook: Codebook, x: Array) -> Codebook:
    """Runs one refinement: encodes all vectors, then fits both tables and the rotation to them."""
    y = rotated(codebook, x)
    coarse_index, fine_index = indices_of(codebook, y, CANDIDATES)

    def fitted(table: Array, indices: Array, target: Array) -> Array:
        entries = []
        for i, part in enumerate(parts_of(target, len(table))):
            means, numbers = _means(part, indices[:, i], table.shape[1])
            entries.append(jnp.where((numbers > 0)[:, None], means, table[i]))
        return jnp.stack(entries)

    def rows(table: Array, indices: Array) -> Array:
        return jnp.concatenate([table[i][indices[:, i]] for i in range(len(table))], axis=1)

    fine_rows = rows(codebook.fine, fine_index)
    coarse = fitted(codebook.coarse, coarse_index, y - fine_rows)
    rest = y - rows(coarse, coarse_index)
    numbers = [_numbers(index, coarse.shape[1])[index] for index in coarse_index.T]
    others = jnp.repeat(jnp.stack(numbers, 1) - 1, coarse.shape[2], axis=1)
    unseen_rest = rest + (rest - fine_rows) / jnp.maximum(others, 1)
    fine = fitted(codebook.fine, fine_index, unseen_rest)
    decoded = rows(coarse, coarse_index) + rows(fine, fine_index)
    return Codebook(_procrustes(x, decoded), coarse, fine)
