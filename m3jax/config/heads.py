"""Memory heads: the key-value heads that have memories, as `memory.heads` names them."""

from __future__ import annotations

from collections.abc import Iterable

from ml_collections import ConfigDict

from m3jax.errors import ConfigError


def memory_heads(model: ConfigDict, memory: ConfigDict) -> tuple[tuple[int, int], ...] | None:
    """Returns the (layer, key-value head) pairs of the memory heads, ascending.

    None stands for all key-value heads of the memory layers.

    Args:
      model, memory: sections of a config.

    Raises:
      ConfigError: `memory.heads` is malformed, or names a head outside the memory layers.
    """
    layers = range(memory.first_layer, memory.first_layer + memory.layers)
    return parse_heads(memory.heads, layers, model.kv_heads)


def stored_heads(model: ConfigDict, memory: ConfigDict) -> int:
    """Counts the memory heads over all layers."""
    chosen = memory_heads(model, memory)
    return memory.layers * model.kv_heads if chosen is None else len(chosen)


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
