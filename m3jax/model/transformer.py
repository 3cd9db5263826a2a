"""The language model: embedding, scans over plain layers and memory layers, LM head.

Besides the context, the scans over layers carry up to two more streams: the constant prefix, and
references that are encoded in the same step (online memories). Their tokens are concatenated to one
long row, so that each matrix product covers all streams; only attention separates them. On a mesh
the functions compute on one device's parts (`collectives.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from m3jax.mesh import PARAMETERS
from m3jax.model.attention import resolve
from m3jax.model.attention_mask import ExplicitMemory, Packing, ShortSight
from m3jax.model.collectives import Parallel
from m3jax.model.layer import Block, Layer, Streams, rms_norm, with_copies
from m3jax.model.parameters import Params, abstract_params, init_params, segment_ranges
from m3jax.model.rope import Rope, turned_layers
from m3jax.model.slots import SlotLayout
from m3jax.model.splash import RESIDUALS as ATTENTION
from m3jax.model.vocab_parallel import cross_entropy, lookup, token_losses

KEPT_TOKENS = "kept_tokens"  # `checkpoint_name` of the token indices that `sparsify` selects


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


class Model:
    """Language model with explicit memories, as pure functions of parameters and a batch.

    Args:
      config: section `model` of a validated config.
      memory: section `memory` of the same config.
      prefix_tokens: tokens of the constant prefix, or () for none.
      mesh: with more than one device, the functions compute on one device's parts and must run
        under `mesh.on_devices`, with parameters split by `specs()` and rows by `ACTIVATIONS`.
      loss_block: number of tokens per row whose logits are computed at a time.
      z_loss: factor of log²(softmax normalizer) in the loss.
      reduce_dtype: name of the dtype in which gradients are summed over devices.
      packed: length in tokens of rows that hold several texts; 0 if a row is one text.
    """

    def __init__(
        self,
        config: ConfigDict,
        memory: ConfigDict,
        prefix_tokens: tuple[int, ...] = (),
        mesh: Mesh | None = None,
        *,
        loss_block: int = 512,
        z_loss: float = 0.0,
        reduce_dtype: str = "float32",
        packed: int = 0,
    ):
        self.config, self.memory, self.mesh = config, memory, mesh
        self.prefix_tokens = tuple(prefix_tokens)
        self.loss_block, self.z_loss = loss_block, z_loss
        self.ranges = segment_ranges(config, memory)
        self.segments = {name: high - low for name, (low, high) in self.ranges.items()}
        self.dtype = jnp.dtype(config.compute_dtype)
        several = mesh is not None and mesh.size > 1
        self.parallel = Parallel(mesh if several else None, str(self.dtype), reduce_dtype)
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        self.attention = {
            "implementation": resolve(
                config.attention, platform, self.dtype, config.head_dim, packed
            ),
            "block": config.attention_block,
            "kv_block": config.attention_kv_block,
        }
        self.slots = SlotLayout.of(config, memory)
        block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(0), self.parallel))
        self._block, _ = nnx.split(block)
        # A layer has the axes of its stack without the first axis, which is that of layers.
        self._abstract = abstract_params(config, memory)  # kept, since tracing takes 0.1 s
        self._axes = jax.tree.map(
            lambda axes: axes[1:], self._abstract[1]["memory"], is_leaf=_is_axes
        )

    def abstract(self) -> tuple[Params, Params]:
        """Returns shapes and dtypes of the parameters, and their logical axis names."""
        return jax.tree.map(lambda leaf: leaf, self._abstract)

    def specs(self) -> Params:
        """Returns the partition spec of every parameter."""
        return jax.tree.map(PARAMETERS.spec, self._abstract[1], is_leaf=_is_axes)

    def init(self, key: Array) -> Params:
        """Draws random parameters (pure: may be jitted with output shardings)."""
        return init_params(self.config, self.memory, key)

    def layer(self, streams: Streams, **options: Any) -> Layer:
        """Returns the `Layer` for these streams; `options` are further attributes of `Layer`."""
        return Layer(
            streams,
            self.attention,
            prefix=len(self.prefix_tokens),
            reference_length=self.memory.reference_length,
            chunk_length=self.memory.chunk_length,
            rope=Rope.of(self.config),
            spacing=self.memory.spacing,
            **options,
        )

    def logits(
        self,
        params: Params,
        tokens_BT: Int[Array, "B T"],
        memory: ExplicitMemory | None = None,
        **options: Any,
    ) -> Float[Array, "B T V"]:
        """Returns next-token logits in float32; arguments as in `hidden`."""
        return self.head(params, self.hidden(params, tokens_BT, memory, **options))

    def hidden(
        self,
        params: Params,
        tokens_BT: Int[Array, "B T"],
        memory: ExplicitMemory | None = None,
        reference_tokens: Int[Array, "B C M W"] | None = None,
        sparsify: Callable | None = None,
        window: int | None = None,
        packing: Packing | None = None,
        *,
        memory_heads: Bool[Array, "L K"] | None = None,
        sight: ShortSight | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the hidden states of the context before the final norm.

        Args:
          params: parameters.
          tokens_BT: context tokens.
          memory: precomputed memories, `(L, B, C, M, K, P, H)` with lengths `(B, C, M)`, or
            `(1, B, C, M, 1, S, H)` unless all heads have the same number of slots (`SlotLayout`).
          reference_tokens: alternative to `memory`: 0-padded references to encode in this pass,
            with gradient unless `memory.source` is `stop_gradient`. A row of zeros stands for no
            reference.
          sparsify: `memory.sparsify.sparsifier(memory)`; needed with `reference_tokens`.
          window: number of chunks whose memories a query reads; default from the config.
          packing: texts of packed rows; C is then the number of chunks of all texts of a row. None
            if a row is one text.
          memory_heads: true for key-value heads of the memory layers that read memories; default
            all that have slots.
          sight: query heads, `(L, K, G)` over all layers, that see only a part of the context.
        """
        inputs = (tokens_BT, memory, reference_tokens, sparsify, window, packing)
        return self._run(params, *inputs, memory_heads, sight)[0]

    def memory_attention(
        self, params: Params, tokens_BT: Int[Array, "B T"], memory: ExplicitMemory, window: int
    ) -> Float[Array, "L B K G T C M P"]:
        """Returns the attention weight of every query on each memory slot.

        P is the largest count of slots; heads have weight 0 on slots that they do not have.
        """
        return self._run(params, tokens_BT, memory, window=window, observe=True)[1]

    def head(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Applies the final norm and the LM head; returns logits in float32."""
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
        """Returns weighted sums over this device's tokens: the loss (cross-entropy plus z-loss),
        the cross-entropy, and correct predictions. Only the first has a gradient."""
        x, table = self._head(params, hidden)
        return cross_entropy(
            self.parallel, x, table, targets_BT, weights_BT, self.loss_block, self.z_loss
        )

    def token_losses(
        self, params: Params, hidden: Float[Array, "B T D"], targets_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T"]:
        """Returns the cross-entropy of every token in nats, without a gradient."""
        x, table = self._head(params, hidden)
        return token_losses(self.parallel, x, table, targets_BT, self.loss_block)

    def _head(self, params: Params, hidden: Array) -> tuple[Array, Array]:
        """Returns hidden states after the final norm, and the weights `(V, D)` of the LM head."""
        scale = self.parallel.gather(params["final_norm"], ("norm",))
        x = rms_norm(hidden, scale, self.config.norm_epsilon)
        return x, params["embedding"] if self.config.tied_embeddings else params["head"]

    def encode(
        self,
        params: Params,
        reference_tokens: Int[Array, "R W"],
        sparsify: Callable,
        windows: Int[Array, "B slots"] | None = None,
    ) -> ExplicitMemory:
        """Encodes references as memories, by running the layers up to the last memory layer.

        Keys always get the RoPE positions of a reference that is encoded alone, after the prefix.

        Args:
          params: parameters of the writer; layers above the memory layers are not read.
          reference_tokens: 0-padded references without prefix.
          sparsify: `memory.sparsify.sparsifier(memory)`.
          windows: document context: the references are B rows of slots, R = B · slots, and each
            attends from the slot `windows` of its row on (`first` of `attend_in_windows`). None:
            every reference is encoded alone.

        Returns:
          The memories, with keys and values `(L, R, K, P, H)` in the compute dtype, or `(1, R, 1,
          S, H)` unless all heads have the same number of slots, and length `(R,)`.
        """
        written = self.on_references(params, reference_tokens, sparsify, windows)
        keys, values = (
            self.slots.flatten([part[i] for part in written if part is not None]) for i in range(2)
        )
        usable_R = jnp.sum(reference_tokens != 0, axis=1, dtype=jnp.int32)
        return ExplicitMemory(keys, values, jnp.minimum(usable_R, self.slots.largest))

    def on_references(
        self,
        params: Params,
        reference_tokens: Int[Array, "R W"],
        function: Callable,
        windows: Int[Array, "B slots"] | None = None,
    ) -> list[Any]:
        """Returns what `function` of `EncodedReferences` makes of references, for each group of
        layers.

        Results are stacked over the layers of a group of `slots.groups`; None for groups without
        slots. Other arguments as in `encode`.
        """
        streams, hidden = self.embed(params, None, self._with_copies(reference_tokens))
        usable_RW = reference_tokens != 0
        layer = self.layer(streams, sparsify=function, usable_RW=usable_RW, windows=windows)
        hidden = self._scan_plain(params, "lower", layer, hidden)
        return self._scan_memory(params, layer, hidden, None)[1]

    def _with_copies(self, tokens_RW: Array) -> Array:
        """Puts a copy behind each reference, if that is what the selection of tokens looks at."""
        return with_copies(tokens_RW) if self.memory.selection == "reconstruction" else tokens_RW

    def _run(
        self,
        params: Params,
        tokens_BT: Array,
        memory: ExplicitMemory | None,
        reference_tokens: Array | None = None,
        sparsify: Callable | None = None,
        window: int | None = None,
        packing: Packing | None = None,
        memory_heads: Array | None = None,
        sight: ShortSight | None = None,
        observe: bool = False,
    ) -> tuple[Array, Any]:
        """Returns hidden states and, if `observe`, the attention weights on memories, else None."""
        lead = usable_RW = None
        if reference_tokens is not None:
            assert sparsify is not None
            *lead, W = reference_tokens.shape
            reference_tokens = reference_tokens.reshape(-1, W)
            if self.memory.source == "stop_gradient":
                written = self.encode(jax.lax.stop_gradient(params), reference_tokens, sparsify)
                keys, values = (x.reshape(len(x), *lead, *x.shape[2:]) for x in written[:2])
                memory = ExplicitMemory(keys, values, written.length.reshape(lead))
                reference_tokens = None
            else:
                usable_RW = reference_tokens != 0
                reference_tokens = self._with_copies(reference_tokens)
        streams, hidden = self.embed(params, tokens_BT, reference_tokens)
        references = {"sparsify": sparsify, "usable_RW": usable_RW, "lead": lead}
        window = self.memory.window if window is None else window
        layer = self.layer(streams, window=window, observe=observe, packing=packing, **references)
        hidden = self._scan_plain(params, "lower", layer, hidden, sight)
        hidden, observed = self._scan_memory(params, layer, hidden, memory, memory_heads, sight)
        layer = dataclasses.replace(layer, streams=streams._replace(references=(0, 0)))
        hidden = self._scan_plain(params, "upper", layer, hidden, sight)
        context = layer.streams.split(hidden)[1]
        assert context is not None
        if not observe:
            return context, None
        return context, self.slots.stack(observed)

    def embed(
        self, params: Params, tokens_BT: Array | None, reference_tokens: Array | None
    ) -> tuple[Streams, Array]:
        """Embeds all streams by one look-up; returns the streams and their long row."""
        prefix = jnp.asarray([self.prefix_tokens], jnp.int32) if self.prefix_tokens else None
        parts = (reference_tokens, tokens_BT, prefix)
        streams = Streams(*((0, 0) if x is None else (x.shape[0], x.shape[1]) for x in parts))
        tokens = jnp.concatenate([part.ravel() for part in parts if part is not None])
        return streams, self.look_up(params, tokens)[None]

    def look_up(self, params: Params, tokens: Int[Array, " n"]) -> Float[Array, "n D"]:
        """Returns scaled token embeddings in the compute dtype."""
        x = lookup(self.parallel, params["embedding"], tokens)
        return x * jnp.asarray(self.config.embedding_scale, self.dtype)

    def merge(self, stacked: Params) -> Block:
        """Returns the block of one layer from its parameters, gathered over `fsdp`."""
        return nnx.merge(self._block, self.parallel.gather(stacked, self._axes))

    def _sights(self, sight: ShortSight | None, segment: str) -> ShortSight | None:
        """Returns the short sight of a segment's layers."""
        return jax.tree.map(lambda heads: heads[slice(*self.ranges[segment])], sight)

    def _turned(self, low: int, high: int) -> Array | None:
        """Returns whether each layer of a range has RoPE; None if all of the model have it."""
        turned = turned_layers(self.config)
        return None if turned.all() else jnp.asarray(turned[low:high])

    def _scan_plain(
        self, params: Params, segment: str, layer: Layer, hidden: Array, sight: Any = None
    ) -> Array:
        if not self.segments[segment]:
            return hidden

        def body(hidden: Array, inputs: Any) -> tuple[Array, None]:
            stacked, sight, turned = inputs
            return layer.at(turned).plain(self.merge(stacked), hidden, sight), None

        turned = self._turned(*self.ranges[segment])
        each = (params[segment], self._sights(sight, segment), turned)
        return jax.lax.scan(self._remat(body), hidden, each)[0]

    def _scan_memory(
        self,
        params: Params,
        layer: Layer,
        hidden: Array,
        memory: ExplicitMemory | None,
        memory_heads: Array | None = None,
        sight: ShortSight | None = None,
    ) -> tuple[Array, list[Any]]:
        """Runs all memory layers, a scan for each group of layers.

        Returns the long row and, for each group, the stacked second results of `Layer.memory`.
        """
        groups = self.slots.groups
        counts: list[Any] = [self.slots.group_counts(group) for group in groups]
        counts = [n if n is None else jnp.asarray(n) for n in counts]
        if memory_heads is not None:
            counts = [
                jnp.where(memory_heads[g.low : g.high], g.slots if n is None else n, 0)
                for g, n in zip(groups, counts, strict=True)
            ]
        # The transpose of a split is a concatenation, that of a slice would be a padded sum.
        sizes, stacked = [group.layers for group in groups], [params["memory"]]
        if len(groups) > 1:
            split = jax.tree.map(lambda x: jax.lax.split(x, sizes), params["memory"])
            whole, parts = map(jax.tree.structure, (params["memory"], sizes))
            stacked = jax.tree.transpose(whole, parts, split)
        sights = self._sights(sight, "memory")
        first, results = self.ranges["memory"][0], []
        inputs = zip(groups, stacked, self.slots.by_group(memory), counts, strict=True)
        for group, of_group, part, counts_GK in inputs:
            own = jax.tree.map(lambda x, g=group: x[g.low : g.high], sights)
            at = dataclasses.replace(layer, slots=group.slots)
            turned = self._turned(first + group.low, first + group.high)
            each, last = (of_group, counts_GK, own, turned), group is groups[-1]
            hidden, result = self._scan_group(at, hidden, part, each, last)
            results.append(result)
        return hidden, results

    def _scan_group(
        self,
        layer: Layer,
        hidden: Array,
        memory: ExplicitMemory | None,
        of_layers: tuple[Params, Any, ShortSight | None, Array | None],
        last: bool,
    ) -> tuple[Array, Any]:
        """Runs a group of memory layers; returns the long row and stacked results.

        `of_layers` are parameters, counts, sights and whether there is RoPE, stacked over layers.
        With references the last layer of the `last` group runs outside of the scan: it computes
        neither attention output nor MLP of the references, and removes them from the row.
        """

        def body(hidden: Array, inputs: Any, last: bool = False) -> tuple[Array, Any]:
            key_values, (stacked, counts_K, sight, turned) = inputs
            part = memory
            if memory is not None:
                part = memory._replace(keys=key_values[0], values=key_values[1])
            at = layer.at(turned)
            return at.memory(self.merge(stacked), hidden, part, last, counts_K, sight)

        each = (None if memory is None else memory[:2], of_layers)
        if layer.usable_RW is None or not last:
            return jax.lax.scan(self._remat(body), hidden, each)
        outputs = []
        if len(jax.tree.leaves(of_layers)[0]) > 1:
            hidden, output = jax.lax.scan(
                self._remat(body), hidden, jax.tree.map(lambda x: x[:-1], each)
            )
            outputs.append(output)
        final = functools.partial(body, last=True)
        hidden, output = self._remat(final)(hidden, jax.tree.map(lambda x: x[-1], each))
        outputs.append(jax.tree.map(lambda x: x[None], output))
        return hidden, jax.tree.map(lambda *x: jnp.concatenate(x), *outputs)

    def _remat(self, body: Callable) -> Callable:
        """Wraps `body` in `jax.checkpoint` with the policy `model.remat`.

        Unless `model.remat` is `none`, the indices of kept tokens are saved: recomputing these few
        integers would need the attention scores of all references.
        """
        if self.config.remat == "none":
            return body
        policies = jax.checkpoint_policies
        chosen = policies.save_only_these_names(KEPT_TOKENS)
        policy = {
            "full": chosen,
            "attention": policies.save_only_these_names(KEPT_TOKENS, ATTENTION),
            "dots": policies.save_from_both_policies(
                chosen, policies.dots_with_no_batch_dims_saveable
            ),
        }[self.config.remat]
        return jax.checkpoint(body, prevent_cse=False, policy=policy)
