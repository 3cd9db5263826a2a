"""The key-value cache of generation: layout of a layer's slots, and the mask of visible slots.

In every layer one array holds the keys of a row, in the order: constant prefix, slots of its
memories (in memory layers), context. Where heads keep very different numbers of tokens there are
two arrays, one for the heads that keep few and one for the others (`head_groups`): attention then
reads little padding. Loading new memories overwrites their slots. The slots of generated tokens
begin after those of the longest prompt, so that a step writes the same slot in all rows; RoPE
positions continue each row's own prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m3jax.config import HeadGroup, head_groups
from m3jax.model.attention import masked_softmax
from m3jax.model.attention_mask import ExplicitMemory, KeyValues, keys_of_heads
from m3jax.model.slots import SlotLayout

# (keys of memories of a layer `(B, M, K, P, H)`, index of the layer) -> keys where they are read
Place = Callable[[Array, int], Array]


class State(NamedTuple):
    """State of the generation of a batch of rows; stays on the device.

    Attributes:
      cache: for every layer and group of its heads (`CacheLayout.groups`), keys (RoPE applied) and
        values `(B·K, S, H)`, K heads of the group, or `(S, H)` for one row and head. The S slots
        are: the prefix, in memory layers
        M·P slots of memories (P is the largest count of the group's heads), the longest prompt,
        generated tokens.
      memory_length: number of tokens of each memory in the head that keeps most; `(B, M)`, M = 0
        without memories.
      rows: for the sampler, the id of each row over all batches, and the number of tokens of its
        text that were generated before this batch; `(B, 2)`.
      prompt_length: number of tokens of each prompt; `(B,)`.
      prompt_slots: number of slots for the prompt: the length T to which prompts are padded.
      fed: number of generated tokens that are in the cache.
      token: the last generated token of each row, not in the cache yet; `(B,)`.
      done: true for rows that have generated a stop token; `(B,)`.
    """

    cache: tuple[tuple[KeyValues, ...], ...]
    memory_length: Int[Array, "B M"]
    rows: Int[Array, "B 2"]
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
      one_device: whether all rows and heads are on one device.
    """

    segments: tuple[str, ...]
    prefix: int
    slots: SlotLayout
    one_device: bool

    def counts(self, index: int) -> tuple[int, ...]:
        """Returns the number of slots of a memory in each head of layer `index`."""
        if self.segments[index] != "memory":
            return (0,) * len(self.slots.counts[0])
        return self.slots.counts[index - self.segments.index("memory")]

    def groups(self, index: int, state: State) -> tuple[HeadGroup, ...]:
        """Returns the groups of heads of layer `index`; one group if the rows have no memories."""
        counts = self.counts(index)
        if not state.memory_length.shape[1]:
            return (HeadGroup(tuple(range(len(counts))), 0),)
        return head_groups(counts)

    def context_start(self, group: HeadGroup, state: State) -> int:
        """Returns the first context slot of a group of heads."""
        return self.prefix + state.memory_length.shape[1] * group.slots

    def context_slots(self, state: State) -> int:
        """Returns the number of slots of the context."""
        start = self.context_start(self.groups(0, state)[0], state)
        return state.cache[0][0].keys.shape[-2] - start

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
        layers = range(len(self.segments))
        for P in {group.slots for index in layers for group in self.groups(index, state)}:
            real = jnp.arange(P)[None, None] < state.memory_length[..., None]
            masks[P] = jnp.concatenate([constant, real.reshape(B, -1), context], axis=1)
        return masks

    def head_counts(self, index: int) -> Array | None:
        """Returns the counts `(K,)` of layer `index`; None if they are equal."""
        counts = self.counts(index)
        return None if len(set(counts)) == 1 else jnp.array(counts)

    def attend(
        self,
        index: int,
        q_BKGH: Float[Array, "B K G H"],
        cache: Sequence[KeyValues],
        masks: dict[int, Array],
        state: State,
    ) -> tuple[Float[Array, "B K G H"], Float[Array, "B K G columns"]]:
        """Attends from one query a row to the cache of layer `index`.

        `masks` is the result of the method `masks`.

        Returns:
          The output, and the attention weight on each memory (last column: on all other keys).
        """
        M, parts = state.memory_length.shape[1], []
        groups = self.groups(index, state)
        for group, part in zip(groups, cache, strict=True):
            mask = self._mask(index, group, masks[group.slots], M * group.slots)
            weights_BKGS, attended = _attend(_of_heads(q_BKGH, group), part, mask)
            mass = weights_BKGS[..., self.prefix : self.context_start(group, state)]
            mass = mass.reshape(*mass.shape[:-1], M, group.slots).sum(-1)
            mass = jnp.concatenate([mass, 1 - mass.sum(-1, keepdims=True)], axis=-1)
            parts.append((attended, mass))
        if len(parts) == 1:
            return parts[0]
        order = np.argsort([head for group in groups for head in group.heads])
        outputs, masses = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
        output, mass = (jnp.stack([x[:, i] for i in order], axis=1) for x in (outputs, masses))
        return output, mass

    def _mask(self, index: int, group: HeadGroup, mask_BS: Array, slots: int) -> Array:
        """Returns the mask of visible slots of a group of heads: `(B, 1, S)` if it is the same for
        all, else `(B, K, S)`; `slots` are those of a row's memories."""
        counts = [self.counts(index)[head] for head in group.heads]
        if not slots or len(set(counts)) == 1:
            return mask_BS[:, None]
        keys = mask_BS.shape[1]
        visible = keys_of_heads(jnp.array(counts), group.slots, keys, self.prefix, slots)
        return mask_BS[:, None] & visible[None]

    def prompt_cache(
        self,
        index: int,
        context: KeyValues,
        prefix: KeyValues | None,
        memory: ExplicitMemory | None,
        place: Place,
        slots: int,
        state: State,
    ) -> tuple[KeyValues, ...]:
        """Returns the cache of layer `index` after prompts.

        Args:
          index: number of the layer.
          context: keys and values of the prompts, `(B, T, K, H)`.
          prefix: those of the constant prefix, `(S, K, H)`.
          memory, place: memories of the last chunk, and where they are read, as in
            `load_memories`.
          slots: number of empty slots behind the prompt.
          state: state of the rows.
        """
        cache = []
        for group in self.groups(index, state):
            kept = None
            if memory is not None and group.slots:
                kept = self._as_slots(index, memory, group, place)
            arrays = []
            for part, x_BTKH in enumerate(context):
                rows = _of_heads(x_BTKH.swapaxes(1, 2), group)
                parts = [jnp.pad(rows, ((0, 0), (0, 0), (0, slots), (0, 0)))]
                if kept is not None:
                    parts.insert(0, kept[part].astype(rows.dtype))
                if prefix is not None:
                    constant = _of_heads(prefix[part].swapaxes(0, 1)[None], group)
                    constant = jnp.broadcast_to(constant, (len(rows), *constant.shape[1:]))
                    parts.insert(0, constant.astype(rows.dtype))
                arrays.append(self._held(jnp.concatenate(parts, axis=2)))
            cache.append(KeyValues(*arrays))
        return tuple(cache)

    def append(
        self, index: int, new: KeyValues, cache: Sequence[KeyValues], slot: Array, state: State
    ) -> tuple[KeyValues, ...]:
        """Returns the cache of layer `index` with keys and values `(B, K, 1, H)` of one token in
        context slot `slot`."""
        place = jax.lax.dynamic_update_slice_in_dim
        written = []
        for group, part in zip(self.groups(index, state), cache, strict=True):
            at = self.context_start(group, state) + slot
            pairs = zip(part, new, strict=True)
            rows = ((old, self._held(_of_heads(x, group))) for old, x in pairs)
            written.append(KeyValues(*(place(old, x, at, -2) for old, x in rows)))
        return tuple(written)

    def load_memories(self, state: State, memory: ExplicitMemory, place: Place) -> State:
        """Returns the state with its memories replaced by `memory`, `(L, B, M, K, P, H)`, or `(1,
        B, M, 1, S, H)` unless all heads have the same number of slots.

        `place` maps keys `(B, M, K, P, H)` of a layer, and its index, to keys at the positions at
        which the rows read them.
        """
        cache = list(state.cache)
        write = jax.lax.dynamic_update_slice_in_dim
        for index in range(len(self.segments)):
            groups = []
            for group, part in zip(self.groups(index, state), cache[index], strict=True):
                if group.slots:
                    new = self._as_slots(index, memory, group, place)
                    rows = [self._held(x.astype(part.keys.dtype)) for x in new]
                    pairs = zip(part, rows, strict=True)
                    part = KeyValues(*(write(old, x, self.prefix, -2) for old, x in pairs))
                groups.append(part)
            cache[index] = tuple(groups)
        return state._replace(cache=tuple(cache), memory_length=memory.length)

    def _as_slots(
        self, index: int, memory: ExplicitMemory, group: HeadGroup, place: Place
    ) -> KeyValues:
        """Returns memories in the slots of a group of heads of layer `index`: `(B, K, M·P, H)`.

        Arguments as in `load_memories`.
        """
        layer = index - self.segments.index("memory")
        keys, values = (self.slots.of_heads(x, layer, group) for x in memory[:2])
        B, M, K, P, H = keys.shape
        pair = place(keys, index), values
        return KeyValues(*(jnp.moveaxis(x, 2, 1).reshape(B, K, M * P, H) for x in pair))

    def _held(self, x_BKSH: Array) -> Array:
        """Returns an array as the cache holds it; XLA's CPU backend copies arrays with axes of size
        1 at every token."""
        x = x_BKSH.reshape(-1, *x_BKSH.shape[2:])
        return x[0] if self.one_device and len(x) == 1 else x


def _of_heads(x: Float[Array, "B K *more"], group: HeadGroup) -> Float[Array, "B k *more"]:
    """Returns the part of an array that belongs to a group of heads."""
    if len(group.heads) >= x.shape[1]:  # all heads of this device
        return x
    return jnp.stack([x[:, head] for head in group.heads], axis=1)


def _attend(q_BKGH: Array, cache: KeyValues, mask_BKS: Array) -> tuple[Array, Array]:
    """Attends from one query a row; the mask is `(B, 1 or K, S)`.

    The products take keys and values in the shape in which the cache holds them, so that XLA writes
    a token into them in place.

    Returns:
      Softmax weights in float32, `(B, K, G, S)`, and the output `(B, K, G, H)`.
    """
    queries = q_BKGH.reshape(*cache.keys.shape[:-2], *q_BKGH.shape[2:])
    scores = jnp.einsum(
        "...GH,...SH->...GS", queries, cache.keys, preferred_element_type=jnp.float32
    )
    scores_BKGS = scores.reshape(*q_BKGH.shape[:3], -1)
    weights_BKGS = masked_softmax(scores_BKGS, mask_BKS[:, :, None], q_BKGH.shape[-1])
    weights = weights_BKGS.reshape(scores.shape).astype(cache.values.dtype)
    attended = jnp.einsum("...GS,...SH->...GH", weights, cache.values)
    return weights_BKGS, attended.reshape(q_BKGH.shape)
