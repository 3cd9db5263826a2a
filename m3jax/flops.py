"""Counts FLOP, parameters and bytes of training, writing and decoding from the config.

A multiplication and an addition are two FLOP. There are two kinds of counts. The **cost model**
(Memory³ §2 and appendix) follows the paper's formulas for the cost of a full-length reference in
each of the three formats of knowledge: parameters, explicit memory, text. The **useful work** of
the programs of m3jax (`train_step`, `writer`, `decode_step`) counts only the matrix products that
the method needs: causal attention exactly, no recomputation, no masked or padded work, no norms,
softmaxes or optimizer. Model FLOPs utilisation is `train_step(config) / (seconds · devices ·
peak)`. XLA's own cost analysis is no alternative: it counts a loop once and custom kernels as 0.

Widths: D hidden, N·H all query heads, K·H all key-value heads, F MLP.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from m3jax.config import PREFIX_TOKENS, head_groups, slot_counts, stored_slots


# -- parameters ------------------------------------------------------------------------------------
class Parameters(NamedTuple):
    """Numbers of parameters; `non_embedding` excludes the embedding and the LM head."""

    non_embedding: int
    total: int


def parameters(config: ConfigDict) -> Parameters:
    """Counts parameters: L(2D² + 2·D·H·K + 3DF) for N·H = D, and norms, biases and tables."""
    model = config.model
    biases = _query_width(config) + 2 * _kv_width(config) if model.attention_bias else 0
    norms = 2 * model.hidden + (2 * model.head_dim if model.qk_norm else 0)
    layer = _layer_weights(config) + biases + norms
    non_embedding = model.layers * layer + model.hidden
    tables = 1 if model.tied_embeddings else 2
    return Parameters(non_embedding, non_embedding + tables * model.vocabulary * model.hidden)


def _query_width(config: ConfigDict) -> int:
    return config.model.query_heads * config.model.head_dim


def _kv_width(config: ConfigDict) -> int:
    return config.model.kv_heads * config.model.head_dim


def _slot_width(config: ConfigDict) -> int:
    """Returns the summed width of the query heads that read them, over all slots of a memory."""
    groups = config.model.query_heads // config.model.kv_heads
    return stored_slots(config.model, config.memory) * groups * config.model.head_dim


def _encoded_tokens(config: ConfigDict) -> int:
    """Counts the tokens that a reference is encoded with: twice its own with a copy behind it."""
    copies = 2 if config.memory.selection == "reconstruction" else 1
    return copies * config.memory.reference_length


def _projection_weights(config: ConfigDict) -> int:
    """Counts the weights of one layer's query, key, value and output projections."""
    return 2 * config.model.hidden * (_query_width(config) + _kv_width(config))


def _mlp_weights(config: ConfigDict) -> int:
    return 3 * config.model.hidden * config.model.mlp_width


def _layer_weights(config: ConfigDict) -> int:
    return _projection_weights(config) + _mlp_weights(config)


# -- the paper's cost model ------------------------------------------------------------------------
def implicit_write(config: ConfigDict) -> float:
    """Counts FLOP to train once on a reference: a lower bound of storing it in the parameters."""
    model, length = config.model, config.memory.reference_length
    layer = length * _layer_weights(config)
    layer += 2 * length * (config.data.sequence_length / 2) * _query_width(config)
    return 6 * (model.layers * layer + length * model.vocabulary * model.hidden)


def explicit_write(config: ConfigDict) -> float:
    """Counts FLOP to write one explicit memory: the layers up to the last memory layer, of which
    the MLP is not computed."""
    length, width = _encoded_tokens(config), _query_width(config)
    layers = config.memory.first_layer + config.memory.layers
    attention = layers * (length * _projection_weights(config) + length**2 * width)
    selection = config.memory.layers * length * config.memory.reference_length * width
    return 2.0 * (attention + (layers - 1) * length * _mlp_weights(config) + selection)


