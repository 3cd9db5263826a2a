"""Attention on TPU: the splash kernel of JAX with the mask of prefix, memories and context.

The kernel walks over blocks of (queries, keys) and skips those that the mask hides entirely: the
future and the memories outside the window. The mask is a function of two numbers that the kernel
evaluates where it needs it; it is never written down as an array of T × S.

Three choices, by counted work:

* The G query heads that share a key-value head are rows of one query axis, token by token. Keys
  and values are read once instead of G times, and a block of few tokens still fills the matrix
  unit: causal blocks waste less.
* The gradient uses the kernel's two passes, one for dq and one for dk and dv. A fused pass exists:
  it spares two of seven products (0.31 ms of a v5e for a row and layer of the 2.4B model, at its
  peak), but writes a dq of the size of all queries for every block of keys and adds them up:
  265 MB more moved (0.32 ms), 1.7 GB of temporaries for 8 rows, and sums rounded to the dtype of
  the queries.
* Memory slots past the length differ from row to row, which a static mask cannot say: they are
  another segment than everything else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jaxtyping import Array, Float

from m3jax.model.keyvalues import ExplicitMemory, KeyValues, real_slots

LANES = 128  # a block of keys, and of query rows, is a multiple of this

# What the compiler gives the kernels of VMEM, and an estimate of what a block takes: for every row
# of queries and every key eleven float32 numbers in each lane (running maximum, sum and output,
# codes, segments, log-sum-exp, the inputs twice), and one for every score. For 2560 rows × 256 keys
# it makes 17.6 MiB, as the compiler for v5p does; for v5e, which takes less, it is on the safe
# side.
VMEM = 2**24
EDGE_BYTES = 11 * LANES * 4
SCORE_BYTES = 4

# Name of the kernel's output and log-sum-exp for `jax.checkpoint` policies: saving them spares the
# forward kernel in the backward pass.
RESIDUALS = "attention"


def splash_attend(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    prefix: KeyValues | None = None,
    memory: ExplicitMemory | None = None,
    *,
    chunk_length: int = 64,
    window: int = 1,
    block: int = 256,
    kv_block: int = 256,
    interpret: bool = False,
) -> Float[Array, "B T K G H"]:
    """`attend` by the splash kernel: the same arguments and result.

    Scores are summed in float32; the scale H**-0.5 is put on the queries, in their dtype.

    Args:
      q_BTKGH, k_BTKH, v_BTKH, prefix, memory, chunk_length, window: as in `attend`.
      block: tokens of a block of queries; raised to what the kernel needs, lowered to T and to
        what the chip's VMEM holds.
      kv_block: keys of a block; raised to a multiple of 128, lowered to what there is.
      interpret: evaluate the kernel with plain operations, for any platform (slow).

    Raises:
      ValueError: the row is too long.
    """
    B, T, K, G, H = q_BTKGH.shape
    layout = plan(
        T,
        G,
        prefix=0 if prefix is None else prefix.keys.shape[0],
        chunks=0 if memory is None else memory.keys.shape[1],
        chunk_slots=0 if memory is None else memory.keys.shape[2] * memory.keys.shape[4],
        chunk_length=chunk_length,
        window=window,
        block=block,
        kv_block=kv_block,
    )
    padded = jnp.pad(q_BTKGH * H**-0.5, ((0, 0), (0, layout.padded_tokens - T), *[(0, 0)] * 3))
    q_BKRH = jnp.moveaxis(padded, 2, 1).reshape(B, K, layout.rows, H)
    k_BKSH = _lay_out(layout, k_BTKH, prefix and prefix.keys, memory and memory.keys)
    v_BKSH = _lay_out(layout, v_BTKH, prefix and prefix.values, memory and memory.values)
    kernel = make_kernel(layout, K, interpret)
    if memory is None:
        out_BKRH = jax.vmap(kernel)(q_BKRH, k_BKSH, v_BKSH)
    else:
        same = jnp.zeros((layout.rows,), jnp.int32)
        out_BKRH = jax.vmap(
            lambda q, k, v, segments: kernel(q, k, v, splash.SegmentIds(same, segments))
        )(q_BKRH, k_BKSH, v_BKSH, _segments(layout, memory))
    out_BKTGH = out_BKRH.reshape(B, K, layout.padded_tokens, G, H)[:, :, :T]
    return jnp.moveaxis(out_BKTGH, 1, 2).astype(v_BTKH.dtype)


def _lay_out(
    layout: Layout, x_BTKH: Array, prefix_SKH: Array | None, memory_BCMKPH: Array | None
) -> Array:
    """Keys or values of a row `(B, K, layout.keys, H)`, zeros in the gap and at the end."""
    B, T, K, H = x_BTKH.shape
    parts = [jnp.zeros((B, K, layout.gap, H))]
    if memory_BCMKPH is not None:
        parts.append(jnp.moveaxis(memory_BCMKPH, 3, 1).reshape(B, K, -1, H))
    if prefix_SKH is not None:
        x_BKSH = jnp.moveaxis(prefix_SKH, 1, 0)[None]
        parts.append(jnp.broadcast_to(x_BKSH, (B, *x_BKSH.shape[1:])))
    parts.append(jnp.moveaxis(x_BTKH, 2, 1))
    parts.append(jnp.zeros((B, K, layout.keys - layout.start - T, H)))
    return jnp.concatenate([part.astype(x_BTKH.dtype) for part in parts], axis=2)


def _segments(layout: Layout, memory: ExplicitMemory) -> Array:
    """1 for the gap and the memory slots that hold no token, 0 for every other key: `(B, keys)`."""
    real = real_slots(memory)
    real_BS = real.reshape(real.shape[0], -1).astype(jnp.int32)
    after = layout.keys - layout.gap - layout.slots
    real_BS = jnp.pad(real_BS, ((0, 0), (0, after)), constant_values=1)
    return 1 - jnp.pad(real_BS, ((0, 0), (layout.gap, 0)))


# -- where things lie ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """Positions of queries and keys in the padded axes that the kernel works on.

    Keys: a gap, `slots` memory slots, the prefix, and from `start` on the context: prefix and
    context are one run of keys, which costs the mask the fewest operations. (A softmax does not
    mind the order.) Rows of queries: token 0 with its `group` heads, token 1 …

    Attributes:
      tokens: tokens T of a row.
      group: query heads G of a key-value head.
      prefix: keys of the prefix.
      slots: memory slots C·M·P of a row.
      chunk_slots: memory slots M·P of a chunk.
      chunk_length: tokens Q of a chunk.
      window: chunks whose memories a query reads.
      block: tokens of a block of queries.
      kv_block: keys of a block.
      start: key position of the first token.
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

    @property
    def padded_tokens(self) -> int:
        return _up(self.tokens, self.block)

    @property
    def rows(self) -> int:
        return self.padded_tokens * self.group

    @property
    def keys(self) -> int:
        return _up(self.start + self.tokens, self.kv_block)

    @property
    def gap(self) -> int:
        return self.start - self.prefix - self.slots


