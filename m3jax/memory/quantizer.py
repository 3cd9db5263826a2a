"""The vector quantizer of memories: 14 bytes for a key or value (Memory³ §3.3, method.md §5).

A vector is rotated; each half of it is replaced by the nearest of 2¹⁴ coarse entries, and what is
left by eight fine entries of 2¹⁰, one for each eighth. That is `OPQ20_80,Residual2x14,PQ8x10` of
FAISS, with its layout of codes, for any head dim that eight divides: its codebooks decode here and
ours there.

The halves do not meet, so a code is the best of its half. `candidates` > 1 tries several coarse
entries with their fine ones and keeps the pair with the least error, where FAISS takes the nearest
coarse entry first; the bytes and the decoder are the same.

Training takes the principal axes and deals them out to the parts, so that each has as much to
store (the optimal rotation for a Gaussian, Ge et al. 2013), then k-means for each table, then
rounds that fit rotation, coarse and fine entries to each other. A coarse entry is the mean of few
vectors, and lies nearer to them than to vectors it has not seen: fine entries are fitted to what
the mean of the *other* vectors of the entry would leave.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from tqdm import tqdm

from m3jax.memory.storage import BankError

HALVES = 2
COARSE_BITS, FINE_PARTS, FINE_BITS = 14, 8, 10
# Vectors compared at a time: on a CPU their 2¹⁴ distances, 8 MB, stay near the processor.
_BLOCK, _BLOCK_OF_ACCELERATOR = 128, 4096
# Of k-means: vectors of the iterations before the last ones, for each entry and at least.
_SAMPLED_OF_ENTRY, _SAMPLED, _LAST = 10, 2**16, 5
_GROUP = 128  # entries whose best is found first; see `_largest`


class QuantizerError(BankError):
    """Vectors or codes that do not fit a quantizer. The message names the thing and the remedy."""


class Codebook(NamedTuple):
    """Tables of a trained quantizer; a pytree, so that a jitted step can take it.

    Attributes:
      rotation: orthonormal; a rotated vector is `rotation @ x`.
      coarse: entries of each half of a rotated vector.
      fine: entries of each part of what the coarse entries leave.
    """

    rotation: Float[Array, "H H"]
    coarse: Float[Array, "halves entries H/2"]
    fine: Float[Array, "parts fine_entries H/parts"]

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of a coarse and of a fine index."""
        return self.coarse.shape[1].bit_length() - 1, self.fine.shape[1].bit_length() - 1

    @property
    def code_bytes(self) -> int:
        """Bytes of one code: coarse and fine indices, each rounded up to whole bytes."""
        coarse, fine = self.bits
        return _bytes(HALVES * coarse) + _bytes(len(self.fine) * fine)


def encode(
    codebook: Codebook, vectors: Float[Array | np.ndarray, "n H"], *, candidates: int = 4
) -> UInt8[Array, "n bytes"]:
    """Codes of vectors.

    Args:
      codebook: of this head dim.
      vectors: any float dtype; computed in float32.
      candidates: coarse entries tried for each half; 1 is FAISS's code.
    """
    codebook = jax.tree.map(jnp.asarray, codebook)
    coarse, fine = _indices(codebook, _rotated(codebook, vectors), candidates)
    coarse_bits, fine_bits = codebook.bits
    return jnp.concatenate([_pack(coarse, coarse_bits), _pack(fine, fine_bits)], axis=-1)


def decode(
    codebook: Codebook, codes: UInt8[Array | np.ndarray, "*n bytes"]
) -> Float[Array, "*n H"]:
    """The vectors that codes stand for, in float32.

    Two look-ups, one for each part, and a product with the rotation; may be traced into a step.
    """
    codebook = jax.tree.map(jnp.asarray, codebook)
    coarse, fine = _unpack_code(codebook, codes)
    return _decoded(codebook, coarse, fine) @ codebook.rotation


def relative_error(
    codebook: Codebook,
    vectors: Float[Array | np.ndarray, "n H"],
    codes: UInt8[Array | np.ndarray, "n bytes"],
) -> float:
    """Σ ‖x − decoded‖² / Σ ‖x‖²."""
    x = jnp.asarray(vectors, jnp.float32)
    return float(jnp.sum((x - decode(codebook, codes)) ** 2) / jnp.sum(x**2))