def explicit_read(config: ConfigDict) -> float:
    """Counts FLOP for one chunk to attend to one explicit memory."""
    return 2.0 * 2 * config.memory.chunk_length * _slot_width(config)


def text_read(config: ConfigDict) -> float:
    """Counts FLOP for a chunk to read a reference as text in the context, as RAG does."""
    model, memory = config.model, config.memory
    length = memory.reference_length
    keys = length / 2 + memory.chunk_length
    layer = length * _projection_weights(config) + 2 * length * keys * _query_width(config)
    return 2 * (model.layers * layer + (model.layers - 1) * length * _mlp_weights(config))


def usage_interval(config: ConfigDict) -> tuple[float, float]:
    """Returns the range (low, high) of uses of a reference in which explicit memory is cheapest.

    For fewer uses, reading it as text is cheaper; for more, training it into the parameters.
    """
    write, read = explicit_write(config), explicit_read(config)
    return write / (text_read(config) - read), (implicit_write(config) - write) / read


def row_generation(config: ConfigDict, tokens: int = 256) -> float:
    """Counts FLOP of all layers, without LM head and memories, for a row of `tokens` tokens."""
    attention = 2 * tokens * (tokens / 2) * _query_width(config)
    return 2 * config.model.layers * (tokens * _layer_weights(config) + attention)


def prompt_read_share(config: ConfigDict, tokens: int = 256) -> float:
    """Returns the FLOP of reading all memories of a row, as a fraction of `row_generation`."""
    memories = tokens // config.memory.chunk_length * config.memory.per_prompt_chunk
    return memories * explicit_read(config) / row_generation(config, tokens)


# -- storage ---------------------------------------------------------------------------------------
def memory_bytes(config: ConfigDict, bytes_per_vector: float | None = None) -> float:
    """Counts the bytes of one explicit memory that fills all its slots.

    Args:
      config: a validated config.
      bytes_per_vector: bytes of one key or value vector; default H numbers of `memory.dtype`. The
        paper's vector quantizer uses 14 bytes.
    """
    memory, model = config.memory, config.model
    if bytes_per_vector is None:
        bytes_per_vector = model.head_dim * jnp.dtype(memory.dtype).itemsize
    return 2 * stored_slots(model, memory) * bytes_per_vector


def full_memory_bytes(config: ConfigDict) -> float:
    """Counts the bytes of keys and values of a reference without any sparsity: those of every
    layer, query head and token."""
    vector = config.model.head_dim * jnp.dtype(config.memory.dtype).itemsize
    heads = config.model.layers * config.model.query_heads
    return 2 * heads * config.memory.reference_length * vector


# -- useful work of our programs -------------------------------------------------------------------
def train_step(config: ConfigDict) -> float:
    """Counts the useful FLOP of an optimizer step: the forward pass, and twice that for backward.

    Recomputation (`model.remat`) and accumulation (`train.microbatches`) add no useful work.
    Memories that `memory.dropout` hides count as read, since the kernels compute them. In online
    training the selection of tokens has no gradient: its scores, and the reference queries of the
    last memory layer, which only the selection uses, count in the forward pass alone. With
    `memory.source = stop_gradient` this holds for all of the encoding.
    """
    references = _row_references(config)
    total = 3 * _context_forward(config)
    if config.memory.source == "online":
        total += 3 * writer(config, references) - 2 * _selection(config, references)
    if config.memory.source == "stop_gradient":
        total += writer(config, references)
    return total


def writer(config: ConfigDict, references: int) -> float:
    """Counts FLOP to write the memories of `references` references of full length.

    Counts the layers up to the last memory layer, and of that one only keys, values and the
    selection of tokens.
    """
    model, memory = config.model, config.memory
    length, width = _encoded_tokens(config), _query_width(config)
    before_last = memory.first_layer + memory.layers - 1
    pairs = length * (length + 1) // 2 + length * len(PREFIX_TOKENS)
    layer = length * _layer_weights(config) + 2 * pairs * width
    last = length * model.hidden * 2 * _kv_width(config)
    selection = _selection(config, references)
    return 2.0 * references * (before_last * layer + last) + selection


