"""Generation with explicit memories on the device: prefill of prompts, then one token per step.

Layers are separate arrays and not stacked: a scan would copy every layer's weights for every token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from m3jax.mesh import ACTIVATIONS, BATCH_AXES, on_devices
from m3jax.model.attention_mask import ExplicitMemory, KeyValues
from m3jax.model.kv_cache import CacheLayout, State
from m3jax.model.layer import join
from m3jax.model.parameters import Params
from m3jax.model.rope import Rope, rotate, space_out, turned_layers
from m3jax.model.transformer import Model

# (float32 logits `(B, V)`, `State.rows`, index of the token in the answer) -> token of each row
Sampler = Callable[[Array, Array, Array], Array]
Dequantize = Callable[[ExplicitMemory], ExplicitMemory]


class Written(NamedTuple):
    """Tokens that one call generated.

    Attributes:
      tokens: `(B, n)`; `pad` after a stop token and at steps that were not run.
      logprobs: natural log-probability of each token under the model, before temperature and
        truncation (top-k, top-p); float32 `(B, n)`.
      reading: attention weight on each of the M memories (last column: on all other keys), summed
        over the queries that generated the tokens; `(B, L, K, G, M + 1)` with L memory layers.
        None unless the decoder observes attention.
      by_token: the same weight for each token, averaged over layers and heads; `(B, n, M + 1)`.
    """

    tokens: Int[Array, "B n"]
    logprobs: Float[Array, "B n"]
    reading: Array | None = None
    by_token: Array | None = None


class Decoder:
    """Jitted programs that generate with one model.

    `prefill(…, slots=n)` and `generate(…)` take global arrays, with the arguments of `_prefill` and
    `_generate`.

    Args:
      model: its mesh may split rows over `data` and weights over `tensor`; weights are not split
        otherwise (`fsdp` is 1).
      sample: function that chooses tokens from logits.
      stop: tokens that end a row.
      pad: token written after a stop token.
      usable: number of tokens that the tokenizer knows, if the vocabulary is larger; tokens with
        higher ids are never chosen. None: all tokens may be chosen.
      dequantize: `Codec.dequantize` of the bank; None if it stores plain keys and values.
      observe: whether to record the attention on memories (`Written.reading`, `by_token`).
    """

    def __init__(
        self,
        model: Model,
        sample: Sampler,
        *,
        stop: tuple[int, ...] = (),
        pad: int = 0,
        usable: int | None = None,
        dequantize: Dequantize | None = None,
        observe: bool = False,
    ):
        self.model, self.sample, self.stop, self.pad = model, sample, stop, pad
        self.usable, self.dequantize, self.observe = usable, dequantize, observe
        segments = tuple(name for name in model.ranges for _ in range(*model.ranges[name]))
        self.turned = turned_layers(model.config).tolist()
        one_device = model.mesh is None or model.mesh.size == 1
        self.layout = CacheLayout(segments, len(model.prefix_tokens), model.slots, one_device)
        self._name_parts()

        def prefill(*inputs: Any, slots: int) -> tuple[State, Written]:
            run = functools.partial(self._prefill, slots)
            return self._on_devices(run, self.prefill_specs)(*inputs)

        self.prefill = jax.jit(prefill, static_argnames="slots")
        generate = self._on_devices(self._generate, self.generate_specs)
        self.generate = jax.jit(generate, donate_argnums=1)

    def _name_parts(self) -> None:
        """Sets the partition specs of the programs' arguments and results."""
        part: Any = ACTIVATIONS.spec
        rows: Any = part(("batch",))
        whole: Any = PartitionSpec()
        params, ranges = self.model.specs(), self.model.ranges
        of_layers = [
            jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), params[segment])
            for segment in self.layout.segments
        ]
        params = {name: params[name] for name in params if name not in ranges}
        params["layers"] = of_layers
        cache: Any = PartitionSpec((*BATCH_AXES, "tensor"))  # rows and heads are one axis
        state = State(cache, rows, rows, rows, whole, whole, rows, rows)
        read = part((None, "batch", None, None, "kv_heads"))
        prompt_memory = ExplicitMemory(read, read, rows)
        read = part((None, "batch", None, "kv_heads"))
        self.prefill_specs = (params, rows, rows, rows, prompt_memory, rows)
        self.generate_specs = (params, state, ExplicitMemory(read, read, rows), whole, rows)
        observed = (part(("batch", None, "kv_heads")), rows) if self.observe else ()
        self._results = (state, Written(rows, rows, *observed))

    def _on_devices(self, function: Callable, specs: tuple) -> Callable:
        """Wraps `function`, which computes on one device's parts, as a function of global arrays;
        arguments may be None."""

        def run(*inputs: Any) -> tuple[State, Written]:
            pairs = zip(inputs, specs, strict=True)
            own = tuple(None if x is None else spec for x, spec in pairs)
            return on_devices(self.model.mesh, function, own, self._results)(*inputs)

        return run

    # The methods below run under `shard_map` and see the part of one device.

    def _prefill(
        self,
        slots: int,
        params: Params,
        tokens_BT: Int[Array, "B T"],
        prompt_length: Int[Array, " B"],
        rows: Int[Array, "B 2"],
        stored: ExplicitMemory | None,
        forced: Int[Array, "B 1"],
    ) -> tuple[State, Written]:
        """Reads prompts and generates their first token.

        Args:
          slots: number of cache slots for generated tokens.
          params: result of `unstack`.
          tokens_BT: prompts, padded at the end; T is a multiple of the chunk length.
          prompt_length: number of tokens of each prompt, ≥ 1.
          rows: as `State.rows`.
          stored: memories of every chunk as the bank stores them, `(L, B, C, M, K, P, width)`;
            those of a prompt's last chunk stay in the cache. None: no memories.
          forced: tokens to generate instead of sampled ones; −1: sample.

        Returns:
          The state, and the first token, `(B, 1)`.
        """
        model, (B, T) = self.model, tokens_BT.shape
        memory, layout = self._memories(stored), self.layout
        streams, hidden = model.embed(params, tokens_BT, None)
        layer, row = model.layer(streams), jnp.arange(B)
        last_chunk = (prompt_length - 1) // model.memory.chunk_length
        length, kept = jnp.zeros((B, 0), jnp.int32), None
        if memory is not None:
            length = memory.length[row, last_chunk]
            keys, values = (x[:, row, last_chunk] for x in memory[:2])
            kept = ExplicitMemory(keys, values, length)
        zero = jnp.zeros((), jnp.int32)
        nothing, done = jnp.zeros((B,), jnp.int32), jnp.zeros((B,), bool)
        state = State((), length, rows, prompt_length, zero + T, zero, nothing, done)
        masks = layout.masks(state, T + slots, zero - 1)
        cache, readings, parts = [], [], iter(model.slots.by_layer(memory))
        for index, segment in enumerate(layout.segments):
            part = next(parts) if segment == "memory" else None
            block, own = model.merge(params["layers"][index]), layer.at(self.turned[index])
            part = None if part is None else own.space_out(part)
            _, heads, prefix_heads = own.heads(block, hidden)
            assert heads is not None
            attended, prefix = layer.attend_prefix(prefix_heads)
            output, _ = layer.attend_context(heads, prefix, part, layout.head_counts(index))
            context = KeyValues(heads.k, heads.v)
            cache.append(
                layout.prompt_cache(index, context, prefix, kept, self._space_out, slots, state)
            )
            if self.observe and segment == "memory":
                query = heads.q[row, prompt_length - 1]
                readings.append(layout.attend(index, query, cache[-1], masks, state)[1])
            hidden = block.rest(hidden, join((None, output, attended)))
        out = streams.split(hidden)[1]
        assert out is not None
        last = jnp.take_along_axis(out, (prompt_length - 1)[:, None, None], axis=1)
        state = state._replace(cache=tuple(cache))
        state, token, logprob = self._next_token(params, state, last, forced[:, 0])
        written = self._nothing_written(state, forced)
        written = written._replace(tokens=token[:, None], logprobs=logprob[:, None])
        return state, self._observed(written, readings, 0)

    def _generate(
        self,
        params: Params,
        state: State,
        stored: ExplicitMemory | None,
        steps: Int[Array, ""],
        forced: Int[Array, "B n"],
    ) -> tuple[State, Written]:
        """Generates up to `steps` tokens per row; on one device stops early if all rows have ended.

        Args:
          params: result of `unstack`.
          state: state after `prefill` or `generate`; its buffers are donated.
          stored: new memories of the rows as the bank stores them, `(L, B, M, K, P, width)`; None
            keeps the present ones.
          steps: number of tokens, ≤ n.
          forced: tokens to generate instead of sampled ones; −1: sample.
        """
        memory = self._memories(stored)
        if memory is not None:
            state = self.layout.load_memories(state, memory, self._space_out)
        written = self._nothing_written(state, forced)

        def going(carry: tuple[Array, State, Written]) -> Array:
            return (carry[0] < steps) & ~jnp.all(carry[1].done)

        def step(carry: tuple[Array, State, Written]) -> tuple[Array, State, Written]:
            i, state, written = carry
            before = state.done
            state, hidden, readings = self._step(params, state)
            state, token, logprob = self._next_token(params, state, hidden, forced[:, i])
            place = jax.lax.dynamic_update_index_in_dim
            written = written._replace(
                tokens=place(written.tokens, token, i, 1),
                logprobs=place(written.logprobs, logprob, i, 1),
            )
            readings = [jnp.where(before[:, None, None, None], 0, part) for part in readings]
            return i + 1, state, self._observed(written, readings, i)

        carry = (jnp.int32(0), state, written)
        # On a mesh all devices run all steps: if one stopped early, collectives would deadlock.
        if self.model.mesh is not None and self.model.mesh.size > 1:
            carry = jax.lax.fori_loop(0, steps, lambda _, carry: step(carry), carry)
        else:
            carry = jax.lax.while_loop(going, step, carry)
        return carry[1:]

    def _space_out(self, keys_BMKPH: Array, index: int) -> Array:
        """Moves the keys of layer `index` of memories that are read together apart."""
        rope = Rope.of(self.model.config).at(self.turned[index])
        return space_out(keys_BMKPH, self.model.memory.spacing, rope)

    def _memories(self, stored: ExplicitMemory | None) -> ExplicitMemory | None:
        return stored if stored is None or self.dequantize is None else self.dequantize(stored)

    def _step(self, params: Params, state: State) -> tuple[State, Array, list[Array]]:
        """Runs the last token of every row through all layers; returns the state, hidden states
        `(B, 1, D)` and, if observed, each memory layer's attention on memories."""
        model, layout = self.model, self.layout
        slot = state.prompt_slots + state.fed
        first = layout.prefix + model.memory.reference_length
        position, rope = first + state.prompt_length + state.fed, Rope.of(model.config)
        hidden = model.look_up(params, state.token)[:, None]
        masks = layout.masks(state, layout.context_slots(state), slot)
        cache: list[tuple[KeyValues, ...]] = []
        readings: list[Array] = []
        for index, (segment, past) in enumerate(zip(layout.segments, state.cache, strict=True)):
            block = model.merge(params["layers"][index])
            q, k, v = block.qkv(hidden)
            turn = rope.at(self.turned[index])
            q, k = (rotate(x, position[:, None], turn) for x in (q, k))
            new = KeyValues(k.swapaxes(1, 2), v.swapaxes(1, 2))
            cache.append(layout.append(index, new, past, slot, state))
            attended, mass = layout.attend(index, q[:, 0], cache[-1], masks, state)
            hidden = block.rest(hidden, attended[:, None])
            if self.observe and segment == "memory":
                readings.append(mass)
        return state._replace(cache=tuple(cache), fed=state.fed + 1), hidden, readings

    def _next_token(
        self, params: Params, state: State, hidden: Array, forced: Array
    ) -> tuple[State, Array, Array]:
        """Samples the next token of every row from its last hidden state `(B, 1, D)`; returns the
        state, the tokens and their log-probabilities."""
        logits = self.model.head(params, hidden)[:, 0]
        if self.model.parallel.axes("tensor"):
            logits = jax.lax.all_gather(logits, "tensor", axis=1, tiled=True)
        known = logits
        if self.usable is not None and self.usable < logits.shape[1]:
            known = jnp.where(jnp.arange(logits.shape[1])[None] < self.usable, logits, -jnp.inf)
        token = self.sample(known, state.rows, state.fed).astype(jnp.int32)
        token = jnp.where(forced < 0, token, forced)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        logprob = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
        token = jnp.where(state.done, self.pad, token)
        logprob = jnp.where(state.done, 0.0, logprob)
        done = state.done
        for stop in self.stop:
            done = done | (token == stop)
        return state._replace(token=token, done=done), token, logprob

    def _nothing_written(self, state: State, forced: Array) -> Written:
        shape = forced.shape
        written = Written(jnp.full(shape, self.pad, jnp.int32), jnp.zeros(shape))
        if not self.observe:
            return written
        B, M = state.memory_length.shape
        tensor = 1 if self.model.mesh is None else self.model.mesh.shape["tensor"]
        K = self.model.config.kv_heads // tensor
        groups = self.model.config.query_heads // self.model.config.kv_heads
        layers = self.model.segments["memory"]
        return written._replace(
            reading=jnp.zeros((B, layers, K, groups, M + 1)), by_token=jnp.zeros((*shape, M + 1))
        )

    def _observed(self, written: Written, readings: list[Array], i: Any) -> Written:
        """Adds the attention on memories of the query that generated token i."""
        if not readings:
            return written
        assert written.reading is not None and written.by_token is not None
        reading = jnp.stack(readings, axis=1)  # (B, L, K, G, M + 1)
        mean = reading.mean((1, 2, 3))
        if self.model.parallel.axes("tensor"):
            mean = jax.lax.pmean(mean, "tensor")
        return written._replace(
            reading=written.reading + reading,
            by_token=jax.lax.dynamic_update_index_in_dim(written.by_token, mean, i, 1),
        )


def unstack(model: Model, params: Params) -> Params:
    """Returns the parameters of `model` with a list `layers` of one dict per layer in place of the
    stacked segments; matrices are cast to the compute dtype."""

    def cast(leaf: Array) -> Array:
        return leaf.astype(model.dtype) if leaf.ndim > 1 else leaf

    layers = [
        jax.tree.map(lambda leaf, i=i: cast(leaf[i]), params[name])
        for name, (low, high) in model.ranges.items()
        for i in range(high - low)
    ]
    rest = {name: cast(params[name]) for name in params if name not in model.ranges}
    return {**rest, "layers": layers}
