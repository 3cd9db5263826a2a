"""Transformer layer: its block (projections, norms, MLP) and its application to all streams.

The streams of a forward pass are the references, the context and the prefix. Their tokens are
concatenated to one long row `(1, N, D)`, so that each matrix product covers all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from m3jax.model.attention import attend, attention_weights
from m3jax.model.attention_mask import ExplicitMemory, KeyValues, Packing, Scope, ShortSight
from m3jax.model.collectives import Parallel
from m3jax.model.rope import Rope, rotate, space_out
from m3jax.model.windowed_attention import attend_in_windows


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, D], epsilon: float
) -> Float[Array, "*batch D"]:
    """Computes RMSNorm in float32; the result has the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def _product(x: Array, matrix: Array) -> Array:
    """Computes `x @ matrix` with the leading axes of `x` flattened, which makes the gradient twice
    as fast on CPUs."""
    flat = x.reshape(-1, x.shape[-1]) @ matrix.astype(x.dtype)
    return flat.reshape(*x.shape[:-1], matrix.shape[-1])


class Block(nnx.Module):
    """Pre-norm block: grouped-query attention and a SiLU-gated MLP.

    Biases on query, key and value, and norms of queries and keys, are optional.
    """

    def __init__(self, model: ConfigDict, rngs: nnx.Rngs, parallel: Parallel | None = None):
        """Draws the initial parameters; `model` is the section `model` of a config."""
        D, F, K, H = model.hidden, model.mlp_width, model.kv_heads, model.head_dim
        G = model.query_heads // K
        dtype = jnp.dtype(model.param_dtype)
        residual = (2 * model.layers) ** -0.5  # keeps the sum of 2L residual branches at unit scale

        def matrix(
            shape: tuple[int, ...], fan_in: int, axes: tuple[str, ...], factor: float = 1.0
        ) -> nnx.Param:
            deviation = factor * fan_in**model.init_exponent
            values = jax.random.normal(rngs.params(), shape, jnp.float32) * deviation
            return nnx.Param(values.astype(dtype), out_sharding=axes)

        def constant(value: int, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            return nnx.Param(jnp.full(shape, value, dtype), out_sharding=axes)

        self.attention_norm = constant(1, (D,), ("norm",))
        self.query = matrix((D, K, G, H), D, ("embed", "kv_heads", "group", "head_dim"))
        self.key = matrix((D, K, H), D, ("embed", "kv_heads", "head_dim"))
        self.value = matrix((D, K, H), D, ("embed", "kv_heads", "head_dim"))
        self.output = matrix(
            (K, G, H, D), K * G * H, ("kv_heads", "group", "head_dim", "embed"), residual
        )
        if model.attention_bias:
            self.query_bias = constant(0, (K, G, H), ("kv_heads", "group", "head_dim"))
            self.key_bias = constant(0, (K, H), ("kv_heads", "head_dim"))
            self.value_bias = constant(0, (K, H), ("kv_heads", "head_dim"))
        if model.qk_norm:  # all heads share the scale
            self.query_norm = constant(1, (H,), ("norm",))
            self.key_norm = constant(1, (H,), ("norm",))
        self.mlp_norm = constant(1, (D,), ("norm",))
        self.gate = matrix((D, F), D, ("embed", "mlp"))
        self.up = matrix((D, F), D, ("embed", "mlp"))
        self.down = matrix((F, D), F, ("mlp", "embed"), residual)
        self.epsilon = model.norm_epsilon
        self.bias, self.normed = model.attention_bias, model.qk_norm
        self.parallel = parallel or Parallel()

    def qkv(self, hidden: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Returns queries `(B, T, K, G, H)`, keys and values `(B, T, K, H)`, all before RoPE.

        With `model.qk_norm` queries and keys are normed, so that attention, the selection of tokens
        to keep, and the bank all use normed keys.
        """
        x = self.parallel.enter(rms_norm(hidden, self.attention_norm[...], self.epsilon))
        q = jnp.einsum("BTD,DKGH->BTKGH", x, self.query[...].astype(x.dtype))
        k = jnp.einsum("BTD,DKH->BTKH", x, self.key[...].astype(x.dtype))
        v = jnp.einsum("BTD,DKH->BTKH", x, self.value[...].astype(x.dtype))
        if self.bias:
            q = q + self.query_bias[...].astype(x.dtype)[None, None]
            k = k + self.key_bias[...].astype(x.dtype)[None, None]
            v = v + self.value_bias[...].astype(x.dtype)[None, None]
        if self.normed:  # heads are split over `tensor`, but share the scales
            q = rms_norm(q, self.parallel.enter(self.query_norm[...]), self.epsilon)
            k = rms_norm(k, self.parallel.enter(self.key_norm[...]), self.epsilon)
        return q, k, v

    def rest(
        self, hidden: Float[Array, "B T D"], attended: Float[Array, "B T K G H"]
    ) -> Float[Array, "B T D"]:
        """Applies output projection and MLP, and adds each to the residual stream."""
        dtype = hidden.dtype
        projected = jnp.einsum("BTKGH,KGHD->BTD", attended, self.output[...].astype(dtype))
        hidden = hidden + self.parallel.leave(projected)
        x = self.parallel.enter(rms_norm(hidden, self.mlp_norm[...], self.epsilon))
        gate = jax.nn.silu(_product(x, self.gate[...]))
        product = _product(gate * _product(x, self.up[...]), self.down[...])
        return hidden + self.parallel.leave(product)


class Streams(NamedTuple):
    """Number of rows, and of tokens per row, of each stream; (0, 0) for an absent stream.

    The long row holds the streams in the order of the fields. References come first because they
    leave the row after the last memory layer; the prefix comes last because its few tokens would
    shift the other streams from multiples of their row length.
    """

    references: tuple[int, int] = (0, 0)  # (R, W)
    context: tuple[int, int] = (0, 0)  # (B, T)
    prefix: tuple[int, int] = (0, 0)  # (1, S): `<s>Reference:`, the same for every row

    def split(self, long: Array) -> tuple[Array | None, Array | None, Array | None]:
        """Returns the streams `(rows, tokens, …)` of a long row `(1, N, …)`."""
        parts: list[Array | None] = []
        start = 0
        for rows, tokens in self:
            part = jax.lax.slice_in_dim(long, start, start + rows * tokens, axis=1)
            parts.append(part.reshape(rows, tokens, *long.shape[2:]) if rows else None)
            start += rows * tokens
        references, context, prefix = parts
        return references, context, prefix


def join(parts: Sequence[Array | None]) -> Array:
    """Concatenates streams to a long row, the inverse of `Streams.split`; skips None."""
    rows = [part.reshape(1, -1, *part.shape[2:]) for part in parts if part is not None]
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)


class Heads(NamedTuple):
    """Queries `q`, keys `k` (after RoPE) and values `v` of one stream, and queries and keys before
    RoPE (`plain_q`, `plain_k`)."""

    q: Array
    k: Array
    v: Array
    plain_q: Array
    plain_k: Array


class EncodedReferences(NamedTuple):
    """Holds what a layer knows of R references when it selects the tokens that their memories keep.

    Attributes:
      heads: queries, keys and values, `(R, W, …)`, or `(R, 2W, …)` with a copy behind every
        reference (`with_copies`).
      behind_q: queries of the W tokens, turned by RoPE to the positions at which a context begins,
        whatever the padding.
      prefix: keys and values of the constant prefix.
      usable_RW: mask of tokens that are not padding.
      slots: number P of slots of a memory in this layer.
      counts_K: number of slots of each key-value head; None if all have P.
    """

    heads: Heads
    behind_q: Array
    prefix: KeyValues | None
    usable_RW: Array
    slots: int
    counts_K: Array | None


def with_copies(tokens_RW: Int[Array, "R W"]) -> Int[Array, "R 2*W"]:
    """Puts a second copy of every 0-padded reference behind its last token."""
    W = tokens_RW.shape[1]
    length = jnp.sum(tokens_RW != 0, axis=1, keepdims=True)
    place = jnp.arange(2 * W)[None]
    source = jnp.where(place < length, place, place - length)
    copied = jnp.take_along_axis(tokens_RW, jnp.clip(source, 0, W - 1), axis=1)
    return jnp.where(place < 2 * length, copied, 0)


@dataclasses.dataclass(frozen=True)
class Layer:
    """Applies a block to all streams, with the options that all layers of a forward pass share.

    Attributes:
      streams: rows and tokens of each stream in the long row.
      attention: keyword arguments `implementation`, `block` and `kv_block` of `attend`.
      prefix: number of tokens of the constant prefix.
      reference_length: number of RoPE positions between prefix and context.
      chunk_length: tokens Q of a chunk.
      spacing: positions by which a memory of a chunk stands before the next better one.
      rope: base and scaling of the rotary embedding; `at` sets it for a layer.
      window: number of chunks whose memories a query reads.
      observe: whether memory layers return the attention weights on memories.
      sparsify: function of `EncodedReferences` that selects the tokens that a memory keeps
        (`memory.sparsify`), used in memory layers; needed if there are references.
      usable_RW: mask of reference tokens that are not padding.
      lead: the axes (B, C, M) of the references, if the context reads their memories in this pass.
      windows: `(B, slots)`, first slot of each reference's window, as `first` of
        `attend_in_windows`; None if every reference is encoded alone.
      packing: texts of packed context rows; None if a row is one text.
      slots: number P of slots of a memory in this layer; with 0 it writes and reads none.
    """

    streams: Streams
    attention: Mapping[str, Any]
    prefix: int
    reference_length: int
    chunk_length: int
    rope: Rope
    spacing: int = 0
    window: int = 1
    observe: bool = False
    sparsify: Callable | None = None
    usable_RW: Array | None = None
    lead: Sequence[int] | None = None
    windows: Array | None = None
    packing: Packing | None = None
    slots: int = 0

    def at(self, turned: bool | Array | None) -> Layer:
        """Returns these options for a layer with or without RoPE; None is one with RoPE."""
        return self if turned is None else dataclasses.replace(self, rope=self.rope.at(turned))

    def plain(self, block: Block, hidden: Array, sight: ShortSight | None = None) -> Array:
        """Returns the long row after a plain layer, which neither writes nor reads memories."""
        layer = dataclasses.replace(self, slots=0, observe=False)
        return layer.memory(block, hidden, None, sight=sight)[0]

    def memory(
        self,
        block: Block,
        hidden: Array,
        memory: ExplicitMemory | None,
        last: bool = False,
        counts_K: Array | None = None,
        sight: ShortSight | None = None,
    ) -> tuple[Array, Any]:
        """Applies a memory layer to the long row.

        Args:
          block: the layer's block.
          hidden: the long row.
          memory: precomputed memories of this layer. None: the context reads the memories that the
            layer writes of the references, if there are references, else no memories.
          last: whether this is the last memory layer, which removes the references from the row.
          counts_K, sight: as `counts` and `sight` in `Scope`.

        Returns:
          The long row after the layer; and, with a context, its attention weights on memories (None
          unless `observe`), without a context the result of `sparsify`.
        """
        references, context, prefix = self.heads(block, hidden)
        attended, shared = self.attend_prefix(prefix)
        written = None
        if references is not None and self.slots:
            written = self.write(references, shared, counts_K)
            if context is not None:
                assert self.lead is not None
                memory = ExplicitMemory(*(x.reshape(*self.lead, *x.shape[1:]) for x in written[:3]))
        if memory is not None:
            memory = self.space_out(memory)
        if last and context is None:
            return hidden, written
        references_output = None if last else self.attend_references(references, shared)
        if last:
            hidden = hidden[:, math.prod(self.streams.references) :]
        context_output, observed = self.attend_context(context, shared, memory, counts_K, sight)
        hidden = block.rest(hidden, join((references_output, context_output, attended)))
        return hidden, observed if context is not None else written

    def space_out(self, memory: ExplicitMemory) -> ExplicitMemory:
        """Moves memories `(…, M, K, P, H)` that are read together to positions of their own."""
        return memory._replace(keys=space_out(memory.keys, self.spacing, self.rope))

    def write(self, heads: Heads, prefix: KeyValues | None, counts_K: Array | None) -> Any:
        """Returns what `sparsify` makes of the references in this layer."""
        assert self.sparsify is not None and self.usable_RW is not None
        W = self.usable_RW.shape[1]
        positions = self.prefix + self.reference_length + jnp.arange(W)
        behind_q = rotate(heads.plain_q[:, :W], positions, self.rope)
        return self.sparsify(
            EncodedReferences(heads, behind_q, prefix, self.usable_RW, self.slots, counts_K)
        )

    def heads(self, block: Block, hidden: Array) -> list[Heads | None]:
        """Returns queries and keys, with and without RoPE, and values of each stream of `Streams`.

        None stands for a stream that is absent.
        """
        # Of references, context and prefix.
        first_positions = (self.prefix, self.prefix + self.reference_length, 0)
        by_stream = zip(*(self.streams.split(x) for x in block.qkv(hidden)), strict=True)
        heads: list[Heads | None] = []
        for first, (q, k, v) in zip(first_positions, by_stream, strict=True):
            if q is None:
                heads.append(None)
                continue
            positions, rope = first + jnp.arange(q.shape[1]), self.rope
            if self.packing is not None and len(heads) == 1:  # the context
                positions = first + self.packing.positions
            heads.append(Heads(rotate(q, positions, rope), rotate(k, positions, rope), v, q, k))
        return heads

    def attend_prefix(self, heads: Heads | None) -> tuple[Array | None, KeyValues | None]:
        """Attends from the prefix to itself; returns the output, and the prefix's keys and values,
        which the other streams read."""
        if heads is None:
            return None, None
        return attend(heads.q, heads.k, heads.v), KeyValues(heads.k[0], heads.v[0])

    def attend_references(self, heads: Heads | None, prefix: KeyValues | None) -> Array | None:
        """Attends causally from each reference to the prefix and to itself, or to its window."""
        if heads is None:
            return None
        if self.windows is not None:
            assert self.usable_RW is not None
            return attend_in_windows(
                *(heads.plain_q, heads.plain_k, heads.v, self.usable_RW, self.windows, prefix),
                position=self.prefix,
                rope=self.rope,
            )
        return attend(heads.q, heads.k, heads.v, Scope(prefix), **self.attention)

    def attend_context(
        self,
        heads: Heads | None,
        prefix: KeyValues | None,
        memory: ExplicitMemory | None,
        counts_K: Array | None = None,
        sight: ShortSight | None = None,
    ) -> tuple[Array | None, Array | None]:
        """Attends from the context to prefix, memories and itself; returns the output and, if
        `observe`, the attention weights on memory slots, `(B, K, G, T, C, M, P)`."""
        if heads is None:
            return None, None
        packed, chunks = (self.packing, counts_K, sight), (self.chunk_length, self.window)
        scope = Scope(prefix, memory, *packed, *chunks)
        observed = None
        if self.observe and memory is not None:
            weights = attention_weights(heads.q, heads.k, scope)
            on_slots = weights[..., self.prefix : weights.shape[-1] - heads.k.shape[1]]
            shape = (*weights.shape[:-1], *memory.length.shape[1:], memory.keys.shape[-2])
            observed = on_slots.reshape(shape)
        return attend(heads.q, heads.k, heads.v, scope, **self.attention), observed
