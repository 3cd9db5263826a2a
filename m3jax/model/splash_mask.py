"""Mask of the splash kernel: layout of queries and keys, and the keys that each query sees.

A mask is a function of an integer code of the query and of the position of the key. The kernel
evaluates it for every pair, so that no array of T × S is stored. The blocks that the kernel skips
are found beforehand from a mask that holds for all rows of a batch (`row_mask`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from m3jax.errors import ConfigError
from m3jax.model.attention_mask import Packing
from m3jax.private_apis import computable_mask

_ComputableMask: Any = computable_mask()

LANES = 128  # a block of keys, and of query rows, is a multiple of this

# VMEM in bytes that the compiler gives a kernel, and an estimate of the bytes of a block: eleven
# float32 numbers per lane for every row of queries and every key (running maximum, sum and output,
# codes, segments, log-sum-exp, the inputs twice), and one per score. The estimate matches the
# compiler for v5p (17.6 MiB for 2560 rows × 256 keys); the compiler for v5e needs less.
VMEM = 2**24
EDGE_BYTES = 11 * LANES * 4
SCORE_BYTES = 4

# Longest packed row, in tokens, whose 32-bit codes leave 8 bits for the index of a chunk; up to it
# `model.attention = 'auto'` chooses the splash kernel.
PACKED_TOKENS = 4096
_CODE_BITS = 32


@dataclasses.dataclass(frozen=True)
class Layout:
    """Positions of queries and keys in the padded axes of the kernel.

    Key axis: a gap of unused keys, `slots` memory slots, the prefix, and from `start` on the
    context. Prefix and context are adjacent, so that the mask tests both with one comparison. (The
    order of keys does not matter to a softmax.) Query axis: token 0 with its `group` heads, token
    1, ….

    Attributes:
      tokens: tokens T of a row.
      group: query heads G per key-value head.
      prefix: number of keys of the prefix.
      slots: number C·M·P of memory slots of a row.
      chunk_slots: number M·P of memory slots of a chunk.
      chunk_length: tokens Q of a chunk.
      window: number of chunks whose memories a query reads.
      block: tokens per block of queries.
      kv_block: keys per block.
      start: key position of the first token.
      packed: whether rows hold several texts, with boundaries that differ between rows.
    """

    tokens: int
    group: int
    prefix: int
    slots: int
    chunk_slots: int
    chunk_length: int
    window: int
    block: int
    kv_block: int
    start: int
    packed: bool = False

    @property
    def padded_tokens(self) -> int:
        """Number of tokens, padded to a multiple of `block`."""
        return _up(self.tokens, self.block)

    @property
    def rows(self) -> int:
        """Length of the query axis, `group` rows per padded token."""
        return self.padded_tokens * self.group

    @property
    def keys(self) -> int:
        """Length of the key axis, padded to a multiple of `kv_block`."""
        return _up(self.start + self.tokens, self.kv_block)

    @property
    def gap(self) -> int:
        """Number of unused keys in front of the memory slots."""
        return self.start - self.prefix - self.slots

    @property
    def chunks(self) -> int:
        """Number of chunks of a row that have memory slots."""
        return self.slots // self.chunk_slots if self.chunk_slots else 0

    @property
    def shift(self) -> int:
        """Number of low bits of a code that hold the query's position, in rows of one text."""
        return (self.prefix + self.tokens).bit_length()

    @property
    def packed_bits(self) -> tuple[int, int, int]:
        """Bits of the three fields of a code in packed rows, from the low bits up: start of the
        text, position in the text, first chunk that is read."""
        place = (self.tokens - 1).bit_length()
        return place, place, self.chunks.bit_length()


