"""Vector quantizer of explicit memories: 14 bytes for a key or value (Memory³ §3.3).

A vector is rotated; each half is replaced by the nearest of 2¹⁴ coarse entries, and each eighth of
the residual by the nearest of 2¹⁰ fine entries. This is the FAISS index factory string
`OPQ20_80,Residual2x14,PQ8x10`, with the same code layout, for any head dim that is divisible by
eight: each implementation can dequantize with the codebooks of the other.

The two halves are encoded independently. FAISS takes the nearest coarse entry of a half; with
`candidates` > 1, several coarse entries are tried with their best fine entries, and the combination
with the least error is kept. Code layout and dequantization are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from m3jax.errors import QuantizerError

HALVES = 2
CANDIDATES = 4  # coarse entries tried for each half
# Vectors compared at a time: on a CPU, their distances to 2¹⁴ entries (8 MB) fit the cache.
_BLOCK, _BLOCK_OF_ACCELERATOR = 128, 4096
_GROUP = 128  # entries per group of the two-level argmax; see `largest`


class Codebook(NamedTuple):
    """Holds the tables of a trained quantizer; a pytree, so that it can be passed to a jitted step.

    Attributes:
      rotation: orthonormal matrix; a rotated vector is `rotation @ x`.
      coarse: entries for each half of a rotated vector.
      fine: entries for each part of the residual after the coarse entries.
    """

    rotation: Float[Array, "H H"]
    coarse: Float[Array, "halves entries H/2"]
    fine: Float[Array, "parts fine_entries H/parts"]

    @property
    def bits(self) -> tuple[int, int]:
        """Returns the bits of a coarse and of a fine index."""
        return self.coarse.shape[1].bit_length() - 1, self.fine.shape[1].bit_length() - 1

    @property
    def code_bytes(self) -> int:
        """Returns the bytes of a code: all coarse, then all fine bits, each rounded up to bytes."""
        coarse, fine = self.bits
        return _bytes(HALVES * coarse) + _bytes(len(self.fine) * fine)


def quantize(
    codebook: Codebook, vectors: Float[Array | np.ndarray, "n H"], *, candidates: int = CANDIDATES
) -> UInt8[Array, "n bytes"]:
    """Quantizes vectors to codes.

    Args:
      codebook: codebook for the head dim H.
      vectors: vectors of any float dtype; the computation is in float32.
      candidates: number of coarse entries tried for each half; 1 gives the same code as FAISS.
    """
    codebook = jax.tree.map(jnp.asarray, codebook)
    coarse, fine = indices_of(codebook, rotated(codebook, vectors), candidates)
    coarse_bits, fine_bits = codebook.bits
    return jnp.concatenate([_pack(coarse, coarse_bits), _pack(fine, fine_bits)], axis=-1)


def dequantize(
    codebook: Codebook, codes: UInt8[Array | np.ndarray, "*n bytes"]
) -> Float[Array, "*n H"]:
    """Dequantizes codes to float32 vectors; can be traced into a step.

    The entries, not the vectors, are rotated back; for NumPy tables this happens once, when the
    step is traced. A vector is then the sum of ten rows of the whole head dim, which are gathered
    faster than short ones, and the step needs no product with the rotation.

    Raises:
      QuantizerError: the codes have another number of bytes than those of the codebook.
    """
    coarse, fine = _unpack_code(codebook, codes)
    tables = [_turned_back(codebook.rotation, table) for table in (codebook.coarse, codebook.fine)]
    rows = [
        # An index has exactly as many bits as its table needs, so it cannot be out of bounds.
        jnp.asarray(entries).at[indices[..., i]].get(mode="promise_in_bounds")
        for table, indices in zip(tables, (coarse, fine), strict=True)
        for i, entries in enumerate(table)
    ]
    return sum(rows[1:], start=rows[0])


def _turned_back(rotation: Any, table: Any) -> Any:
    """Rotates entries `(parts, entries, d)` back to the original basis: `(parts, entries, H)`."""
    return table @ rotation.reshape(len(table), table.shape[2], -1)


def relative_error(
    codebook: Codebook,
    vectors: Float[Array | np.ndarray, "n H"],
    codes: UInt8[Array | np.ndarray, "n bytes"],
) -> float:
    """Returns Σ ‖x − dequantized‖² / Σ ‖x‖²."""
    x = jnp.asarray(vectors, jnp.float32)
    return float(jnp.sum((x - dequantize(codebook, codes)) ** 2) / jnp.sum(x**2))


def rotated(codebook: Codebook, vectors: Array | np.ndarray) -> Array:
    """Rotates vectors `(n, H)` into the basis of a codebook's tables."""
    return jnp.asarray(vectors, jnp.float32) @ codebook.rotation.T


def _encode_half(
    x: Array, coarse: Array, coarse_columns: Array, fine_columns: Array, candidates: int
) -> tuple[Array, Array]:
    """Returns coarse indices `(n,)` and fine indices `(n, parts)` of one half of n vectors."""
    tried = nearest_few(with_one(x) @ coarse_columns, candidates)  # (n, t)
    rest = x[:, None] - coarse[tried]
    if candidates > 1:
        gains = [jnp.max(scores, axis=-1) for scores in _fine_scores(rest, fine_columns)]
        errors = jnp.sum(rest**2, axis=-1) - 2 * sum(gains)
        best = jnp.argmin(errors, axis=-1, keepdims=True)
        tried = jnp.take_along_axis(tried, best, axis=1)
        rest = jnp.take_along_axis(rest, best[..., None], axis=1)
    chosen = [largest(scores)[:, 0] for scores in _fine_scores(rest, fine_columns)]
    return tried[:, 0], jnp.stack(chosen, axis=1)