def decode_step(config: ConfigDict, rows: int, context: int, memories: int | None = None) -> float:
    """Counts FLOP to generate one token of each row.

    Args:
      config: a validated config.
      rows: number of rows B.
      context: number of context tokens that each token attends to, itself included; the prefix is
        not counted.
      memories: number M of memories per row; default `memory.per_prompt_chunk`.
    """
    model = config.model
    weights = model.layers * _layer_weights(config) + model.hidden * model.vocabulary
    reading = _memories(config, memories) * _slot_width(config)
    attention = model.layers * context * _query_width(config) + reading
    return 2.0 * rows * (weights + 2 * attention)


def decode_bytes(config: ConfigDict, rows: int, context: int, memories: int | None = None) -> float:
    """Counts the bytes read to generate one token of each row: weights once, and keys and values.

    Arguments as in `decode_step`; all arrays are in `model.compute_dtype`.
    """
    model, memory = config.model, config.memory
    weights = model.layers * _layer_weights(config) + model.hidden * model.vocabulary
    counts = slot_counts(model, memory).tolist()
    padded = sum(len(g.heads) * g.slots for row in counts for g in head_groups(row))
    keys = model.layers * model.kv_heads * context + padded * _memories(config, memories)
    width = 2 if model.compute_dtype == "bfloat16" else 4
    return float(width * (weights + rows * keys * 2 * model.head_dim))


def _memories(config: ConfigDict, memories: int | None) -> int:
    return config.memory.per_prompt_chunk if memories is None else memories


def _row_references(config: ConfigDict) -> int:
    """Counts the references that the chunks of a batch read."""
    chunks = config.data.sequence_length // config.memory.chunk_length
    return config.data.batch_size * chunks * config.memory.per_chunk


def _context_forward(config: ConfigDict) -> float:
    """Counts FLOP of the forward pass of a batch up to the logits, without encoding references."""
    model, memory = config.model, config.memory
    rows, tokens = config.data.batch_size, config.data.sequence_length
    with_memory = memory.source != "none"
    prefix_tokens = len(PREFIX_TOKENS) if with_memory or model.prefix == "always" else 0
    pairs = tokens * (tokens + 1) // 2 + tokens * prefix_tokens  # causal triangle, prefix
    weights = model.layers * _layer_weights(config) + model.hidden * model.vocabulary
    attention = 2 * model.layers * pairs * _query_width(config)
    if with_memory:
        attention += 2 * _memory_pairs(config, tokens) * _slot_width(config)
    return 2.0 * rows * (tokens * weights + attention)


def _memory_pairs(config: ConfigDict, tokens: int) -> int:
    """Counts (query, memory) pairs of a row: chunk c reads the memories of min(c + 1, window)
    chunks."""
    memory = config.memory
    chunks = tokens // memory.chunk_length
    window = min(chunks, memory.window)
    reads = chunks * window - window * (window - 1) // 2
    return reads * memory.chunk_length * memory.per_chunk


def _selection(config: ConfigDict, references: int) -> float:
    """Counts FLOP of the selection of tokens: scores in every memory layer, and the query
    projection of the last one, which only the selection uses.

    Scores are those of all pairs of a reference's tokens; with `memory.selection = reconstruction`
    those of the copy, which attends causally, and with `memory.each` both.
    """
    memory, width = config.memory, _query_width(config)
    length, queries = memory.reference_length, memory.reference_length
    pairs = length**2
    if memory.selection == "reconstruction":
        own = pairs if memory.each else 0
        pairs = own + length * (length + len(PREFIX_TOKENS)) + length * (length + 1) // 2
        queries = (2 if memory.each else 1) * length
    scores = memory.layers * pairs * width
    return 2.0 * references * (scores + queries * config.model.hidden * width)