@functools.lru_cache(maxsize=64)
def plan(
    tokens: int,
    group: int,
    *,
    chunk_length: int,
    prefix: int = 0,
    chunks: int = 0,
    chunk_slots: int = 0,
    window: int = 1,
    block: int,
    kv_block: int,
    packed: bool = False,
) -> Layout:
    """Chooses block sizes and the gap for a row, so that the kernel visits the fewest blocks.

    Two gaps are compared: one that aligns the context to blocks of keys, which wastes the least on
    the causal diagonal, and none, where memories share a block with the first tokens.

    Raises:
      ConfigError: the codes would need too many bits: too many tokens and memory slots, or, in
        packed rows, too many tokens and chunks.
    """
    unit = LANES // math.gcd(LANES, group)  # G · block has to be a multiple of the lanes
    slots = chunks * chunk_slots
    kv_block = min(_up(kv_block, LANES), _up(prefix + slots + tokens, LANES))
    block = min(_up(block, unit), _up(tokens, unit))
    while block > unit and _vmem(block * group, kv_block) > VMEM:
        block = _up(block // 2, unit)
    window = min(window, max(1, chunks))
    layouts = [
        Layout(
            *(tokens, group, prefix, slots, chunk_slots, chunk_length, window, block, kv_block),
            start=start,
            packed=packed,
        )
        for start in dict.fromkeys((_up(prefix + slots, kv_block), prefix + slots))
    ]
    if packed and sum(layouts[0].packed_bits) > _CODE_BITS:
        raise ConfigError(
            f"attention: a row of {tokens} tokens in several texts with {chunks} chunks is too long"
            " for the splash kernel (twice the bits of the one and the bits of the other are more"
            f" than {_CODE_BITS}); set model.attention = 'blocked'"
        )
    if not packed and any(x.shift + (x.gap + slots).bit_length() > 31 for x in layouts):
        raise ConfigError(
            f"attention: a row of {tokens} tokens and {slots} memory slots is too long for the"
            " splash kernel (tokens × slots < 2³⁰); set model.attention = 'blocked'"
        )
    return layouts[0] if len(layouts) == 1 else min(layouts, key=lambda x: pairs(x)[0])


@functools.lru_cache(maxsize=64)
def pairs(layout: Layout) -> tuple[int, int]:
    """Counts (query, key) pairs of one row and one head: pairs in the blocks that the kernel
    visits, and visible pairs; their quotient measures wasted work. In packed rows a pair counts as
    visible if some boundaries of texts make it visible."""
    mask = row_mask(dataclasses.replace(layout, group=1))
    visited = useful = 0
    for row in range(0, layout.padded_tokens, layout.block):
        for column in range(0, layout.keys, layout.kv_block):
            part = mask[row : row + layout.block, column : column + layout.kv_block]
            visited += bool(part.any())
            useful += int(part[: max(0, layout.tokens - row), max(0, layout.gap - column) :].sum())
    return visited * layout.block * layout.kv_block, useful


def _vmem(rows: int, keys: int) -> int:
    """Estimates the bytes of VMEM for a block of query rows and keys."""
    return EDGE_BYTES * (rows + keys) + SCORE_BYTES * rows * keys


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class _LayoutMask(_ComputableMask):
    """Base class of masks of a row: `mask[rows, keys]` computes a part of the mask on demand.

    The kernel reads `q_sequence`, the code of every row of queries, and `mask_function(code, key)`.
    """

    def __init__(self, layout: Layout, function: Any, codes: np.ndarray):
        super().__init__((layout.rows, layout.keys), function)
        self.layout, self.q_sequence = layout, codes

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.layout == other.layout

    def __hash__(self) -> int:
        return hash((type(self), self.layout))


# -- rows of one text ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Visible:
    """Mask function of rows of one text: returns true if the query with `code` sees key `key`.

    The low `shift` bits of a code are the token's position in prefix and context; the bits above
    are the first memory slot that the token reads. As the kernel evaluates it for every pair, it
    needs no division by the chunk length, and one unsigned comparison tests both ends of a range.
    """

    first: int  # key position of the first key of prefix and context
    shift: int
    reach: int  # number of memory slots in the window

    def __call__(self, code: Any, key: Any) -> Any:
        place = (code & ((1 << self.shift) - 1)).astype(np.uint32)
        seen = (key - self.first).astype(np.uint32) <= place
        if self.reach:
            seen = seen | ((key - (code >> self.shift)).astype(np.uint32) < np.uint32(self.reach))
        return seen


class RowMask(_LayoutMask):
    """Mask of a row of one text.

    Padding rows have the code of the last token, so that they cause no further blocks to be
    visited. The window of the first chunks extends into the gap, which segment ids hide.
    """

    def __init__(self, layout: Layout):
        token = np.minimum(np.arange(layout.rows) // layout.group, layout.tokens - 1)
        chunk = token // layout.chunk_length - layout.window + 1
        slot = layout.gap + chunk * layout.chunk_slots  # negative before the first chunk
        codes = ((token + layout.prefix) | slot << layout.shift).astype(np.int32)
        reach = layout.window * layout.chunk_slots
        visible = _Visible(layout.start - layout.prefix, layout.shift, reach)
        super().__init__(layout, visible, codes)

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, keys = index
        columns = np.arange(self.shape[1], dtype=np.int32)[keys]
        # The heads of a group have the same row of the mask: compute it once.
        codes, inverse = np.unique(self.q_sequence[rows], return_inverse=True)
        return self.mask_function(codes[:, None], columns[None])[inverse]


# -- rows of several texts -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _PackedVisible:
    """Mask function of packed rows: returns true if the query with `code` sees key `key`.

    The fields of a code (`Layout.packed_bits`) are, from the low bits up: index in the row of the
    text's first token, the query's position in its text, from which also the number of chunks to
    read follows, and the first chunk whose memories it reads. Per pair only three differences and
    comparisons are computed; everything else depends on the query or the key alone.
    """

    layout: Layout

    def __call__(self, code: Any, key: Any) -> Any:
        layout, (low, middle, _) = self.layout, self.layout.packed_bits
        first = code & ((1 << low) - 1)
        place = jax.lax.shift_right_logical(code, _like(code, low)) & ((1 << middle) - 1)
        seen = (key - first - layout.start).astype(np.uint32) <= place.astype(np.uint32)
        if layout.prefix:
            in_front = (key - (layout.start - layout.prefix)).astype(np.uint32)
            seen = seen | (in_front < np.uint32(layout.prefix))
        if layout.slots:
            chunk = jax.lax.shift_right_logical(code, _like(code, low + middle))
            slot = layout.gap + chunk * layout.chunk_slots
            reach = jnp.minimum(self._whole_chunks(place) + 1, layout.window) * layout.chunk_slots
            # Padding counts as a last text without chunks: for it `reach` becomes 0.
            reach = jnp.minimum(reach, layout.gap + layout.slots - slot)
            seen = seen | ((key - slot).astype(np.uint32) < reach.astype(np.uint32))
        return seen

    def _whole_chunks(self, place: Any) -> Any:
        """Returns place // chunk_length without an integer division, which the chip lacks."""
        Q = self.layout.chunk_length
        if Q & (Q - 1) == 0:
            return jax.lax.shift_right_logical(place, _like(place, Q.bit_length() - 1))
        # Exact for places below 2**bits: the error of the factor adds less than 1 / Q.
        shift = self.layout.packed_bits[1] + Q.bit_length()
        product = place * ((1 << shift) // Q + 1)
        return jax.lax.shift_right_logical(product, _like(product, shift))


def _like(x: Any, value: int) -> Any:
    return jnp.full(x.shape, value, x.dtype)


class PackedMask(_LayoutMask):
    """Mask of packed rows for skipping blocks: shows each key that is visible for some boundaries.

    The kernel skips the blocks that this mask hides, for all rows of a batch alike. Within blocks
    it uses the codes of each row (`packed_codes`) in place of `q_sequence`.

    For any boundaries, token t reads no chunk before the window that it has in a row of one text,
    and no chunk with an index above t, since every chunk has at least one token.
    """

    def __init__(self, layout: Layout):
        super().__init__(layout, _PackedVisible(layout), np.zeros(layout.rows, np.int32))

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, keys = index
        layout = self.layout
        key = np.arange(self.shape[1])[keys][None]
        token = np.minimum(np.arange(self.shape[0])[rows] // layout.group, layout.tokens - 1)
        token, inverse = np.unique(token, return_inverse=True)
        token = token[:, None]
        context = key - layout.start
        seen = (context <= token) & (context >= -layout.prefix)
        if layout.slots:
            chunk = (key - layout.gap) // layout.chunk_slots
            first = token // layout.chunk_length - layout.window + 1
            inside = (chunk >= 0) & (chunk < layout.chunks)
            seen = seen | inside & (chunk >= first) & (chunk <= token)
        return seen[inverse]


def packed_codes(layout: Layout, packing: Packing) -> Int[Array, "B rows"]:
    """Returns the code of every row of queries; padding rows have the code of the last token."""
    start_BT, place_BT = packing.starts, packing.positions
    low, middle, _ = layout.packed_bits
    code_BT = start_BT | place_BT << low
    if layout.slots:
        chunk_BT = packing.first_chunks + place_BT // layout.chunk_length
        first_BT = jnp.maximum(packing.first_chunks, chunk_BT - layout.window + 1)
        code_BT = code_BT | jnp.minimum(first_BT, layout.chunks) << (low + middle)
    missing = layout.padded_tokens - layout.tokens
    code_BT = jnp.pad(code_BT.astype(jnp.int32), ((0, 0), (0, missing)), mode="edge")
    return jnp.repeat(code_BT, layout.group, axis=1)


def row_mask(layout: Layout) -> RowMask | PackedMask:
    """Returns the mask from which the kernel finds the blocks to visit."""
    return PackedMask(layout) if layout.packed else RowMask(layout)