def _fine_scores(rest: Array, fine_columns: Array) -> Iterator[Array]:
    """Yields for each part the scores `(n, t, entries)` of its fine entries for `(n, t, H/2)`.

    Each part is a separate product, because a batched product would transpose its result.
    """
    parts = rest.reshape(*rest.shape[:-1], len(fine_columns), -1)
    for p, columns in enumerate(fine_columns):
        yield with_one(parts[..., p, :]) @ columns


@functools.partial(jax.jit, static_argnames="candidates")
def indices_of(codebook: Codebook, rotated: Array, candidates: int) -> tuple[Array, Array]:
    """Returns coarse `(n, 2)` and fine `(n, parts)` indices of rotated vectors."""
    coarse, columns = codebook.coarse, comparable(codebook.coarse)
    fine = comparable(codebook.fine)
    fine = fine.reshape(HALVES, -1, *fine.shape[1:])

    def of_block(x: Array) -> tuple[Array, Array]:
        halves = [
            _encode_half(x_half, coarse[i], columns[i], fine[i], candidates)
            for i, x_half in enumerate(parts_of(x, HALVES))
        ]
        return jnp.stack([a for a, _ in halves], 1), jnp.concatenate([b for _, b in halves], 1)

    return by_block(of_block, rotated)


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _pack(indices: Int[Array, "*n count"], bits: int) -> UInt8[Array, "*n bytes"]:
    """Packs indices of `bits` bits each into a little-endian bit stream."""
    count = indices.shape[-1]
    packed = [jnp.zeros(indices.shape[:-1], jnp.uint32)] * _bytes(count * bits)
    for i in range(count):
        first, shift = divmod(i * bits, 8)
        value = indices[..., i].astype(jnp.uint32) << shift
        for byte in range(_bytes(shift + bits)):
            packed[first + byte] |= value >> (8 * byte)
    return (jnp.stack(packed, axis=-1) & 0xFF).astype(jnp.uint8)


def _unpack(stream: UInt8[Array, "*n bytes"], count: int, bits: int) -> Int[Array, "*n count"]:
    """Unpacks the result of `_pack`."""
    indices = []
    for i in range(count):
        first, shift = divmod(i * bits, 8)
        total = jnp.zeros(stream.shape[:-1], jnp.uint32)
        for byte in range(_bytes(shift + bits)):
            total = total | (stream[..., first + byte].astype(jnp.uint32) << (8 * byte))
        indices.append((total >> shift) & (2**bits - 1))
    return jnp.stack(indices, axis=-1).astype(jnp.int32)


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


def parts_of(x_nH: Array, parts: int) -> Array:
    """Splits vectors into parts: `(n, H)` → `(parts, n, H/parts)`."""
    return x_nH.reshape(len(x_nH), parts, -1).swapaxes(0, 1)


def largest(scores: Array) -> Array:
    """Returns the argmax over the last axis, the first of equals; `(*n, entries)` → `(*n,)`.

    Takes the maximum of each group, then the argmax in the best group: a plain maximum is
    vectorized, whereas an argmax over all entries is not.
    """
    size = scores.shape[-1]
    if size % _GROUP:
        return jnp.argmax(scores, axis=-1)
    groups = scores.reshape(*scores.shape[:-1], -1, _GROUP)
    group = jnp.argmax(jnp.max(groups, axis=-1), axis=-1)
    inside = jnp.take_along_axis(groups, group[..., None, None], axis=-2)[..., 0, :]
    return group * _GROUP + jnp.argmax(inside, axis=-1)


def comparable(entries: Array) -> Array:
    """Transposes entries `(*parts, n, d)` to `(*parts, d + 1, n)`, with −‖e‖²/2 as last row."""
    norms = -0.5 * jnp.sum(entries**2, axis=-1, keepdims=True)
    return jnp.concatenate([entries, norms], axis=-1).swapaxes(-1, -2)


def with_one(x: Array) -> Array:
    """Appends 1 to vectors: their product with `comparable` entries is x · e − ‖e‖²/2.

    This score is largest for the nearest entry.
    """
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def by_block(f: Callable[[Array], Any], x: Array) -> Any:
    """Applies `f` to vectors `(n, d)` block by block, which bounds the size of intermediates."""
    n = len(x)
    on_cpu = jax.default_backend() == "cpu"
    block = min(_BLOCK if on_cpu else _BLOCK_OF_ACCELERATOR, n)
    padded = jnp.pad(x, ((0, -n % block), (0, 0))).reshape(-1, block, x.shape[1])
    blocks = jax.lax.map(f, padded)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], blocks)


def nearest_few(scores: Array, count: int) -> Array:
    """Returns the indices of the largest scores `(*n, entries)`, `count` of them, or all if fewer.

    If the number of entries is a multiple of the group size, this is an approximate top-k: at most
    one index per group, the group's best, so that there can be fewer than `count`.
    """
    if count == 1 or scores.shape[-1] % _GROUP:
        few = min(count, scores.shape[-1])
        return jax.lax.top_k(scores, few)[1] if count > 1 else largest(scores)[..., None]
    groups = scores.reshape(*scores.shape[:-1], -1, _GROUP)
    group = jax.lax.top_k(jnp.max(groups, axis=-1), min(count, groups.shape[-2]))[1]
    inside = jnp.take_along_axis(groups, group[..., None], axis=-2)
    return group * _GROUP + jnp.argmax(inside, axis=-1)


@jax.jit
def nearest_of(x: Array, entries: Array) -> Array:
    """Returns the index of the entry in `(entries, d)` nearest to each vector `(n, d)`."""
    columns = comparable(entries)
    return by_block(lambda block: largest(with_one(block) @ columns), x)