def train(
    vectors: Float[Array | np.ndarray, "n H"],
    *,
    seed: int = 0,
    coarse_bits: int = COARSE_BITS,
    fine_parts: int = FINE_PARTS,
    fine_bits: int = FINE_BITS,
    iterations: int = 25,
    refinements: int = 6,
    candidates: int = 4,
    progress: str | None = None,
) -> Codebook:
    """Fits a quantizer.

    Args:
      vectors: n training vectors, at least one for every entry of a codebook.
      seed: of initial entries.
      coarse_bits, fine_parts, fine_bits: the code's size: 2 · coarse_bits and
        fine_parts · fine_bits, each rounded up to bytes.
      iterations: rounds of k-means for each table; all but the last five of ten vectors an entry.
      refinements: last rounds that fit rotation and both tables to each other.
      candidates: as in `encode`, in those rounds.
      progress: what the progress bar says; None shows none.

    Raises:
      QuantizerError: too few vectors, numbers that are not finite, or a head dim that does not
        split into the parts.
    """
    x = jnp.asarray(vectors, jnp.float32)
    _check(x, coarse_bits, fine_parts, fine_bits)
    keys = jax.random.split(jax.random.key(seed))
    rotation = _balanced_axes(x, fine_parts)
    total = (HALVES + fine_parts) * iterations + refinements
    with tqdm(total=total, desc=progress, unit="round", disable=progress is None) as bar:
        halves = _parts(x @ rotation.T, HALVES)
        coarse = _kmeans_of_parts(halves, keys[0], 2**coarse_bits, iterations, bar)
        rest = jnp.concatenate(
            [_unseen_rest(*half) for half in zip(halves, coarse, strict=True)], axis=1
        )
        fine = _kmeans_of_parts(_parts(rest, fine_parts), keys[1], 2**fine_bits, iterations, bar)
        codebook = Codebook(rotation, coarse, fine)
        for _ in range(refinements):
            codebook = jax.block_until_ready(_refined(codebook, x, candidates))
            bar.update()
    return codebook


def _check(x: Array, coarse_bits: int, fine_parts: int, fine_bits: int) -> None:
    n, H = x.shape
    if H % fine_parts or fine_parts % HALVES or H < 4 * HALVES:
        raise QuantizerError(
            f"vectors of {H} numbers do not split into {HALVES} halves and {fine_parts} parts; the"
            f" head dim must be a multiple of {fine_parts}, or store memories without compression"
        )
    least = 2 ** max(coarse_bits, fine_bits)
    if n < least:
        raise QuantizerError(
            f"{n} training vectors for codebooks of {least} entries; take more references, or"
            " fewer bits"
        )
    if not bool(jnp.isfinite(x).all()):
        raise QuantizerError("training vectors hold NaN or infinity; the writer's weights diverged")


def _rotated(codebook: Codebook, vectors: Array | np.ndarray) -> Array:
    return jnp.asarray(vectors, jnp.float32) @ codebook.rotation.T


def _parts(x_nH: Array, parts: int) -> Array:
    """`(n, H)` → `(parts, n, H/parts)`."""
    return x_nH.reshape(len(x_nH), parts, -1).swapaxes(0, 1)


def _largest(scores: Array) -> Array:
    """argmax over the last axis, the first of equals.

    The largest of each group first, then inside the best group: plain maxima vectorize where a
    maximum that carries its index does not.
    """
    size = scores.shape[-1]
    if size % _GROUP:
        return jnp.argmax(scores, axis=-1)
    groups = scores.reshape(*scores.shape[:-1], -1, _GROUP)
    group = jnp.argmax(jnp.max(groups, axis=-1), axis=-1)
    inside = jnp.take_along_axis(groups, group[..., None, None], axis=-2)[..., 0, :]
    return group * _GROUP + jnp.argmax(inside, axis=-1)


def _comparable(entries: Array) -> Array:
    """Entries `(*parts, n, d)` as columns with −‖e‖²/2 below, `(*parts, d + 1, n)`."""
    norms = -0.5 * jnp.sum(entries**2, axis=-1, keepdims=True)
    return jnp.concatenate([entries, norms], axis=-1).swapaxes(-1, -2)


def _with_one(x: Array) -> Array:
    """Vectors with a last number 1, so that one product with `_comparable` entries gives
    x · e − ‖e‖²/2, which is largest for the nearest entry."""
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def _by_block(f: Callable[[Array], Any], x: Array) -> Any:
    """`f` of vectors `(n, d)`, a block at a time."""
    n = len(x)
    on_cpu = jax.default_backend() == "cpu"
    block = min(_BLOCK if on_cpu else _BLOCK_OF_ACCELERATOR, n)
    padded = jnp.pad(x, ((0, -n % block), (0, 0))).reshape(-1, block, x.shape[1])
    found = jax.lax.map(f, padded)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], found)


def _candidates(scores: Array, count: int) -> Array:
    """Indices of the nearest entry and of the next ones, each of another group."""
    if count == 1 or scores.shape[-1] % _GROUP:
        return jax.lax.top_k(scores, count)[1] if count > 1 else _largest(scores)[..., None]
    groups = scores.reshape(*scores.shape[:-1], -1, _GROUP)
    group = jax.lax.top_k(jnp.max(groups, axis=-1), min(count, groups.shape[-2]))[1]
    inside = jnp.take_along_axis(groups, group[..., None], axis=-2)
    return group * _GROUP + jnp.argmax(inside, axis=-1)


