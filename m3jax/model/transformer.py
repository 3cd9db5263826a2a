"""The language model: embedding, two kinds of layers (memory and plain) in scans, head.

Parameters are a nested dict of arrays. Layers are stacked per segment: `lower` (plain, before the
memory layers), `memory`, `upper` (plain, after them); a segment without layers is absent. Besides
the context, the scan over layers carries up to two more streams: the constant prefix, and
references that are encoded in the step (online memories). Their tokens lie in one long row, so that
every matrix meets all of them at once, and only attention tells them apart. On a mesh all of it is
the program of one device (`parallel.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from m3jax.config import PACKED, PREFIX_TOKENS, memory_heads
from m3jax.mesh import PARAMETERS
from m3jax.model.attention import attend, attention_weights, resolve
from m3jax.model.attention_mask import ExplicitMemory, KeyValues, Packing
from m3jax.model.block import Block, rms_norm
from m3jax.model.collectives import Parallel
from m3jax.model.rope import rotate
from m3jax.model.splash import RESIDUALS as ATTENTION
from m3jax.model.vocab_parallel import cross_entropy, lookup, token_losses
from m3jax.model.windowed_attention import attend_in_windows

nnx.use_eager_sharding(False)  # parameters carry axis names; no mesh is needed to create them

Params = dict[str, Any]

KEPT_TOKENS = "kept_tokens"  # name under which `sparsify` marks the indices that it chose


class Streams(NamedTuple):
    """Rows and tokens of each stream; (0, 0) where there is none.

    In the long row they follow one another in this order: what ends earlier, references, comes
    first, and the odd few tokens of the prefix last, so that the others start at multiples of
    their row length.
    """

    references: tuple[int, int] = (0, 0)  # (R, W)
    context: tuple[int, int] = (0, 0)  # (B, T)
    prefix: tuple[int, int] = (0, 0)  # (1, S): `<s>Reference:`, the same for every row

    def split(self, long: Array) -> tuple[Array | None, Array | None, Array | None]:
        """The streams `(rows, tokens, …)` of a long row `(1, N, …)`."""
        parts: list[Array | None] = []
        start = 0
        for rows, tokens in self:
            found = jax.lax.slice_in_dim(long, start, start + rows * tokens, axis=1)
            parts.append(found.reshape(rows, tokens, *long.shape[2:]) if rows else None)
            start += rows * tokens
        references, context, prefix = parts
        return references, context, prefix


def join(parts: Sequence[Array | None]) -> Array:
    """The long row of streams."""
    rows = [part.reshape(1, -1, *part.shape[2:]) for part in parts if part is not None]
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)


class Transformer(nnx.Module):
    """Holds the parameters with their logical axis names; `Model` computes with them."""

    def __init__(self, config: ConfigDict, rngs: nnx.Rngs):
        model = config.model
        dtype = jnp.dtype(model.param_dtype)
        D, V = model.hidden, model.vocabulary

        def table(axes: tuple[str, ...]) -> nnx.Param:
            values = jax.random.normal(rngs.params(), (V, D), jnp.float32) * D**model.init_exponent
            return nnx.Param(values.astype(dtype), out_sharding=axes)

        self.embedding = table(("vocabulary", "features"))
        for segment, (low, high) in segment_ranges(config).items():
            if high > low:
                stack = nnx.vmap(
                    lambda r: Block(config, r), transform_metadata={nnx.PARTITION_NAME: "layer"}
                )
                setattr(self, segment, stack(rngs.split(high - low)))
        self.final_norm = nnx.Param(jnp.ones((D,), dtype), out_sharding=("norm",))
        if not model.tied_embeddings:
            self.head = table(("vocabulary", "features"))


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def segment_ranges(config: ConfigDict) -> dict[str, tuple[int, int]]:
    """First and last-plus-one layer of each segment, which may be empty."""
    first = config.memory.first_layer
    last = first + config.memory.layers
    return {"lower": (0, first), "memory": (first, last), "upper": (last, config.model.layers)}


class Model:
    """Pure functions of (parameters, batch) for one config.

    Args:
      config: a validated config.
      prefix_tokens: tokens of the constant prefix, or () for none; see `config.prefix_tokens`.
      mesh: of several devices, each of which runs the functions on its own part, under
        `mesh.on_devices` with parameters split by `specs()` and rows by the activation rules.
    """

    def __init__(
        self,
        config: ConfigDict,
        prefix_tokens: tuple[int, ...] = PREFIX_TOKENS,
        mesh: Mesh | None = None,
    ):
        self.config, self.mesh = config, mesh
        self.prefix_tokens = tuple(prefix_tokens)
        self.segments = {s: high - low for s, (low, high) in segment_ranges(config).items()}
        self.dtype = jnp.dtype(config.model.compute_dtype)
        model = config.model
        several = mesh is not None and mesh.size > 1
        self.parallel = Parallel(
            mesh if several else None, str(self.dtype), config.train.reduce_dtype
        )
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        self.attention = {
            "implementation": resolve(
                *(model.attention, platform, self.dtype, model.head_dim),
                packed=config.data.sequence_length if config.data.packing in PACKED else 0,
            ),
            "block": model.attention_block,
            "kv_block": model.attention_kv_block,
        }
        self.memory_heads = _heads_with_memories(config)
        block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(0), self.parallel))
        self._block, _ = nnx.split(block)
        # A layer's axes: those of its stack without the first, which is the layer.
        self._axes = jax.tree.map(
            lambda axes: axes[1:], self.abstract()[1]["memory"], is_leaf=_is_axes
        )

    def abstract(self) -> tuple[Params, Params]:
        """Shapes and dtypes of the parameters, and their logical axis names."""
        module = nnx.eval_shape(lambda: Transformer(self.config, nnx.Rngs(0)))
        state = nnx.state(module, nnx.Param)
        shapes = nnx.to_pure_dict(state)
        axes = nnx.to_pure_dict(nnx.get_partition_spec(state))
        return shapes, jax.tree.map(
            lambda spec, leaf: tuple(spec) + (None,) * (leaf.ndim - len(tuple(spec))),
            axes,
            shapes,
            is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec),
        )

    def specs(self) -> Params:
        """Partition of every parameter."""
        return jax.tree.map(PARAMETERS.spec, self.abstract()[1], is_leaf=_is_axes)

    def init(self, key: Array) -> Params:
        """Random parameters (pure: may be jitted with output shardings)."""
        module = Transformer(self.config, nnx.Rngs(params=key))
        params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        if self.config.model.previous_token_head:
            params = _with_previous_token_head(self.config, params)
        return params

    def logits(
        self,
        params: Params,
        tokens_BT: Int[Array, "B T"],
        memory: ExplicitMemory | None = None,
        reference_tokens: Int[Array, "B C M W"] | None = None,
        sparsify: Callable | None = None,
        *,
        window: int | None = None,
        packing: Packing | None = None,
    ) -> Float[Array, "B T V"]:
        """Next-token logits in float32.

        Args:
          params: parameters.
          tokens_BT: context tokens.
          memory: precomputed memories, `(B, C, M, L, K, P, H)`, length `(B, C, M)`.
          reference_tokens: instead of `memory`: references to encode here, with gradient unless
            `memory.source` is `stop_gradient`, 0-padded; a row of zeros is no reference.
          sparsify: `memory.sparsify.sparsifier(config)`; needed with `reference_tokens`.
          window: chunks whose memories a query reads; default from the config.
          packing: several texts in a row, which do not see each other; C is then the number of
            their chunks. None: one text.
        """
        hidden = self.hidden(params, tokens_BT, memory, reference_tokens, sparsify, window, packing)
        return self.head(params, hidden)

    def hidden(
        self,
        params: Params,
        tokens_BT: Int[Array, "B T"],
        memory: ExplicitMemory | None = None,
        reference_tokens: Int[Array, "B C M W"] | None = None,
        sparsify: Callable | None = None,
        window: int | None = None,
        packing: Packing | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the last layer, before the final norm; arguments as in `logits`."""
        return self._run(
            params, tokens_BT, memory, reference_tokens, sparsify, window, packing=packing
        )[0]

    def memory_attention(
        self, params: Params, tokens_BT: Int[Array, "B T"], memory: ExplicitMemory, window: int
    ) -> Float[Array, "L B K G T slots"]:
        """Attention weight of every query on every memory slot (C·M·P), per memory layer."""
        return self._run(params, tokens_BT, memory, None, None, window, observe=True)[1]

    def head(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Final norm and LM head; logits in float32."""
        x, table = self._head(params, hidden)
        return jnp.einsum(
            "BTD,VD->BTV", x, table.astype(x.dtype), preferred_element_type=jnp.float32
        )

    def summed_loss(
        self,
        params: Params,
        hidden: Float[Array, "B T D"],
        targets_BT: Int[Array, "B T"],
        weights_BT: Float[Array, "B T"],
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """Weighted sums over this device's tokens: what is minimised (cross-entropy, and z-loss
        where the config has one), cross-entropy, and right predictions. Only the first has a
        gradient."""
        x, table = self._head(params, hidden)
        train = self.config.train
        return cross_entropy(
            self.parallel, x, table, targets_BT, weights_BT, train.loss_block, float(train.z_loss)
        )

    def token_losses(
        self, params: Params, hidden: Float[Array, "B T D"], targets_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T"]:
        """Cross-entropy of every token in nats, without a gradient."""
        x, table = self._head(params, hidden)
        return token_losses(self.parallel, x, table, targets_BT, self.config.train.loss_block)

    def _head(self, params: Params, hidden: Array) -> tuple[Array, Array]:
        """Normed hidden states and the table of the LM head."""
        scale = self.parallel.gather(params["final_norm"], ("norm",))
        x = rms_norm(hidden, scale, self.config.model.norm_epsilon)
        return x, params["embedding"] if self.config.model.tied_embeddings else params["head"]

    def encode(
        self,
        params: Params,
        reference_tokens: Int[Array, "R W"],
        sparsify: Callable,
        windows: Int[Array, "B slots"] | None = None,
    ) -> tuple[ExplicitMemory, Int[Array, "R L K P"]]:
        """Writes memories: each reference through the layers up to the last memory layer.

        Keys are stored at the positions they have in a reference that is encoded alone.

        Args:
          params: the writer's parameters; layers above the memory layers are not read.
          reference_tokens: 0-padded references without prefix.
          sparsify: `memory.sparsify.sparsifier(config)`.
          windows: what a reference sees besides itself: references lie in B rows of slots, and this
            is the slot of the row from which on each attends (`attend_in_windows`). None: nothing.

        Returns:
          The memories, keys and values `(R, L, K, P, H)` in the compute dtype and length `(R,)`;
          and the position inside the reference of every kept token.
        """
        streams, hidden = self.embed(params, None, reference_tokens)
        usable_RW = reference_tokens != 0
        layer = Layer(self, streams, sparsify=sparsify, usable_RW=usable_RW, windows=windows)
        hidden = self._scan_plain(params, "lower", layer, hidden)
        _, written = self._scan_memory(params, layer, hidden, None)
        keys, values, indices = (
            jnp.moveaxis(x, 0, 1) for x in (written.keys, written.values, written.indices)
        )
        return ExplicitMemory(keys, values, written.length[0]), indices

    def _run(
        self,
        params: Params,
        tokens_BT: Array,
        memory: ExplicitMemory | None,
        reference_tokens: Array | None,
        sparsify: Callable | None,
        window: int | None,
        observe: bool = False,
        packing: Packing | None = None,
    ) -> tuple[Array, Any]:
        window = self.config.memory.window if window is None else window
        lead, usable_RW = None, None
        if reference_tokens is not None and self.config.memory.source == "stop_gradient":
            memory = self._encoded_without_gradient(params, reference_tokens, sparsify)
            reference_tokens = None
        if reference_tokens is not None:
            *lead, W = reference_tokens.shape
            reference_tokens = reference_tokens.reshape(-1, W)
            usable_RW = reference_tokens != 0
        streams, hidden = self.embed(params, tokens_BT, reference_tokens)
        layer = Layer(self, streams, window, observe, sparsify, usable_RW, lead, packing=packing)
        hidden = self._scan_plain(params, "lower", layer, hidden)
        hidden, observed = self._scan_memory(params, layer, hidden, memory)
        layer = dataclasses.replace(layer, streams=streams._replace(references=(0, 0)))
        hidden = self._scan_plain(params, "upper", layer, hidden)
        context = layer.streams.split(hidden)[1]
        assert context is not None
        return context, observed

    def _encoded_without_gradient(
        self, params: Params, reference_tokens: Array, sparsify: Callable | None
    ) -> ExplicitMemory:
        """Memories `(B, C, M, …)` of references `(B, C, M, W)`, constants to a gradient."""
        assert sparsify is not None
        *lead, W = reference_tokens.shape
        fixed = jax.lax.stop_gradient(params)
        memory, _ = self.encode(fixed, reference_tokens.reshape(-1, W), sparsify)
        return ExplicitMemory(*(x.reshape(*lead, *x.shape[1:]) for x in memory))

    def embed(
        self, params: Params, tokens_BT: Array | None, reference_tokens: Array | None
    ) -> tuple[Streams, Array]:
        """The streams and their long row before the first layer, by one look-up."""
        prefix = jnp.asarray([self.prefix_tokens], jnp.int32) if self.prefix_tokens else None
        parts = (reference_tokens, tokens_BT, prefix)
        streams = Streams(*((0, 0) if x is None else (x.shape[0], x.shape[1]) for x in parts))
        tokens = jnp.concatenate([part.ravel() for part in parts if part is not None])
        return streams, self.look_up(params, tokens)[None]

    def look_up(self, params: Params, tokens: Int[Array, " n"]) -> Float[Array, "n D"]:
        """Tokens before the first layer."""
        x = lookup(self.parallel, params["embedding"], tokens)
        return x * jnp.asarray(self.config.model.embedding_scale, self.dtype)

    def merge(self, stacked: Params) -> Block:
        """The block of one layer, its weights gathered."""
        return nnx.merge(self._block, self.parallel.gather(stacked, self._axes))

    def _scan_plain(self, params: Params, segment: str, layer: Layer, hidden: Array) -> Array:
        if not self.segments[segment]:
            return hidden

        def body(hidden: Array, stacked: Params) -> tuple[Array, None]:
            return layer.plain(self.merge(stacked), hidden), None

        return jax.lax.scan(self._remat(body), hidden, params[segment])[0]

    def _scan_memory(
        self, params: Params, layer: Layer, hidden: Array, memory: ExplicitMemory | None
    ) -> tuple[Array, Any]:
        """All memory layers; returns the long row and what each wrote or observed, stacked.

        With references the last layer is peeled: it needs neither their attention output nor MLP,
        and leaves the row without them.
        """
        stacked, L = params["memory"], self.segments["memory"]
        sliced, length = None, None
        if memory is not None:  # (B, C, M, L, …) → (L, B, C, M, …)
            sliced = (jnp.moveaxis(memory.keys, 3, 0), jnp.moveaxis(memory.values, 3, 0))
            length = memory.length

        def body(hidden: Array, inputs: Any, last: bool = False) -> tuple[Array, Any]:
            block = self.merge(inputs[0])
            memory = None
            if length is not None:
                memory = ExplicitMemory(inputs[1][0], inputs[1][1], length)
            return layer.memory(block, hidden, memory, last, inputs[2])

        heads_LK = None if self.memory_heads is None else jnp.asarray(self.memory_heads)
        each = (stacked, sliced, heads_LK)
        if layer.usable_RW is None:  # no references
            return jax.lax.scan(self._remat(body), hidden, each)
        outputs = []
        if L > 1:
            hidden, output = jax.lax.scan(
                self._remat(body), hidden, jax.tree.map(lambda x: x[:-1], each)
            )
            outputs.append(output)
        final = functools.partial(body, last=True)
        hidden, output = self._remat(final)(hidden, jax.tree.map(lambda x: x[-1], each))
        outputs.append(jax.tree.map(lambda x: x[None], output))
        return hidden, jax.tree.map(lambda *x: jnp.concatenate(x), *outputs)

    def _remat(self, body: Callable) -> Callable:
        """`body` with what the config says kept for the backward pass, and the rest recomputed.

        Which tokens a reference keeps is always saved: a few integers that spare all their scores.
        """
        policies = jax.checkpoint_policies
        chosen = policies.save_only_these_names(KEPT_TOKENS)
        policy = {
            "full": chosen,
            "attention": policies.save_only_these_names(KEPT_TOKENS, ATTENTION),
            "dots": policies.save_from_both_policies(
                chosen, policies.dots_with_no_batch_dims_saveable
            ),
        }
        if self.config.model.remat == "none":
            return body
        return jax.checkpoint(body, prevent_cse=False, policy=policy[self.config.model.remat])


class _Heads(NamedTuple):
    """Queries and keys after RoPE, values, and queries and keys before it, of one stream."""

    q: Array
    k: Array
    v: Array
    plain_q: Array
    plain_k: Array


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer on all streams; holds what is the same in every layer of a pass."""

    model: Model
    streams: Streams
    window: int = 1
    observe: bool = False  # return the attention on memories
    sparsify: Callable | None = None
    usable_RW: Array | None = None
    lead: Sequence[int] | None = None  # (B, C, M): the context reads the references
    windows: Array | None = None  # (B, slots): references attend to others, too
    packing: Packing | None = None  # the context is several texts a row

    def plain(self, block: Block, hidden: Array) -> Array:
        references, context, prefix = self.heads(block, hidden)
        attended, shared = self.of_prefix(prefix)
        parts = (
            self.of_references(references, shared),
            self.of_context(context, shared, None)[0],
            attended,
        )
        return block.rest(hidden, join(parts))

    def memory(
        self,
        block: Block,
        hidden: Array,
        memory: ExplicitMemory | None,
        last: bool,
        heads_K: Array | None,
    ) -> tuple[Array, Any]:
        references, context, prefix = self.heads(block, hidden)
        attended, shared = self.of_prefix(prefix)
        written, read_by_references = None, None
        if references is not None:
            assert self.sparsify is not None
            _, k, v, plain_q, plain_k = references
            written = self.sparsify(plain_q, plain_k, k, v, self.usable_RW)
            if last and context is None:
                return hidden, written
            if last:
                hidden = hidden[:, math.prod(self.streams.references) :]
            else:
                read_by_references = self.of_references(references, shared)
            if context is not None:
                assert self.lead is not None
                memory = ExplicitMemory(*(x.reshape(*self.lead, *x.shape[1:]) for x in written[:3]))
        read_by_context, observed = self.of_context(context, shared, memory, heads_K)
        hidden = block.rest(hidden, join((read_by_references, read_by_context, attended)))
        return hidden, observed if context is not None else written

    def heads(self, block: Block, hidden: Array) -> list[_Heads | None]:
        """What each stream attends with, in the order of `Streams`."""
        config, prefix = self.model.config, len(self.model.prefix_tokens)
        first_context = prefix + config.memory.reference_length
        by_stream = zip(*(self.streams.split(x) for x in block.qkv(hidden)), strict=True)
        found: list[_Heads | None] = []
        for first, (q, k, v) in zip((prefix, first_context, 0), by_stream, strict=True):
            if q is None:
                found.append(None)
                continue
            positions, base = first + jnp.arange(q.shape[1]), config.model.rope_base
            if self.packing is not None and len(found) == 1:  # the context
                positions = first + self.packing.positions
            found.append(_Heads(rotate(q, positions, base), rotate(k, positions, base), v, q, k))
        return found

    def of_prefix(self, heads: _Heads | None) -> tuple[Array | None, KeyValues | None]:
        """The prefix attends to itself alone; its keys and values serve all other streams."""
        if heads is None:
            return None, None
        return attend(heads.q, heads.k, heads.v), KeyValues(heads.k[0], heads.v[0])

    def of_references(self, heads: _Heads | None, prefix: KeyValues | None) -> Array | None:
        """References attend causally to the prefix and themselves, or to their window."""
        if heads is None:
            return None
        if self.windows is not None:
            assert self.usable_RW is not None
            return attend_in_windows(
                *(heads.plain_q, heads.plain_k, heads.v, self.usable_RW, self.windows, prefix),
                position=len(self.model.prefix_tokens),
                rope_base=self.model.config.model.rope_base,
            )
        return attend(heads.q, heads.k, heads.v, prefix, **self.model.attention)

    def of_context(
        self,
        heads: _Heads | None,
        prefix: KeyValues | None,
        memory: ExplicitMemory | None,
        reading_K: Array | None = None,
    ) -> tuple[Array | None, Array | None]:
        """The context also reads memories, with some of its heads or (None) with all; their
        attention weights too, where observed."""
        if heads is None:
            return None, None
        observed = None
        chunks = {"chunk_length": self.model.config.memory.chunk_length, "window": self.window}
        if self.observe:
            weights = attention_weights(
                *(heads.q, heads.k, prefix, memory),
                **chunks,
                packing=self.packing,
                heads=reading_K,
            )
            observed = weights[
                ..., len(self.model.prefix_tokens) : weights.shape[-1] - heads.k.shape[1]
            ]
        attended = attend(
            heads.q,
            heads.k,
            heads.v,
            prefix,
            memory,
            self.packing,
            **chunks,
            **self.model.attention,
            heads=reading_K,
        )
        return attended, observed


