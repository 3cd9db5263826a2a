"""Generation on the device: a prompt in one pass, then token after token, with explicit memories.

What a row attends to lies in one array a layer: the constant prefix, the slots of its memories, the
context. An explicit memory is then nothing but some keys and values in front, and recalling others
overwrites these slots. Layers are separate arrays and not stacked: a scan would copy every layer's
weights for every token.

A row's generated tokens follow the *slots* of the longest prompt, so that one step writes the same
slot in all rows; positions are those of the row itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from m3jax.mesh import ACTIVATIONS, on_devices
from m3jax.model.attention import MASKED
from m3jax.model.attention_mask import ExplicitMemory, KeyValues, keys_of_heads
from m3jax.model.rope import rotate
from m3jax.model.transformer import Layer, Model, Params, join, segment_ranges

# Token of each row from its logits `(B, V)`, float32, and the number of the row and of the token.
Sampler = Callable[[Array, Array, Array], Array]
Decode = Callable[[ExplicitMemory], ExplicitMemory]


class State(NamedTuple):
    """Where the generation of a batch of rows stands; stays on the device.

    Attributes:
      cache: of every layer, keys (positions applied) and values `(B, K, S, H)`. S: prefix, in
        memory layers M·P slots of memories, slots of the longest prompt, slots of what is
        generated.
      memory_length: real slots of each memory; `(B, M)`, M = 0 without memory.
      rows: number of each row among all, for the sampler; `(B,)`.
      prompt_length: tokens of each prompt; `(B,)`.
      prompt_slots: slots of the longest prompt.
      fed: generated tokens that are in the cache.
      token: the last generated token of each row, not in the cache yet; `(B,)`.
      done: rows that have generated a stop token; `(B,)`.
    """

    cache: tuple[KeyValues, ...]
    memory_length: Int[Array, "B M"]
    rows: Int[Array, " B"]
    prompt_length: Int[Array, " B"]
    prompt_slots: Int[Array, ""]
    fed: Int[Array, ""]
    token: Int[Array, " B"]
    done: Array


class Written(NamedTuple):
    """What one call generated.

    Attributes:
      tokens: `(B, n)`; `pad` after a stop token and in places that were not reached.
      logprobs: of the tokens, natural logarithm, before temperature and cuts; float32 `(B, n)`.
      reading: attention weight of the queries that generated the tokens on each of the M memories
        (the last column: on everything else), summed over the tokens; `(B, L, K, G, M + 1)`, L
        memory layers. None unless observed.
      by_token: the same of each token, mean over layers and heads; `(B, n, M + 1)`.
    """

    tokens: Int[Array, "B n"]
    logprobs: Float[Array, "B n"]
    reading: Array | None = None
    by_token: Array | None = None


class Decoder:
    """Programs that generate with one model.

    Args:
      model: its mesh may have the axes `data` and `tensor`; weights are whole otherwise.
      sample: the sampler.
      stop: tokens that end a row.
      pad: token that follows one.
      usable: tokens from this one on are never chosen; the vocabulary may be larger than the
        tokenizer's.
      decode: makes memories of what is stored; see `memory.codec.Codec.decode`.
      observe: whether to sum up what attention the memories received.
    """

    def __init__(
        self,
        model: Model,
        sample: Sampler,
        *,
        stop: tuple[int, ...] = (),
        pad: int = 0,
        usable: int | None = None,
        decode: Decode | None = None,
        observe: bool = False,
    ):
        self.model, self.sample, self.stop, self.pad = model, sample, stop, pad
        self.usable, self.decode, self.observe = usable, decode, observe
        ranges = segment_ranges(model.config)
        self._segments = [name for name in ranges for _ in range(*ranges[name])]
        self._name_parts()
        self.prefill = jax.jit(self._prefill_program, static_argnames="slots")
        self.generate = jax.jit(self._generate_program, donate_argnames="state")

    def _name_parts(self) -> None:
        """Partitions of all that goes into the programs and comes out."""
        part: Any = ACTIVATIONS.spec
        self.rows: Any = part(("batch",))
        self.whole: Any = PartitionSpec()
        rows: Any = self.rows
        whole: Any = self.whole
        self.param_specs = unstack(
            self.model, self.model.specs(), lambda spec, _: PartitionSpec(*spec[1:])
        )
        memories = part(("batch", None, None, None, "kv_heads"))
        self.prompt_memory_specs = ExplicitMemory(memories, memories, rows)
        memories = part(("batch", None, None, "kv_heads"))
        self.memory_specs = ExplicitMemory(memories, memories, rows)
        cache = part(("batch", "kv_heads"))
        layers = tuple(KeyValues(cache, cache) for _ in self._segments)
        self.state_specs = State(layers, rows, rows, rows, whole, whole, rows, rows)
        self.written_specs = Written(rows, rows)
        if self.observe:
            heads = part(("batch", None, "kv_heads"))
            self.written_specs = Written(rows, rows, heads, rows)

    def _prefill_program(
        self,
        params: Params,
        tokens_BT: Int[Array, "B T"],
        prompt_length: Int[Array, " B"],
        rows: Int[Array, " B"],
        memory: ExplicitMemory | None,
        forced: Int[Array, "B 1"],
        *,
        slots: int,
    ) -> tuple[State, Written]:
        """Reads prompts and generates their first token.

        Args:
          params: of `unstack`.
          tokens_BT: prompts, padded at the end; T a multiple of the chunk length.
          prompt_length: their tokens, ≥ 1.
          rows: number of each row, for the sampler.
          memory: what each chunk reads, as it is stored: `(B, C, M, L, K, P, width)`. The last
            chunk's stays in the cache.
          forced: what is generated, where it is not −1.
          slots: of what will be generated.

        Returns:
          The state, and the first token, `(B, 1)`.
        """

        def run(params: Params, *inputs: Any) -> tuple[State, Written]:
            return self._prefill(params, slots, *inputs)

        inputs = (tokens_BT, prompt_length, rows, memory, forced)
        memory_spec = self.prompt_memory_specs if memory else None
        specs = (self.rows, self.rows, self.rows, memory_spec, self.rows)
        results = (self.state_specs, self.written_specs)
        return on_devices(self.model.mesh, run, (self.param_specs, *specs), results)(
            params, *inputs
        )

    def _generate_program(
        self,
        params: Params,
        state: State,
        memory: ExplicitMemory | None,
        steps: Int[Array, ""],
        forced: Int[Array, "B n"],
    ) -> tuple[State, Written]:
        """Generates up to `steps` tokens a row, fewer when all rows have ended.

        Args:
          params: of `unstack`.
          state: is given up.
          memory: what the rows read from now on, as it is stored, `(B, M, L, K, P, width)`; None
            leaves what they read.
          steps: ≤ n.
          forced: what is generated, where it is not −1.
        """

        memory_spec = self.memory_specs if memory else None
        specs = (self.param_specs, self.state_specs, memory_spec, self.whole, self.rows)
        results = (self.state_specs, self.written_specs)
        run = on_devices(self.model.mesh, self._generate, specs, results)
        return run(params, state, memory, steps, forced)

    # What follows sees the part of one device.

    def _prefill(
        self,
        params: Params,
        slots: int,
        tokens_BT: Array,
        prompt_length: Array,
        rows: Array,
        stored: ExplicitMemory | None,
        forced: Array,
    ) -> tuple[State, Written]:
        model, (B, T) = self.model, tokens_BT.shape
        memory = self._memories(stored)
        streams, hidden = model.embed(params, tokens_BT, None)
        layer, row = Layer(model, streams), jnp.arange(B)
        last_chunk = (prompt_length - 1) // model.config.memory.chunk_length
        length = jnp.zeros((B, 0), jnp.int32) if memory is None else memory.length[row, last_chunk]
        zero = jnp.zeros((), jnp.int32)
        nothing, done = jnp.zeros((B,), jnp.int32), jnp.zeros((B,), bool)
        state = State((), length, rows, prompt_length, zero + T, zero, nothing, done)
        masks = self._masks(state, T + slots, zero - 1)
        cache, readings, parts = [], [], iter(_by_layer(memory))
        for index, segment in enumerate(self._segments):
            part = next(parts, None) if segment == "memory" else None
            reading_K = self._reading(index)
            block = model.merge(params["layers"][index])
            _, heads, prefix_heads = layer.heads(block, hidden)
            assert heads is not None
            attended, prefix = layer.of_prefix(prefix_heads)
            read, _ = layer.of_context(heads, prefix, part, reading_K)
            chosen = None if part is None else jax.tree.map(lambda x: x[row, last_chunk], part)
            cache.append(_front(heads.k, heads.v, prefix, chosen, slots))
            if self.observe and segment == "memory":
                seen = self._seen(index, masks, state)
                weights = _weights(heads.q[row, prompt_length - 1], cache[-1].keys, seen)
                readings.append(self._mass(weights, state))
            hidden = block.rest(hidden, join((None, read, attended)))
        context = streams.split(hidden)[1]
        assert context is not None
        last = jnp.take_along_axis(context, (prompt_length - 1)[:, None, None], axis=1)
        state = state._replace(cache=tuple(cache))
        state, token, logprob = self._chosen(params, state, last, forced[:, 0])
        written = self._nothing_written(state, forced)
        written = written._replace(tokens=token[:, None], logprobs=logprob[:, None])
        return state, self._observed(written, readings, 0)

    def _generate(
        self,
        params: Params,
        state: State,
        stored: ExplicitMemory | None,
        steps: Array,
        forced: Array,
    ) -> tuple[State, Written]:
        memory = self._memories(stored)
        if memory is not None:
            state = self._recall(state, memory)
        written = self._nothing_written(state, forced)

        def going(carry: tuple[Array, State, Written]) -> Array:
            return (carry[0] < steps) & ~jnp.all(carry[1].done)

        def step(carry: tuple[Array, State, Written]) -> tuple[Array, State, Written]:
            i, state, written = carry
            before = state.done
            state, hidden, readings = self._step(params, state)
            state, token, logprob = self._chosen(params, state, hidden, forced[:, i])
            place = jax.lax.dynamic_update_index_in_dim
            written = written._replace(
                tokens=place(written.tokens, token, i, 1),
                logprobs=place(written.logprobs, logprob, i, 1),
            )
            readings = [jnp.where(before[:, None, None, None], 0, part) for part in readings]
            return i + 1, state, self._observed(written, readings, i)

        # Rows end together over all devices of a mesh, or collectives would wait for each other.
        if self.model.mesh is not None and self.model.mesh.size > 1:
            carry = jax.lax.fori_loop(
                0, steps, lambda _, carry: step(carry), (jnp.int32(0), state, written)
            )
        else:
            carry = jax.lax.while_loop(going, step, (jnp.int32(0), state, written))
        return carry[1], carry[2]

    def _memories(self, stored: ExplicitMemory | None) -> ExplicitMemory | None:
        return stored if stored is None or self.decode is None else self.decode(stored)

    def _recall(self, state: State, memory: ExplicitMemory) -> State:
        """The state with other memories `(B, M, L, K, P, H)` in its slots."""
        parts, start = iter(_by_layer(memory)), len(self.model.prefix_tokens)
        cache = list(state.cache)
        for index, segment in enumerate(self._segments):
            if segment == "memory":
                cache[index] = KeyValues(
                    *(
                        jax.lax.dynamic_update_slice_in_dim(old, _slots(new, old.dtype), start, 2)
                        for old, new in zip(cache[index], next(parts)[:2], strict=True)
                    )
                )
        return state._replace(cache=tuple(cache), memory_length=memory.length)

    def _step(self, params: Params, state: State) -> tuple[State, Array, list[Array]]:
        """One token through all layers: the state, `(B, 1, D)`, and attention on memories."""
        model = self.model
        config, prefix = model.config, len(model.prefix_tokens)
        slot = state.prompt_slots + state.fed
        position = prefix + config.memory.reference_length + state.prompt_length + state.fed
        hidden = model.look_up(params, state.token)[:, None]
        places = state.cache[0].keys.shape[2] - self._before(0, state)
        masks = self._masks(state, places, slot)
        cache: list[KeyValues] = []
        readings: list[Array] = []
        for index, (segment, here) in enumerate(zip(self._segments, state.cache, strict=True)):
            block = model.merge(params["layers"][index])
            q, k, v = block.qkv(hidden)
            q, k = (rotate(x, position[:, None], config.model.rope_base) for x in (q, k))
            place = self._before(index, state) + slot
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(1, 2), place, 2)
                for old, new in zip(here, (k, v), strict=True)
            )
            weights_BKGS = _weights(q[:, 0], keys, self._seen(index, masks, state))
            attended = jnp.einsum("BKGS,BKSH->BKGH", weights_BKGS.astype(values.dtype), values)
            hidden = block.rest(hidden, attended[:, None])
            cache.append(KeyValues(keys, values))
            if self.observe and segment == "memory":
                readings.append(self._mass(weights_BKGS, state))
        return state._replace(cache=tuple(cache), fed=state.fed + 1), hidden, readings

    def _slots(self, state: State) -> int:
        """Slots M·P of a row's memories."""
        return state.memory_length.shape[1] * self.model.config.memory.kept_tokens

    def _before(self, index: int, state: State) -> int:
        """Slots of a layer in front of the context."""
        memories = self._slots(state) if self._segments[index] == "memory" else 0
        return len(self.model.prefix_tokens) + memories

    def _masks(self, state: State, places: int, slot: Array) -> dict[bool, Array]:
        """Which slots a row sees, in layers without and with memories; `(B, S)`."""
        place = jnp.arange(places)[None]
        generated = (place >= state.prompt_slots) & (place <= slot)
        context = (place < state.prompt_length[:, None]) | generated
        B, prefix = state.token.shape[0], len(self.model.prefix_tokens)
        P = self.model.config.memory.kept_tokens
        constant = jnp.ones((B, prefix), bool)
        real = jnp.arange(P)[None, None] < state.memory_length[..., None]
        return {
            False: jnp.concatenate([constant, context], axis=1),
            True: jnp.concatenate([constant, real.reshape(B, self._slots(state)), context], axis=1),
        }

    def _reading(self, index: int) -> Array | None:
        """Which heads of a layer read memories; None: all."""
        heads = self.model.memory_heads
        if heads is None or self._segments[index] != "memory":
            return None
        return jnp.asarray(heads[index - self._segments.index("memory")])

    def _seen(self, index: int, masks: dict[bool, Array], state: State) -> Array:
        """Which slots of a layer each row sees, `(B, 1, S)`, or each of its heads, `(B, K, S)`."""
        mask_BS, reading_K = masks[self._segments[index] == "memory"], self._reading(index)
        if reading_K is None:
            return mask_BS[:, None]
        prefix = len(self.model.prefix_tokens)
        allowed = keys_of_heads(reading_K, mask_BS.shape[1], prefix, self._slots(state))
        return mask_BS[:, None] & allowed[None]

    def _chosen(
        self, params: Params, state: State, hidden: Array, forced: Array
    ) -> tuple[State, Array, Array]:
        """The next token of every row from its last hidden state `(B, 1, D)`, and its logprob."""
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

    def _mass(self, weights_BKGS: Array, state: State) -> Array:
        """Attention on each memory, and on everything else: `(B, K, G, M + 1)`."""
        prefix, M = len(self.model.prefix_tokens), state.memory_length.shape[1]
        mass = weights_BKGS[..., prefix : prefix + self._slots(state)]
        mass = mass.reshape(*mass.shape[:-1], M, -1).sum(-1)
        return jnp.concatenate([mass, 1 - mass.sum(-1, keepdims=True)], axis=-1)

    def _nothing_written(self, state: State, forced: Array) -> Written:
        shape = forced.shape
        written = Written(jnp.full(shape, self.pad, jnp.int32), jnp.zeros(shape))
        if not self.observe:
            return written
        B, M = state.memory_length.shape
        K = state.cache[0].keys.shape[1]
        groups = self.model.config.model.query_heads // self.model.config.model.kv_heads
        layers = self.model.segments["memory"]
        return written._replace(
            reading=jnp.zeros((B, layers, K, groups, M + 1)), by_token=jnp.zeros((*shape, M + 1))
        )

    def _observed(self, written: Written, readings: list[Array], i: Any) -> Written:
        """With what the query that generated token i read in each memory layer."""
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


