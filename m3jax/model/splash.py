"""Attention on TPU: the splash kernel of JAX with the mask of prefix, memories and context.

The kernel processes blocks of (queries, keys) and skips blocks that the mask hides entirely: future
tokens, and memories outside the window. The mask and the layout are in `splash_mask`.

Three design choices, based on counted work:

* The G query heads of a key-value head are interleaved in one query axis: token 0 with its G heads,
  token 1, …. Keys and values are read once instead of G times, and blocks of few tokens, which
  waste less work on the causal diagonal, still fill the matrix unit.
* The gradient uses the kernel's two passes, for dq and for dk and dv. The fused pass saves two of
  seven products but writes a dq of all queries for every block of keys: the same time on a v5e,
  1.7 GB of temporaries for 8 rows of the 2.4B model, and sums rounded to the queries' dtype.
* Empty memory slots differ between rows, which a static mask cannot express: segment ids hide them.

In packed rows (`Packing`) the boundaries of texts differ between rows. The mask codes of queries
are then an input of the kernel, and it skips only blocks that are hidden for all possible
boundaries; blocks between two texts are computed and masked. Segment ids could not separate texts:
a key has one segment id, but the keys of the prefix are visible to all texts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jaxtyping import Array, Float

from m3jax.model.attention_mask import ExplicitMemory, Scope, keys_of_heads, real_slots
from m3jax.model.splash_mask import Layout, packed_codes, plan, row_mask
from m3jax.private_apis import with_query_codes

# Name of the kernel's output and log-sum-exp for `jax.checkpoint` policies: if they are saved, the
# backward pass does not run the forward kernel again.
RESIDUALS = "attention"


def splash_attend(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scope: Scope,
    block: int = 256,
    kv_block: int = 256,
    interpret: bool = False,
) -> Float[Array, "B T K G H"]:
    """Computes `attend` by the splash kernel.

    Scores are summed in float32; queries are scaled by H**-0.5 in their own dtype. With
    `scope.counts` every key-value head is a kernel call of its own, since segment ids, which hide
    the memory slots that a head does not have, are the same for all heads of a call.

    Args:
      q_BTKGH, k_BTKH, v_BTKH: as in `attend`.
      scope: as in `attend`, without `sight`.
      block: tokens per block of queries; raised to the kernel's minimum, lowered to T and to the
        VMEM of a chip.
      kv_block: keys per block; raised to a multiple of 128, lowered to the number of keys.
      interpret: whether to evaluate the kernel with plain operations, on any platform (slow).

    Raises:
      ConfigError: the row has too many tokens, memory slots or chunks for the mask's codes.
    """
    prefix, memory, packing, counts = scope.prefix, scope.memory, scope.packing, scope.counts
    B, T, K, G, H = q_BTKGH.shape
    chunks = 0 if memory is None else memory.keys.shape[1]
    layout = plan(
        T,
        G,
        prefix=scope.prefix_slots,
        chunks=chunks,
        chunk_slots=scope.memory_slots // chunks if chunks else 0,
        chunk_length=scope.chunk_length,
        window=scope.window,
        block=block,
        kv_block=kv_block,
        packed=packing is not None,
    )
    padded = jnp.pad(q_BTKGH * H**-0.5, ((0, 0), (0, layout.padded_tokens - T), *[(0, 0)] * 3))
    q_BKRH = jnp.moveaxis(padded, 2, 1).reshape(B, K, layout.rows, H)
    k_BKSH = _lay_out(layout, k_BTKH, prefix and prefix.keys, memory and memory.keys)
    v_BKSH = _lay_out(layout, v_BTKH, prefix and prefix.values, memory and memory.values)
    head_by_head = memory is not None and counts is not None
    kernel = make_kernel(layout, 1 if head_by_head else K, interpret)
    same = jnp.zeros((layout.rows,), jnp.int32)

    def row(q: Array, k: Array, v: Array, codes: Array | None, segments: Array | None) -> Array:
        of_row = kernel if codes is None else with_query_codes(kernel, codes)
        if segments is None:
            return of_row(q, k, v)
        return of_row(q, k, v, splash.SegmentIds(same, segments))

    codes = None if packing is None else packed_codes(layout, packing)
    segments_BS = None if memory is None else _segments(layout, memory)
    if segments_BS is None or memory is None or counts is None:
        out_BKRH = jax.vmap(row)(q_BKRH, k_BKSH, v_BKSH, codes, segments_BS)
    else:
        P = memory.keys.shape[-2]
        seen_KS = keys_of_heads(counts, P, layout.keys, layout.gap, layout.slots)
        segments_BKS = jnp.maximum(segments_BS[:, None], 1 - seen_KS.astype(jnp.int32)[None])
        q, k, v = (x[:, :, None] for x in (q_BKRH, k_BKSH, v_BKSH))
        of_heads = jax.vmap(row, in_axes=(0, 0, 0, None, 0))
        out_BKRH = jax.vmap(of_heads)(q, k, v, codes, segments_BKS)[:, :, 0]
    out_BKTGH = out_BKRH.reshape(B, K, layout.padded_tokens, G, H)[:, :, :T]
    return jnp.moveaxis(out_BKTGH, 1, 2).astype(v_BTKH.dtype)


def _lay_out(
    layout: Layout, x_BTKH: Array, prefix_SKH: Array | None, memory_BCMKPH: Array | None
) -> Array:
    """Returns keys or values in the kernel's layout, `(B, K, layout.keys, H)`, with zeros in the
    gap and at the end."""
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
    """Returns segment ids `(B, keys)`: 1 for the gap and empty memory slots, 0 for other keys."""
    real = real_slots(memory)
    real_BS = real.reshape(real.shape[0], -1).astype(jnp.int32)
    after = layout.keys - layout.gap - layout.slots
    real_BS = jnp.pad(real_BS, ((0, 0), (0, after)), constant_values=1)
    return 1 - jnp.pad(real_BS, ((0, 0), (layout.gap, 0)))


def make_kernel(layout: Layout, kv_heads: int, interpret: bool = False) -> Any:
    """Makes the kernel of one row, a function of queries `(K, rows, H)`, keys and values
    `(K, keys, H)` and optionally segment ids.

    Call it while tracing: its block tables become constants of the program. The kernel library
    caches the work on the mask by layout.
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
        mask_lib.MultiHeadMask([row_mask(layout)] * kv_heads),
        block_sizes=sizes,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