@functools.lru_cache(maxsize=64)
def plan(
    tokens: int,
    group: int,
    *,
    prefix: int,
    chunks: int,
    chunk_slots: int,
    chunk_length: int,
    window: int,
    block: int,
    kv_block: int,
) -> Layout:
    """The layout of a row; the gap before the context is the one with the fewest visited blocks.

    Aligned to blocks of keys, the context has the least waste on the diagonal; without a gap, the
    memories share a block with the first tokens.

    Raises:
      ValueError: the row has too many tokens and memory slots.
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
        )
        for start in dict.fromkeys((_up(prefix + slots, kv_block), prefix + slots))
    ]
    if any(_shift(layout) + (layout.gap + slots).bit_length() > 31 for layout in layouts):
        raise ValueError(
            f"attention: a row of {tokens} tokens and {slots} memory slots is too long for the"
            " splash kernel (tokens × slots < 2³⁰); set model.attention = 'blocked'"
        )
    return layouts[0] if len(layouts) == 1 else min(layouts, key=lambda x: pairs(x)[0])


@functools.lru_cache(maxsize=64)
def pairs(layout: Layout) -> tuple[int, int]:
    """Pairs of query and key of one row and one head: in the blocks that the kernel visits, and
    those that the mask shows, whose quotient is the waste."""
    mask = RowMask(dataclasses.replace(layout, group=1))
    visited = useful = 0
    for row in range(0, layout.padded_tokens, layout.block):
        for column in range(0, layout.keys, layout.kv_block):
            part = mask[row : row + layout.block, column : column + layout.kv_block]
            visited += bool(part.any())
            useful += int(part[: max(0, layout.tokens - row), max(0, layout.gap - column) :].sum())
    return visited * layout.block * layout.kv_block, useful


def _vmem(rows: int, keys: int) -> int:
    return EDGE_BYTES * (rows + keys) + SCORE_BYTES * rows * keys


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


# -- the mask --------------------------------------------------------------------------------------


def _shift(layout: Layout) -> int:
    return (layout.prefix + layout.tokens).bit_length()


@dataclasses.dataclass(frozen=True)
class _Visible:
    """Whether a key is seen, from the code of the query and the position of the key.

    The code is the token's place in the run of prefix and context and, `shift` bits up, the first
    slot that it reads. The kernel evaluates this for every pair, beside the softmax: no division by
    the chunk length is left, and unsigned numbers test both ends of a run at once.
    """

    first: int  # key position of the run of prefix and context
    shift: int
    reach: int  # memory slots in the window

    def __call__(self, code: Any, key: Any) -> Any:
        place = (code & ((1 << self.shift) - 1)).astype(np.uint32)
        seen = (key - self.first).astype(np.uint32) <= place
        if self.reach:
            seen = seen | ((key - (code >> self.shift)).astype(np.uint32) < np.uint32(self.reach))
        return seen


class RowMask(mask_lib._ComputableMask):
    """Mask of one row: `mask[rows, keys]` in the layout, computed when asked for.

    The kernel gets `q_sequence`, the code of every row of queries, and `mask_function`. Rows that
    only pad have the code of the last token, so that no block is visited for them alone. The
    window of the first chunks reaches into the gap, which is of another segment.
    """

    def __init__(self, layout: Layout):
        reach = layout.window * layout.chunk_slots
        function = _Visible(layout.start - layout.prefix, _shift(layout), reach)
        super().__init__((layout.rows, layout.keys), function)
        self.layout = layout
        token = np.minimum(np.arange(layout.rows) // layout.group, layout.tokens - 1)
        chunk = token // layout.chunk_length - layout.window + 1
        slot = layout.gap + chunk * layout.chunk_slots  # negative before the first chunk
        self.q_sequence = ((token + layout.prefix) | slot << _shift(layout)).astype(np.int32)

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, keys = index
        columns = np.arange(self.shape[1], dtype=np.int32)[keys]
        # The heads of a group see the same: their row is computed once.
        codes, inverse = np.unique(self.q_sequence[rows], return_inverse=True)
        return self.mask_function(codes[:, None], columns[None])[inverse]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowMask) and self.layout == other.layout

    def __hash__(self) -> int:
        return hash(self.layout)


def make_kernel(layout: Layout, kv_heads: int, interpret: bool = False) -> Any:
    """The kernel of one row: `(K, rows, H)`, `(K, keys, H)`, `(K, keys, H)`, segments → output.

    Made where it is traced, since its tables become constants of the program; the work on the mask
    is done once for each layout.
    """
    rows, keys = layout.block * layout.group, layout.kv_block
    sizes = splash.BlockSizes(
        block_q=rows,
        block_kv=keys,
        block_kv_compute=keys,
        block_q_dkv=rows,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        block_q_dq=rows,
        block_kv_dq=keys,
    )
    return splash.make_splash_mha_single_device(
        mask_lib.MultiHeadMask([RowMask(layout)] * kv_heads),
        block_sizes=sizes,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