def _encode_half(
    x: Array, coarse: Array, coarse_columns: Array, fine_columns: Array, candidates: int
) -> tuple[Array, Array]:
    """Coarse index and fine indices of one half of n vectors, `(n,)` and `(n, parts)`."""
    tried = _candidates(_with_one(x) @ coarse_columns, candidates)  # (n, t)
    rest = x[:, None] - coarse[tried]
    by_part = _with_one(rest.reshape(*tried.shape, len(fine_columns), -1))
    scores = jnp.einsum("ntpd,pde->ntpe", by_part, fine_columns)
    chosen = _largest(scores)  # (n, t, parts)
    if candidates == 1:
        return tried[:, 0], chosen[:, 0]
    gain = jnp.sum(jnp.max(scores, axis=-1), axis=-1)
    best = jnp.argmin(jnp.sum(rest**2, axis=-1) - 2 * gain, axis=-1)[:, None]
    return (
        jnp.take_along_axis(tried, best, axis=1)[:, 0],
        jnp.take_along_axis(chosen, best[..., None], axis=1)[:, 0],
    )


@functools.partial(jax.jit, static_argnames="candidates")
def _indices(codebook: Codebook, rotated: Array, candidates: int) -> tuple[Array, Array]:
    """Coarse `(n, 2)` and fine `(n, parts)` indices of rotated vectors."""
    coarse, columns = codebook.coarse, _comparable(codebook.coarse)
    fine = _comparable(codebook.fine)
    fine = fine.reshape(HALVES, -1, *fine.shape[1:])

    def of_block(x: Array) -> tuple[Array, Array]:
        halves = [
            _encode_half(x_half, coarse[i], columns[i], fine[i], candidates)
            for i, x_half in enumerate(_parts(x, HALVES))
        ]
        return jnp.stack([a for a, _ in halves], 1), jnp.concatenate([b for _, b in halves], 1)

    return _by_block(of_block, rotated)


def _decoded(codebook: Codebook, coarse: Array, fine: Array) -> Array:
    """Rotated vectors of indices `(*n, 2)` and `(*n, parts)`."""
    lead = coarse.shape[:-1]

    def look_up(table: Array, indices: Array) -> Array:
        rows = [jnp.take(part, indices[..., i], axis=0) for i, part in enumerate(table)]
        return jnp.concatenate(rows, axis=-1).reshape(*lead, -1)

    return look_up(codebook.coarse, coarse) + look_up(codebook.fine, fine)


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _pack(indices: Int[Array, "*n count"], bits: int) -> UInt8[Array, "*n bytes"]:
    """Indices one after another in a little-endian stream of bits."""
    values = indices.astype(jnp.uint32)
    found = []
    for byte in range(_bytes(indices.shape[-1] * bits)):
        total = jnp.zeros(values.shape[:-1], jnp.uint32)
        for i in range(indices.shape[-1]):
            shift = i * bits - 8 * byte
            if -bits < shift < 8:
                value = values[..., i]
                total = total | (value << shift if shift >= 0 else value >> -shift)
        found.append(total & 0xFF)
    return jnp.stack(found, axis=-1).astype(jnp.uint8)


def _unpack(stream: UInt8[Array, "*n bytes"], count: int, bits: int) -> Int[Array, "*n count"]:
    """What `_pack` packed."""
    found = []
    for i in range(count):
        first, shift = divmod(i * bits, 8)
        total = jnp.zeros(stream.shape[:-1], jnp.uint32)
        for byte in range(_bytes(shift + bits)):
            total = total | (stream[..., first + byte].astype(jnp.uint32) << (8 * byte))
        found.append((total >> shift) & (2**bits - 1))
    return jnp.stack(found, axis=-1).astype(jnp.int32)


def _unpack_code(codebook: Codebook, codes: Array | np.ndarray) -> tuple[Array, Array]:
    if codes.shape[-1] != codebook.code_bytes:
        raise QuantizerError(
            f"codes of {codes.shape[-1]} bytes, the codebook's have {codebook.code_bytes}; use the"
            " codebook that the bank was written with"
        )
    codes = jnp.asarray(codes)
    coarse_bits, fine_bits = codebook.bits
    split = _bytes(HALVES * coarse_bits)
    coarse = _unpack(codes[..., :split], HALVES, coarse_bits)
    return coarse, _unpack(codes[..., split:], len(codebook.fine), fine_bits)


@jax.jit
def _nearest(x: Array, entries: Array) -> Array:
    """Index of the entry nearest to each vector."""
    columns = _comparable(entries)
    return _by_block(lambda block: _largest(_with_one(block) @ columns), x)


