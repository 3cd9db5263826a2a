"""Layout of the slots of a memory over layers and key-value heads (memory heads).

Every layer l and key-value head k keeps its own number n_lk of tokens. A bank stores Σ n_lk keys
and values of a reference, and no padding. If all n_lk are equal, that is an array `(L, …, K, P,
H)`,
through whose first axis a scan over layers runs. Otherwise it is a flat array `(1, …, 1, S, H)` of
the S = Σ n_lk slots, ordered by layer, then head, then token: the same axes, so that whatever moves
memories need not know. The model lays it out by groups of consecutive layers: each group is a scan
of its own, padded to the largest count of its layers; a group without slots reads no memories.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from ml_collections import ConfigDict

from m3jax.config import HeadGroup, slot_counts
from m3jax.model.attention_mask import ExplicitMemory

GROUPS = 8  # most groups of layers; each is compiled on its own


class Group(NamedTuple):
    """Holds a range [low, high) of memory layers that are scanned together, and their slots P."""

    low: int
    high: int
    slots: int

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.high - self.low


@dataclasses.dataclass(frozen=True)
class SlotLayout:
    """Maps slots of a memory to layers and key-value heads.

    Attributes:
      counts: number of slots n_lk of every memory layer (outer) and key-value head.
    """

    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: ConfigDict, memory: ConfigDict) -> SlotLayout:
        """Returns the layout of the config sections `model` and `memory`."""
        return cls(tuple(map(tuple, slot_counts(model, memory).tolist())))

    @property
    def counts_LK(self) -> Int[np.ndarray, "L K"]:
        """Counts as an array."""
        return np.array(self.counts)

    @property
    def size(self) -> int:
        """Number S of slots over all layers and heads."""
        return int(self.counts_LK.sum())

    @property
    def largest(self) -> int:
        """Largest number P of slots of a layer and head."""
        return int(self.counts_LK.max())

    @property
    def uniform(self) -> bool:
        """Returns True if all heads of all memory layers have the same number of slots."""
        return int(self.counts_LK.min()) == self.largest

    @property
    def item_shape(self) -> tuple[int, int, int]:
        """Axes (L, K, P) of a memory's keys: (1, 1, S) unless the layout is uniform."""
        L, K = self.counts_LK.shape
        return (L, K, self.largest) if self.uniform else (1, 1, self.size)

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        """At most `GROUPS` groups of consecutive layers, with the least padding.

        Another group must save a tenth of the slots that all layers need.
        """
        return _partition(self.counts_LK.max(1).tolist(), GROUPS)

    def group_counts(self, group: Group) -> Int[np.ndarray, "G K"] | None:
        """Returns the counts of a group's layers; None if all its heads fill all slots."""
        counts = self.counts_LK[group.low : group.high]
        return None if (counts == group.slots).all() else counts

    def by_group(self, memory: ExplicitMemory | None) -> list[ExplicitMemory | None]:
        """Lays memories out by group: keys and values `(layers of the group, …, K, P, H)`.

        None stands for a group without slots.
        """
        if memory is None or self.uniform:
            return [memory] * len(self.groups)
        return [
            memory._replace(keys=self._place(memory.keys, g), values=self._place(memory.values, g))
            if g.slots
            else None
            for g in self.groups
        ]

    def by_layer(self, memory: ExplicitMemory | None) -> list[ExplicitMemory | None]:
        """Lays memories out by layer, each with its own number P of slots: `(…, K, P, H)`."""
        L = len(self.counts)
        if memory is None:
            return [None] * L
        if self.uniform:
            parts = [(memory.keys[i], memory.values[i]) for i in range(L)]
            return [ExplicitMemory(*part, memory.length) for part in parts]
        heads = tuple(range(len(self.counts[0])))
        groups = [HeadGroup(heads, max(row)) for row in self.counts]
        return [
            memory._replace(
                keys=self.of_heads(memory.keys, i, g), values=self.of_heads(memory.values, i, g)
            )
            if g.slots
            else None
            for i, g in enumerate(groups)
        ]

    def of_heads(self, x: Array, layer: int, group: HeadGroup) -> Array:
        """Returns the part of keys or values `(L or 1, …, K or 1, P or S, H)` that belongs to a
        group of heads of memory layer `layer`: `(…, K, P, H)` with the K and P of the group.

        Slots that a head does not have are zeros.
        """
        if self.uniform:
            return x[layer]
        counts = self.counts_LK.ravel()
        ends = np.cumsum(counts).reshape(self.counts_LK.shape)[layer]
        parts = []
        for head in group.heads:
            count = self.counts[layer][head]
            part = x[0, ..., 0, int(ends[head]) - count : int(ends[head]), :]
            missing = (0, group.slots - count)
            parts.append(jnp.pad(part, [*[(0, 0)] * (part.ndim - 2), missing, (0, 0)]))
        return jnp.stack(parts, axis=-3)

    def padded(self, x: Array) -> Array:
        """Lays keys or values `(L or 1, …, K or 1, P or S, H)` out as `(L, …, K, P, H)`.

        P is the largest count; slots that a head does not have are zeros.
        """
        return x if self.uniform else self._place(x, Group(0, len(self.counts), self.largest))

    def flatten(self, parts: Sequence[Array]) -> Array:
        """Joins keys or values `(layers, R, K, P, H)` of the groups that have slots.

        Returns `(L, R, K, P, H)` if the layout is uniform, else `(1, R, 1, S, H)`: the inverse of
        `by_group`.
        """
        if self.uniform:
            return parts[0]
        flat = []
        for group, x in zip((g for g in self.groups if g.slots), parts, strict=True):
            rows = jnp.moveaxis(x, 0, 1)
            rows = rows.reshape(len(rows), -1, rows.shape[-1])
            real = np.arange(group.slots) < self.counts_LK[group.low : group.high, :, None]
            flat.append(jnp.take(rows, np.flatnonzero(real), axis=1))
        return jnp.concatenate(flat, axis=1)[None, :, None]

    def stack(self, parts: Sequence[Array | None]) -> Array:
        """Joins arrays `(layers, …, P)` of all groups to `(L, …, largest)`, padded with zeros.

        None stands for a group without slots.
        """
        some = next(x for x in parts if x is not None)
        padded = []
        for group, x in zip(self.groups, parts, strict=True):
            if x is None:
                x = jnp.zeros((group.layers, *some.shape[1:-1], 0), some.dtype)
            more = self.largest - x.shape[-1]
            padded.append(jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, more)]))
        return jnp.concatenate(padded)

    def in_counts(self, lengths: Int[np.ndarray, " R"]) -> Bool[np.ndarray, "R L K largest"]:
        """Returns the mask of slots that hold a token; arguments as in `real`."""
        slot = np.arange(self.largest)
        return (slot < self.counts_LK[..., None]) & (
            slot < np.asarray(lengths)[:, None, None, None]
        )

    def real(self, lengths: Int[np.ndarray, " R"]) -> Bool[np.ndarray, "R L K P"]:
        """Returns the mask of slots that hold a token, in the axes of `item_shape`.

        Args:
          lengths: number of tokens of each reference, or `largest` if that is less.
        """
        real = self.in_counts(lengths)
        if self.uniform:
            return real
        has = np.arange(self.largest) < self.counts_LK[..., None]
        return real[:, has][:, None, None]

    def _place(self, flat: Array, group: Group) -> Array:
        """Lays `(1, …, 1, S, H)` out as `(layers of the group, …, K, group.slots, H)`."""
        counts = self.counts_LK.ravel()
        starts = (np.cumsum(counts) - counts).reshape(self.counts_LK.shape)[group.low : group.high]
        slot = np.arange(group.slots)
        source = np.where(
            slot < self.counts_LK[group.low : group.high, :, None],
            starts[..., None] + slot,
            self.size,  # the zeros appended below
        )
        x = flat[0, ..., 0, :, :]
        padded = jnp.concatenate([x, jnp.zeros((*x.shape[:-2], 1, x.shape[-1]), x.dtype)], axis=-2)
        placed = jnp.take(padded, source.ravel(), axis=-2)
        placed = placed.reshape(*x.shape[:-2], *source.shape, x.shape[-1])
        return jnp.moveaxis(placed, -4, 0)


def _partition(largest: list[int], most: int) -> tuple[Group, ...]:
    """Splits layers with these numbers of slots into at most `most` groups, with least padding."""
    L = len(largest)
    toll = 0.1 * sum(largest)
    # best[n][i]: cost of the first i layers in n groups, and where the last group begins
    best: list[list[tuple[float, int]]] = [[(0.0, 0)] + [(np.inf, 0)] * L]
    for _ in range(most):
        row = [(np.inf, 0)]
        for end in range(1, L + 1):
            row.append(
                min(
                    (best[-1][low][0] + (end - low) * max(largest[low:end]) + toll, low)
                    for low in range(end)
                )
            )
        best.append(row)
    n = min(range(1, most + 1), key=lambda n: best[n][L][0])
    groups, end = [], L
    while end:
        low = best[n][end][1]
        groups.append(Group(low, end, max(largest[low:end])))
        n, end = n - 1, low
    return tuple(reversed(groups))
