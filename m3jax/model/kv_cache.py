"""The key-value cache of generation: layout of a layer's slots, and the mask of visible slots.

In every layer one array holds all keys of a row, in the order: constant prefix, slots of its
memories (in memory layers), context. Loading new memories overwrites their slots. The slots of
generated tokens begin after those of the longest prompt, so that a step writes the same slot in all
rows; RoPE positions continue each row's own prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m3jax.model.attention import masked_softmax
from m3jax.model.attention_mask import ExplicitMemory, KeyValues, keys_of_heads
from m3jax.model.slots import SlotLayout


class State(NamedTuple):
    """State of the generation of a batch of rows; stays on the device.

    Attributes:
      cache: for every layer, keys (RoPE applied) and values `(B, K, S, H)`. The S slots are: the
        prefix, in memory layers M·P slots of memories (P is the largest count of the layer's
        heads), the longest prompt, generated tokens.
      memory_length: number of tokens of each memory in the head that keeps most; `(B, M)`, M = 0
        without memories.
      rows: index of each row over all batches, which the sampler uses; `(B,)`.
      prompt_length: number of tokens of each prompt; `(B,)`.
      prompt_slots: number of slots for the prompt: the length T to which prompts are padded.
      fed: number of generated tokens that are in the cache.
      token: the last generated token of each row, not in the cache yet; `(B,)`.
      done: true for rows that have generated a stop token; `(B,)`.
    """

    cache: tuple[KeyValues, ...]
    memory_length: Int[Array, "B M"]
    rows: Int[Array, " B"]
    prompt_length: Int[Array, " B"]
    prompt_slots: Int[Array, ""]
    fed: Int[Array, ""]
    token: Int[Array, " B"]
    done: Array


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Order of the slots in the cache of each layer.

    Attributes:
      segments: for every layer, `lower`, `memory` or `upper`.
      prefix: number of slots of the constant prefix.
      slots: slots of a memory in every memory layer and head.
    """

    segments: tuple[str, ...]
    prefix: int
    slots: SlotLayout

    def counts(self, index: int) -> tuple[int, ...]:
        """Returns the number of slots of a memory in each head of layer `index`."""
        if self.segments[index] != "memory":
            return (0,)
        return self.slots.counts[index - self.segments.index("memory")]

    def memory_slots(self, index: int, state: State) -> int:
        """Returns the number M·P of slots of a row's memories in layer `index`."""
        return state.memory_length.shape[1] * max(self.counts(index))

    def context_start(self, index: int, state: State) -> int:
        """Returns the first context slot of layer `index`."""
        return self.prefix + self.memory_slots(index, state)

    def masks(self, state: State, slots: int, slot: Array) -> dict[int, Array]:
        """Returns the masks `(B, S)` of visible slots, by the number P of slots of a memory.

        Args:
          state: state of the rows.
          slots: number of slots of the context.
          slot: the last context slot that is visible.
        """
        slot_S = jnp.arange(slots)[None]
        generated = (slot_S >= state.prompt_slots) & (slot_S <= slot)
        context = (slot_S < state.prompt_length[:, None]) | generated
        B = state.token.shape[0]
        constant = jnp.ones((B, self.prefix), bool)
        masks = {}
        for P in {max(self.counts(index)) for index in range(len(self.segments))}:
            real = jnp.arange(P)[None, None] < state.memory_length[..., None]
            masks[P] = jnp.concatenate([constant, real.reshape(B, -1), context], axis=1)
        return masks

    def head_counts(self, index: int) -> Array | None:
        """Returns the counts `(K,)` of layer `index`; None if they are equal."""
        counts = self.counts(index)
        return None if len(set(counts)) == 1 else jnp.array(counts)

    def mask(self, index: int, masks: dict[int, Array], state: State) -> Array:
        """Returns the mask of visible slots of layer `index`: `(B, 1, S)` if it is the same for all
        heads, else `(B, K, S)`. `masks` is the result of the method `masks`."""
        P, counts_K = max(self.counts(index)), self.head_counts(index)
        mask_BS = masks[P]
        if counts_K is None:
            return mask_BS[:, None]
        slots = self.memory_slots(index, state)
        visible = keys_of_heads(counts_K, P, mask_BS.shape[1], self.prefix, slots)
        return mask_BS[:, None] & visible[None]

    def mass(self, index: int, weights_BKGS: Array, state: State) -> Array:
        """Sums attention weights of layer `index` over each memory, and over all other keys: `(B,
        K, G, M + 1)`."""
        M = state.memory_length.shape[1]
        mass = weights_BKGS[..., self.prefix : self.context_start(index, state)]
        mass = mass.reshape(*mass.shape[:-1], M, max(self.counts(index))).sum(-1)
        return jnp.concatenate([mass, 1 - mass.sum(-1, keepdims=True)], axis=-1)

    def load_memories(
        self, state: State, memory: ExplicitMemory, place: Callable[[Array, int], Array]
    ) -> State:
        """Returns the state with its memories replaced by `memory`, `(L, B, M, K, P, H)`, or `(1,
        B, M, 1, S, H)` unless all heads have the same number of slots.

        `place` maps the keys `(B, M, K, P, H)` of a layer, and its index, to keys at the positions
        at which the rows read them.
        """

        def load(old: Array, new: Array) -> Array:
            slots = _as_slots(new, old.dtype)
            return jax.lax.dynamic_update_slice_in_dim(old, slots, self.prefix, 2)

        cache = list(state.cache)
        layers = self.slots.by_layer(memory)
        for index, part in enumerate(layers, self.segments.index("memory")):
            if part is not None:
                new = (place(part.keys, index), part.values)
                cache[index] = KeyValues(*map(load, cache[index], new))
        return state._replace(cache=tuple(cache), memory_length=memory.length)


def prompt_cache(
    context: KeyValues, prefix: KeyValues | None, memory: ExplicitMemory | None, slots: int
) -> KeyValues:
    """Returns a layer's cache after prompts with keys and values `context`, `(B, T, K, H)`.

    `memory` is that of the last chunk, `(B, M, K, P, H)`; `slots` empty slots follow the prompt.
    """
    cache = []
    for part, x_BTKH in enumerate(context):
        rows = jnp.pad(x_BTKH.swapaxes(1, 2), ((0, 0), (0, 0), (0, slots), (0, 0)))
        parts = [rows]
        if memory is not None:
            parts.insert(0, _as_slots(memory[part], rows.dtype))
        if prefix is not None:
            constant = prefix[part].swapaxes(0, 1)[None]
            constant = jnp.broadcast_to(constant, (len(rows), *constant.shape[1:]))
            parts.insert(0, constant.astype(rows.dtype))
        cache.append(jnp.concatenate(parts, axis=2))
    return KeyValues(*cache)


def query_weights(
    q_BKGH: Float[Array, "B K G H"], k_BKSH: Float[Array, "B K S H"], mask_BKS: Array
) -> Float[Array, "B K G S"]:
    """Returns softmax weights in float32 for one query per row; the mask is `(B, 1 or K, S)`."""
    scores = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32)
    return masked_softmax(scores, mask_BKS[:, :, None], q_BKGH.shape[-1])


def _as_slots(x_BMKPH: Array, dtype: Any) -> Array:
    """Reshapes keys or values of memories to the cache's slots, `(B, K, M·P, H)`."""
    B, M, K, P, H = x_BMKPH.shape
    return jnp.moveaxis(x_BMKPH, 2, 1).reshape(B, K, M * P, H).astype(dtype)
