"""Storage codecs of keys and values in a bank: plain, int8, or vector-quantized.

A compressed key or value is a code: `width` bytes on the last axis instead of the head dim. Codes
are copied to the device and dequantized there, in the step (`Codec.dequantize` can be traced).
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from m3jax.errors import QuantizerError
from m3jax.memory import codebooks, quantizer
from m3jax.memory.quantizer import Codebook
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.slots import SlotLayout

NONE, INT8, VECTOR = "none", "int8", "vector"
_SCALE_BYTES = 2  # bfloat16


@dataclasses.dataclass(frozen=True)
class Codec:
    """Converts keys and values to and from the form in which a bank stores them.

    Attributes:
      name: `none`, `int8` (one byte per number and one scale per vector) or `vector` (14 bytes per
        vector, with the default bits).
      head_dim: head dim H of keys and values.
      dtype: dtype of dequantized memories, and of stored memories if the name is `none`.
      codebooks: codebooks of the keys and of the values; None unless the name is `vector`.
    """

    name: str
    head_dim: int
    dtype: str
    codebooks: tuple[Codebook, Codebook] | None = None

    @property
    def width(self) -> int:
        """Returns the length of a stored key or value, in items of `stored_dtype`."""
        if self.codebooks is not None:
            return self.codebooks[0].code_bytes
        return self.head_dim + (_SCALE_BYTES if self.name == INT8 else 0)

    @property
    def stored_dtype(self) -> str:
        """Returns the dtype of the stored array."""
        return self.dtype if self.name == NONE else "uint8"

    def item_shape(self, slots: SlotLayout) -> tuple[int, ...]:
        """Returns the shape of one memory's stored keys, which is that of its values."""
        return (*slots.item_shape, self.width)

    @property
    def plain(self) -> bool:
        """Returns True if keys and values are stored without compression."""
        return self.name == NONE

    def quantize(self, memories: Float[Array, "R 2 L K P H"]) -> Array:
        """Converts keys and values to stored form, `(R, 2, L, K, P, width)`."""
        if self.name == NONE:
            return memories.astype(self.dtype)
        if self.name == INT8:
            return _to_int8(memories)
        assert self.codebooks is not None
        parts = [
            quantizer.quantize(book, memories[:, i].reshape(-1, self.head_dim))
            for i, book in enumerate(self.codebooks)
        ]
        shape = (*memories.shape[:1], *memories.shape[2:-1], self.width)
        return jnp.stack([part.reshape(shape) for part in parts], axis=1)

    def dequantize(self, memory: ExplicitMemory) -> ExplicitMemory:
        """Converts stored keys and values `(L, …, K, P, width)` back to `(L, …, K, P, H)`."""
        if self.plain:
            return memory
        keys, values = (self._dequantize_part(part, memory[part]) for part in range(2))
        return ExplicitMemory(keys, values, memory.length)

    def _dequantize_part(self, part: int, codes: Any) -> Array:
        codes = jnp.asarray(codes)
        if self.name == INT8:
            return _from_int8(codes).astype(self.dtype)
        assert self.codebooks is not None
        return quantizer.dequantize(self.codebooks[part], codes).astype(self.dtype)


def train_codec(
    memories: Float[np.ndarray, "R 2 L K P H"],
    real: Bool[np.ndarray, "R L K P"],
    dtype: str,
    coarse_bits: int,
    fine_bits: int,
) -> Codec:
    """Fits the codebooks of the codec `vector` to the used slots of sample memories.

    Args:
      memories: memories of uniformly sampled references.
      real: mask of slots that hold a token (`SlotLayout.real`).
      dtype: dtype of dequantized memories.
      coarse_bits, fine_bits: see `codebooks.train`.

    Raises:
      QuantizerError: there are too few vectors, a number is not finite, or the head dim does not
        split into the quantizer's parts.
    """
    head_dim = memories.shape[-1]

    def book(part: int, name: str) -> Codebook:
        vectors = memories[:, part][real]
        return codebooks.train(
            vectors.astype(np.float32),
            seed=part,
            coarse_bits=coarse_bits,
            fine_bits=fine_bits,
            progress=f"codebook of {name}",
        )

    return Codec(VECTOR, head_dim, dtype, (book(0, "keys"), book(1, "values")))


def same(codec: Codec, other: Codec) -> bool:
    """Returns True if both codecs store memories in the same form, with equal codebooks."""
    if codec.codebooks is None or other.codebooks is None:
        return codec == other
    tables = zip(jax.tree.leaves(codec.codebooks), jax.tree.leaves(other.codebooks), strict=True)
    return codec.dtype == other.dtype and all(np.array_equal(a, b) for a, b in tables)


def to_bytes(codec: Codec, owner: str) -> bytes:
    """Serializes the codebooks of a codec `vector`, and their `Binding.owner`, as an `.npz` file.

    Equal codebooks and owners give equal bytes.
    """
    assert codec.codebooks is not None
    buffer = io.BytesIO()
    tables: dict[str, Any] = {
        f"{part}_{name}": table
        for part, book in zip(("keys", "values"), codec.codebooks, strict=True)
        for name, table in book._asdict().items()
    }
    np.savez(buffer, owner=np.frombuffer(owner.encode(), np.uint8), **tables)
    return buffer.getvalue()


def from_bytes(data: bytes, dtype: str) -> tuple[Codec, str]:
    """Reads codec and owner from the bytes of `to_bytes`; raises `QuantizerError` if invalid."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as tables:
            books = [
                Codebook(*(tables[f"{part}_{name}"] for name in Codebook._fields))
                for part in ("keys", "values")
            ]
            owner = tables["owner"].tobytes().decode()
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise QuantizerError(f"these are no codebooks: {error}") from error
    head_dim = books[0].rotation.shape[0]
    return Codec(VECTOR, head_dim, dtype, (books[0], books[1])), owner


def _to_int8(x: Float[Array, "*n H"]) -> UInt8[Array, "*n H+2"]:
    """Quantizes each vector to int8 multiples of a bfloat16 scale, stored in the last two bytes."""
    x = x.astype(jnp.float32)
    # A little above max / 127, so that no number exceeds 127 if bfloat16 rounds the scale down.
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) * ((1 + 2.0**-8) / 127)
    scale = scale.astype(jnp.bfloat16)
    divisor = scale.astype(jnp.float32)
    numbers = jnp.round(x / jnp.where(divisor == 0, 1.0, divisor)).astype(jnp.int8)
    stored = jax.lax.bitcast_convert_type(scale[..., 0], jnp.uint8)
    return jnp.concatenate([jax.lax.bitcast_convert_type(numbers, jnp.uint8), stored], axis=-1)


def _from_int8(codes: UInt8[Array, "*n width"]) -> Float[Array, "*n H"]:
    numbers = jax.lax.bitcast_convert_type(codes[..., :-_SCALE_BYTES], jnp.int8)
    scale = jax.lax.bitcast_convert_type(codes[..., -_SCALE_BYTES:], jnp.bfloat16)
    return numbers.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]