def _heads_with_memories(config: ConfigDict) -> Bool[np.ndarray, "L K"] | None:
    """Which key-value heads of the memory layers read memories; None: all."""
    chosen = memory_heads(config)
    if chosen is None:
        return None
    heads_LK = np.zeros((config.memory.layers, config.model.kv_heads), bool)
    for layer, head in chosen:
        heads_LK[layer - config.memory.first_layer, head] = True
    return heads_LK


def _with_previous_token_head(config: ConfigDict, params: Params) -> Params:
    """Query and key biases that start key-value head 0 of layer 0 as a previous-token head.

    Keys carry a constant vector; queries the same vector turned back by one position, so that the
    score is largest at distance one. Only the fastest third of the frequencies take part.
    """
    model = config.model
    half = model.head_dim // 2
    frequency = model.rope_base ** (-jnp.arange(half) / half)
    size = model.previous_token_head * (jnp.arange(half) < max(2, half // 3))
    key = jnp.concatenate([size, jnp.zeros(half)])
    query = jnp.concatenate([size * jnp.cos(frequency), -size * jnp.sin(frequency)])
    segment = "lower" if config.memory.first_layer else "memory"
    layer = dict(params[segment])
    for name, values in (("key_bias", key), ("query_bias", query)):
        layer[name] = layer[name].at[0, 0].set(values.astype(layer[name].dtype))
    return {**params, segment: layer}