def unstack(model: Model, params: Params, one: Callable[[Any, int], Any] | None = None) -> Params:
    """Parameters with a dict a layer, `layers`, instead of stacked segments.

    Matrices are in the compute dtype, as they are used.

    Args:
      model: whose parameters.
      params: of `Model`.
      one: what layer number i of its segment has of a stacked leaf; default its slice.
    """
    ranges = segment_ranges(model.config)
    is_leaf = (lambda x: isinstance(x, PartitionSpec)) if one else None

    def part(leaf: Any, i: int) -> Any:
        if one is not None:
            return one(leaf, i)
        return leaf[i].astype(model.dtype) if leaf.ndim > 2 else leaf[i]

    layers = [
        jax.tree.map(lambda leaf, i=i: part(leaf, i), params[name], is_leaf=is_leaf)
        for name, (low, high) in ranges.items()
        for i in range(high - low)
    ]
    rest = {name: params[name] for name in params if name not in ranges}
    if one is None:
        rest = {
            name: leaf.astype(model.dtype) if leaf.ndim > 1 else leaf for name, leaf in rest.items()
        }
    return {**rest, "layers": layers}


def _by_layer(memory: ExplicitMemory | None) -> list[ExplicitMemory]:
    """Memories `(…, M, L, K, P, H)` of each layer, without the axis L."""
    if memory is None:
        return []
    axis = memory.length.ndim
    layers = range(memory.keys.shape[axis])
    keys, values = (jnp.moveaxis(x, axis, 0) for x in memory[:2])
    return [ExplicitMemory(keys[i], values[i], memory.length) for i in layers]


