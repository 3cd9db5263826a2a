"""The binding of a bank: records and compares everything that its memories depend on."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from m3jax.config import format_counts, memory_layers, parse_counts, slot_counts
from m3jax.files import checksum, json_text
from m3jax.memory.document_context import UNSTATED
from m3jax.memory.document_context import layout_entries as context_layout
from m3jax.model.slots import SlotLayout


@dataclasses.dataclass(frozen=True)
class Binding:
    """Identifies everything that a bank's memories depend on; a reader must match all of it.

    Attributes:
      writer: `writer_fingerprint` of the weights.
      tokenizer: fingerprint of the tokenizer.
      references: fingerprint of the reference set.
      layout: result of `layout_of`: the config values that the memories depend on.
    """

    writer: str
    tokenizer: str
    references: str
    layout: dict[str, Any]

    @property
    def owner(self) -> str:
        """Returns a hash of weights and layout, which identifies the codebooks of a bank."""
        return checksum(json_text([self.writer, self.layout], sort_keys=True).encode())

    def differences(self, bank: Binding) -> list[str]:
        """Describes each difference of a bank's binding from this binding, the expected one."""
        differences = []
        for part, words in (
            ("writer", "written by other weights"),
            ("tokenizer", "written with another tokenizer"),
            ("references", "written from other references"),
        ):
            ours, theirs = getattr(self, part), getattr(bank, part)
            if ours != theirs:
                differences.append(f"{words}: bank {theirs[:12]}, here {ours[:12]}")
        for name in sorted({*self.layout, *bank.layout}):
            default = UNSTATED.get(name)
            ours, theirs = self.layout.get(name, default), bank.layout.get(name, default)
            if ours != theirs:
                differences.append(f"written with {name} = {theirs!r}, here {ours!r}")
        return differences


def writer_fingerprint(params: dict[str, Any], memory: ConfigDict) -> str:
    """Hashes the weights that write memories: embedding and layers up to the last memory layer.

    Args:
      params: parameters of `Model`; the head and the layers above the memory layers are ignored.
      memory: the section `memory` of the config, which sets the range of memory layers.

    Returns:
      Hex BLAKE2b over name, dtype, shape and bytes of every array.
    """
    return weights_fingerprint(writer_params(params), f"{memory.first_layer}+{memory.layers}")


def weights_fingerprint(params: dict[str, Any], more: str = "") -> str:
    """Hashes the name, dtype, shape and bytes of every array, and the text `more` (hex BLAKE2b)."""
    total = hashlib.blake2b(digest_size=16)
    total.update(more.encode())
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        values = np.ascontiguousarray(leaf)
        total.update(f"{path} {values.dtype.name} {values.shape}\n".encode())
        total.update(values.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def writer_params(params: dict[str, Any]) -> dict[str, Any]:
    """Selects the parameters that write memories: embedding, layers up to the last memory layer."""
    return {name: params[name] for name in ("embedding", "lower", "memory") if name in params}


def slots_of(layout: dict[str, Any]) -> SlotLayout:
    """Returns the slots of a memory of a bank with this layout."""
    layers = range(layout["first_layer"], layout["first_layer"] + layout["layers"])
    kv_heads = layout["kv_heads"]
    if layout.get("counts"):
        counts = parse_counts(layout["counts"], layers, kv_heads)
    else:
        counts = np.full((len(layers), kv_heads), layout["kept_tokens"])
    return SlotLayout(tuple(map(tuple, counts.tolist())))


def layout_of(config: ConfigDict, prefix_tokens: tuple[int, ...]) -> dict[str, Any]:
    """Returns the config values and prefix tokens that memories depend on, as plain JSON."""
    model, memory = config.model, config.memory
    of_memory = "first_layer", "layers", "kept_tokens", "selection", "reference_length", "dtype"
    of_model = "query_heads", "kv_heads", "head_dim", "compute_dtype"
    floats = "rope_base", "norm_epsilon", "embedding_scale"
    scaling = {name: model[name] for name in model if name.startswith("rope_")}
    counts = slot_counts(model, memory)
    each: dict[str, Any] = {}
    if counts.min() < counts.max():
        each = {"counts": format_counts(counts, memory_layers(memory))}
    if memory.selection == "reconstruction":
        each["each"] = memory.each
    if memory.key_scale != 1:
        each["key_scale"] = float(memory.key_scale)
    return {
        **{name: memory[name] for name in of_memory},
        **{name: model[name] for name in of_model},
        **{name: float(model[name]) for name in floats},
        **(scaling if model.rope_scaling != "none" else {}),
        **({"no_rope_every": model.no_rope_every} if model.no_rope_every else {}),
        "prefix_tokens": [int(token) for token in prefix_tokens],
        **context_layout(config),
        "kept_tokens": int(counts.max()),
        **each,
    }
