"""Memory heads: how many tokens of a reference each layer and key-value head keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from m3jax.errors import ConfigError

_SAVED = 16  # fewest slots of a memory in a layer for whose sake its heads are divided


class HeadGroup(NamedTuple):
    """Key-value heads of a layer that hold their memories in one array, padded to `slots` slots."""

    heads: tuple[int, ...]
    slots: int


def head_groups(counts: Sequence[int]) -> tuple[HeadGroup, ...]:
    """Divides the heads of a layer that keep `counts` tokens into one or two groups, with the least
    padding."""
    order = sorted(range(len(counts)), key=lambda head: counts[head])
    largest = counts[order[-1]]

    def size(few: int) -> int:
        return few * counts[order[few - 1]] + (len(order) - few) * largest

    few = min(range(1, len(order) + 1), key=size)
    if len(order) * largest - size(few) < _SAVED:
        return (HeadGroup(tuple(range(len(order))), largest),)
    parts = tuple(sorted(order[:few])), tuple(sorted(order[few:]))
    return tuple(HeadGroup(part, max(counts[head] for head in part)) for part in parts)


def slot_counts(model: ConfigDict, memory: ConfigDict) -> Int[np.ndarray, "L K"]:
    """Returns the number of slots of a memory in each memory layer and key-value head.

    They are `memory.counts`, or, if that is empty, `memory.kept_tokens` for the memory heads
    (`memory.heads`) and 0 for the others.

    Args:
      model, memory: sections of a config.

    Raises:
      ConfigError: `memory.counts` or `memory.heads` is malformed, names a head outside the memory
        layers, or keeps more tokens than a reference has.
    """
    layers = memory_layers(memory)
    if memory.counts:
        return parse_counts(memory.counts, layers, model.kv_heads, memory.reference_length)
    pairs = parse_heads(memory.heads, layers, model.kv_heads)
    counts = np.full((len(layers), model.kv_heads), memory.kept_tokens)
    if pairs is not None:
        counts = np.zeros_like(counts)
        for layer, head in pairs:
            counts[layer - layers.start, head] = memory.kept_tokens
    return counts


def memory_layers(memory: ConfigDict) -> range:
    """Returns the memory layers."""
    return range(memory.first_layer, memory.first_layer + memory.layers)


def stored_slots(model: ConfigDict, memory: ConfigDict) -> int:
    """Counts the slots of a memory over all layers and key-value heads."""
    return int(slot_counts(model, memory).sum())


def largest_count(model: ConfigDict, memory: ConfigDict) -> int:
    """Returns the largest number of tokens that a layer and key-value head keeps."""
    return int(slot_counts(model, memory).max())


def parse_counts(
    text: str, layers: range, kv_heads: int, most: int | None = None
) -> Int[np.ndarray, "L K"]:
    """Parses `memory.counts`, such as "4:0+12,5:3+3", the inverse of `format_counts`.

    Args:
      text: LAYER:COUNT+COUNT+… with one count for every key-value head, separated by commas; layers
        that are not named have no memories.
      layers: the memory layers, of which row 0 of the result is the first.
      kv_heads: number K of key-value heads.
      most: largest count, `memory.reference_length`; None: any.

    Raises:
      ConfigError: the text is malformed, names a layer twice or one that is not in `layers`, a
        count is above `most`, or all counts are 0.
    """
    counts = np.zeros((len(layers), kv_heads), np.int64)
    named: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, numbers = part.partition(":")
        values = numbers.split("+")
        right = all(x.isdecimal() for x in (name, *values)) and len(values) == kv_heads
        if not right or int(name) not in layers or int(name) in named:
            raise ConfigError(
                f"config.memory.counts: {part!r} is not LAYER:COUNT+COUNT+… with {kv_heads} counts,"
                f" one for each key-value head, and memory layers {layers.start} …"
                f" {layers.stop - 1}, each at most once; launch/select_memory.py counts prints the"
                " counts of a model"
            )
        named.add(int(name))
        counts[int(name) - layers.start] = [int(value) for value in values]
    if not counts.any():
        raise ConfigError(f"config.memory.counts = {text!r}: no head keeps a token")
    if most is not None and counts.max() > most:
        raise ConfigError(
            f"config.memory.counts: a head keeps {counts.max()} tokens, but a reference has at most"
            f" memory.reference_length = {most}"
        )
    return counts


def format_counts(counts: Int[np.ndarray, "L K"], layers: range) -> str:
    """Formats counts of the layers `layers` as a value of `memory.counts`."""
    rows = zip(layers, np.asarray(counts).tolist(), strict=True)
    return ",".join(f"{layer}:{'+'.join(map(str, row))}" for layer, row in rows if any(row))


def memory_heads(model: ConfigDict, memory: ConfigDict) -> tuple[tuple[int, int], ...] | None:
    """Returns the (layer, key-value head) pairs of the heads that have memories, ascending.

    None stands for all key-value heads of the memory layers. Arguments and errors as in
    `slot_counts`.
    """
    counts = slot_counts(model, memory)
    if counts.all():
        return None
    pairs = np.argwhere(counts) + (memory.first_layer, 0)
    return tuple((int(layer), int(head)) for layer, head in pairs)


def parse_heads(text: str, layers: range, kv_heads: int) -> tuple[tuple[int, int], ...] | None:
    """Parses `memory.heads`, such as "4:0+2,5", into (layer, key-value head) pairs, ascending.

    Returns None if it is empty or names all heads of `layers`. The inverse of `format_heads`.

    Raises:
      ConfigError: the text is malformed, or names a head that is not in `layers`.
    """
    parsed = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, colon, heads = part.partition(":")
        numbers = heads.split("+") if colon else [str(head) for head in range(kv_heads)]
        right = all(number.isdecimal() for number in (name, *numbers))
        pairs = {(int(name), int(head)) for head in numbers} if right else {(-1, 0)}
        if not all(layer in layers and head < kv_heads for layer, head in pairs):
            raise ConfigError(
                f"config.memory.heads = {text!r}: {part!r} is not LAYER:HEAD+HEAD or LAYER with"
                f" memory layers {layers.start} … {layers.stop - 1} and heads 0 … {kv_heads - 1}"
            )
        parsed |= pairs
    return None if len(parsed) in (0, len(layers) * kv_heads) else tuple(sorted(parsed))


def format_heads(pairs: Iterable[tuple[int, int]]) -> str:
    """Formats (layer, key-value head) pairs as a value of `memory.heads`."""
    ordered = sorted(set(pairs))
    layers = {layer: [str(h) for at, h in ordered if at == layer] for layer, _ in ordered}
    return ",".join(f"{layer}:{'+'.join(heads)}" for layer, heads in layers.items())