def _slots(x_BMKPH: Array, dtype: Any) -> Array:
    """Memories as slots in a row, `(B, K, M·P, H)`."""
    B, M, K, P, H = x_BMKPH.shape
    return jnp.moveaxis(x_BMKPH, 2, 1).reshape(B, K, M * P, H).astype(dtype)


def _front(
    k_BTKH: Array,
    v_BTKH: Array,
    prefix: KeyValues | None,
    memory: ExplicitMemory | None,
    slots: int,
) -> KeyValues:
    """A layer's cache after the prompt, with empty slots for what is generated."""
    B = k_BTKH.shape[0]
    cache = []
    for part, context in enumerate((k_BTKH, v_BTKH)):
        rows = jnp.pad(context.swapaxes(1, 2), ((0, 0), (0, 0), (0, slots), (0, 0)))
        parts = [rows]
        if memory is not None:
            parts.insert(0, _slots(memory[part], rows.dtype))
        if prefix is not None:
            constant = prefix[part].swapaxes(0, 1)[None]
            parts.insert(0, jnp.broadcast_to(constant, (B, *constant.shape[1:])).astype(rows.dtype))
        cache.append(jnp.concatenate(parts, axis=2))
    return KeyValues(*cache)


def _weights(q_BKGH: Array, k_BKSH: Array, mask_BKS: Array) -> Array:
    """Softmax weights of one query a row, float32 `(B, K, G, S)`; the mask may be of all heads."""
    scores = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BKS[:, :, None], scores * q_BKGH.shape[-1] ** -0.5, MASKED)
    return jax.nn.softmax(scores, axis=-1)