def _numbers(nearest: Array, count: int) -> Array:
    """How many vectors each entry has."""
    return jnp.zeros(count).at[nearest].add(1.0)


@functools.partial(jax.jit, static_argnames="count")
def _means(x: Array, nearest: Array, count: int) -> tuple[Array, Array]:
    """Mean of the vectors of each entry, 0 where there are none; and how many there are."""
    numbers = _numbers(nearest, count)
    sums = jnp.zeros((count, x.shape[1])).at[nearest].add(x)
    return sums / jnp.maximum(numbers, 1.0)[:, None], numbers


@jax.jit
def _split_large(means: Array, numbers: Array) -> Array:
    """Entries without vectors take a half of the largest ones."""
    order = jnp.argsort(-numbers)
    empty = numbers == 0
    donor = order[jnp.cumsum(empty) - 1]  # the i-th empty one has the i-th largest
    apart = 1e-3
    moved = jnp.zeros_like(empty).at[jnp.where(empty, donor, len(numbers))].set(True, mode="drop")
    kept = means * jnp.where(moved, 1 - apart, 1.0)[:, None]
    return jnp.where(empty[:, None], means[donor] * (1 + apart), kept)


def _kmeans(x: Array, key: Array, count: int, iterations: int, bar: tqdm | None = None) -> Array:
    """Lloyd's algorithm: entries `(count, d)`. Most of the iterations take a sample of x."""
    order = jax.random.permutation(key, len(x))
    sample = x[order[: max(_SAMPLED_OF_ENTRY * count, _SAMPLED)]]
    entries = sample[:count]
    for i in range(iterations):
        of = x if i >= iterations - _LAST else sample
        entries = _split_large(*_means(of, _nearest(of, entries), count))
        if bar is not None:
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
    """What entries leave of vectors, had each not been among those whose mean its entry is."""
    columns = _comparable(entries)
    two = _by_block(lambda block: _candidates(_with_one(block) @ columns, 2), x)
    numbers = _numbers(two[:, 0], len(entries))[two[:, :1]]
    rest = x - entries[two[:, 0]]
    return jnp.where(numbers > 1, rest * numbers / (numbers - 1), x - entries[two[:, 1]])


def _balanced_axes(x: Array, parts: int) -> Array:
    """Principal axes as a rotation; the product of variances is about the same in every part."""
    variances, axes = np.linalg.eigh(np.cov(np.asarray(x), rowvar=False))
    sizes = np.log(np.maximum(variances, 1e-9 * variances[-1] + 1e-30))
    room = len(axes) // parts
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for axis in reversed(range(len(axes))):  # the widest first
        open_parts = (part for part in chosen if len(part) < room)
        least = min(open_parts, key=lambda part: sum(sizes[part] - sizes[0]))
        least.append(axis)
    return jnp.asarray(axes[:, np.concatenate(chosen)].T, jnp.float32)


def _procrustes(x: Array, target: Array) -> Array:
    """The orthonormal matrix A that brings A x nearest to the target."""
    u, _, vt = jnp.linalg.svd(target.T @ x, full_matrices=False)
    return u @ vt


def _refined(codebook: Codebook, x: Array, candidates: int) -> Codebook:
    """One round of fitting: codes of all vectors, then each table and the rotation by the rest."""
    y = _rotated(codebook, x)
    coarse_index, fine_index = _indices(codebook, y, candidates)

    def fitted(table: Array, indices: Array, target: Array) -> Array:
        entries = []
        for i, part in enumerate(_parts(target, len(table))):
            means, numbers = _means(part, indices[:, i], table.shape[1])
            entries.append(jnp.where((numbers > 0)[:, None], means, table[i]))
        return jnp.stack(entries)

    def rows(table: Array, indices: Array) -> Array:
        found = [table[i][indices[:, i]] for i in range(len(table))]
        return jnp.concatenate(found, axis=1)

    fine_rows = rows(codebook.fine, fine_index)
    coarse = fitted(codebook.coarse, coarse_index, y - fine_rows)
    rest = y - rows(coarse, coarse_index)
    numbers = [_numbers(index, coarse.shape[1])[index] for index in coarse_index.T]
    others = jnp.repeat(jnp.stack(numbers, 1) - 1, coarse.shape[2], axis=1)
    unseen_rest = rest + (rest - fine_rows) / jnp.maximum(others, 1)
    fine = fitted(codebook.fine, fine_index, unseen_rest)
    decoded = rows(coarse, coarse_index) + rows(fine, fine_index)
    return Codebook(_procrustes(x, decoded), coarse, fine)


def as_numpy(codebook: Codebook) -> dict[str, np.ndarray]:
    """The tables by name."""
    return {name: np.asarray(table) for name, table in codebook._asdict().items()}
