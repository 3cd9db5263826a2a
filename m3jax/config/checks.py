"""Checks of a config: fields, types, accepted values, and fields that depend on each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3jax.config.fields import FIELDS
from m3jax.config.heads import slot_counts
from m3jax.config.renamed import REMOVED_VALUES, RENAMED
from m3jax.errors import ConfigError

# Values of memory.source with which references are encoded in the step.
IN_STEP = ("online", "stop_gradient")

# Folders of a workdir, which no stage may be named like.
WORKDIR_FOLDERS = (
    *("tokenizer", "clean", "corpus", "selection", "references", "index", "bank", "versions"),
    *("chats", "pairs", "report", "text", "lock"),
)

# Values of data.packing with several texts in a row that do not attend to each other.
PACKED = ("chats", "pairs")


Unfit = Iterator[tuple[str, str]]  # (field that does not fit other fields, remedy)


def _shape(c: ConfigDict) -> Unfit:
    """Checks the shape of the model and of its memories."""
    model, memory = c.model, c.memory
    if model.query_heads % model.kv_heads:
        yield "model.kv_heads", f"must divide model.query_heads = {model.query_heads}"
    if model.rope_high_rotations <= model.rope_low_rotations:
        yield "model.rope_high_rotations", "must be above model.rope_low_rotations"
    if model.rope_magnitude != 1 and model.rope_scaling != "yarn":
        yield "model.rope_magnitude", "must be 1 unless model.rope_scaling = 'yarn'"
    if model.head_dim % 2:
        yield "model.head_dim", "must be even (RoPE)"
    if model.previous_token_head and not model.attention_bias:
        yield "model.previous_token_head", "needs model.attention_bias = True"
    if model.previous_token_head and model.no_rope_every == 1:
        yield "model.previous_token_head", "needs RoPE in the first layer (model.no_rope_every)"
    if memory.first_layer + memory.layers > model.layers:
        yield (
            "memory.layers",
            f"memory layers from memory.first_layer = {memory.first_layer} on do not all exist;"
            f" model.layers = {model.layers}",
        )
    else:
        counts = slot_counts(model, memory)
        if counts.min() < counts.max() and c.mesh.tensor != 1:
            yield (
                "mesh.tensor",
                "must be 1 unless all heads keep the same number of tokens: a bank of other counts"
                " is not split by heads (memory.counts = '' and memory.heads = '' keep the same)",
            )
        if memory.each and (memory.selection != "reconstruction" or memory.each > counts.max()):
            yield (
                "memory.each",
                f"is read with memory.selection = 'reconstruction' and is at most the largest count"
                f" of a head, {counts.max()}",
            )
    if memory.counts and memory.heads:
        yield "memory.heads", "must be empty with memory.counts, which names the heads, too"
    length = f"memory.reference_length = {memory.reference_length} tokens"
    if memory.kept_tokens > memory.reference_length:
        yield "memory.kept_tokens", f"a reference has at most {length}"
    if c.writer.compression == "vector" and model.head_dim % 8:
        why = f"divides vectors into eighths; model.head_dim = {model.head_dim} is no multiple of 8"
        yield "writer.compression", why
    if c.text.vocabulary > model.vocabulary:
        yield "model.vocabulary", f"must be at least text.vocabulary = {c.text.vocabulary}"
    if c.writer.document_context and memory.selection == "reconstruction":
        yield (
            "writer.document_context",
            "a copy behind a reference does not see its document; set memory.selection ="
            " 'received', or writer.document_context = False",
        )
    if c.writer.document_context and memory.source in IN_STEP:
        yield (
            "writer.document_context",
            "online memories are encoded without their document; use memory.source ="
            " 'precomputed', or writer.document_context = False",
        )
    short = c.writer.document_context_tokens < 2 * memory.reference_length
    if c.writer.document_context and short:
        yield (
            "writer.document_context_tokens",
            f"holds less than two references of {length}; raise it, or set"
            " writer.document_context = False",
        )


def _search(c: ConfigDict) -> Unfit:
    """Checks retrieval: stored ids, candidates, embedder and reranking."""
    retrieval, embedder = c.retrieval, f"it is {c.retrieval.embedder!r}"
    if c.knowledge.enabled and retrieval.ids == "stored":
        yield (
            "knowledge.enabled",
            "documents name references (retrieval.ids = 'stored') that the selection may drop; set"
            " retrieval.ids = 'search'",
        )
    if c.memory.distractors >= c.memory.per_chunk and c.memory.distractors:
        yield (
            "memory.distractors",
            f"must be below memory.per_chunk = {c.memory.per_chunk}, the memories that a chunk"
            " reads: one of them is right",
        )
    if retrieval.candidates < max(c.memory.per_chunk, c.memory.per_prompt_chunk):
        yield (
            "retrieval.candidates",
            "must be at least memory.per_chunk and memory.per_prompt_chunk",
        )
    if (retrieval.embedder == "bert") != bool(retrieval.encoder):
        yield (
            "retrieval.encoder",
            "names the encoder's folder with retrieval.embedder = 'bert' and is empty with others;"
            f" {embedder}",
        )
    if retrieval.checkpoint and not retrieval.rerank:
        yield "retrieval.checkpoint", "is read with retrieval.rerank above 0 only"


def _training(c: ConfigDict) -> Unfit:
    """Checks chats, pairs, rows, steps and devices."""
    train, markers = c.train, (c.chat.user, c.chat.assistant, c.chat.system)
    for role in ("user", "assistant"):
        if not c.chat[role] or markers.count(c.chat[role]) > 1:
            why = "the markers of users and assistants must be there and differ from the others"
            yield f"chat.{role}", why
    if c.data.packing == "pairs":
        same = "must be 0 with data.packing = 'pairs': the model and its base model read the same"
        for name in ("dropout", "distractors"):
            if c.memory[name]:
                yield f"memory.{name}", same
        if train.z_loss:
            yield (
                "train.z_loss",
                "must be 0 with data.packing = 'pairs': its loss is of whole answers",
            )
        if train.refresh_every:
            yield "train.refresh_every", same
    if c.optimizer.lr_warmup_share and not train.epochs:
        why = (
            "is a share of steps that train.epochs gives; without it set optimizer.lr_warmup_steps"
        )
        yield "optimizer.lr_warmup_share", why
    if c.data.sequence_length % c.memory.chunk_length:
        why = f"must be a multiple of memory.chunk_length = {c.memory.chunk_length}"
        yield "data.sequence_length", why
    if c.data.sequence_length * c.data.batch_size > _largest("data.batch_size"):
        why = f"rows of data.sequence_length = {c.data.sequence_length} tokens exceed int32"
        yield "data.batch_size", why
    if c.data.batch_size % train.microbatches:
        yield "train.microbatches", f"must divide data.batch_size = {c.data.batch_size}"
    if c.data.batch_size % c.data.shares:
        yield "data.shares", f"must divide data.batch_size = {c.data.batch_size}"
    if c.data.shares > 1 and c.data.packing in PACKED:
        yield "data.shares", f"must be 1 with data.packing = {c.data.packing!r}"
    if c.retrieval.ids == "stored" and c.data.packing == "concat":
        yield (
            "retrieval.ids",
            "ids stored with documents need data.packing = 'document', whose rows begin with one,"
            " or 'chats' or 'pairs'",
        )
    if c.optimizer.lr_warmup_steps > train.steps:
        yield "optimizer.lr_warmup_steps", f"is longer than train.steps = {train.steps}"
    if 2 * c.guard.patience > c.guard.window:
        yield "guard.patience", f"twice as many steps must fit into guard.window = {c.guard.window}"
    if c.mesh.fsdp == 0:
        yield "mesh.fsdp", "must be -1 or at least 1"
    name = c.stage
    if name.casefold() in WORKDIR_FOLDERS:
        yield "stage", f"a workdir has a folder {name.casefold()} for other things; name it else"
    if not name.isprintable() or set(name) & set("/\\") or name.strip(". ") != name or not name:
        yield (
            "stage",
            "names a folder of the workdir: not empty, no slash and no control character, no blank"
            " or dot at either end",
        )


def _refresh(c: ConfigDict) -> Unfit:
    """Checks that a run can refresh its bank, with a checkpoint that is kept afterwards."""
    if c.train.refresh_every == 0:
        return
    if c.retrieval.rerank:
        why = "must be 0 with train.refresh_every: the bank's writer changes in the run"
        yield "retrieval.rerank", why
    if c.memory.source != "precomputed":
        yield (
            "train.refresh_every",
            f"refreshes a bank; memory.source = {c.memory.source!r} reads none",
        )
    if c.guard.on:
        yield (
            "train.refresh_every",
            "a guarded run may go back to before a refresh, to memories that are gone; set guard.on"
            " = False, or 0 here and run launch/write_bank.py --refresh=all between two calls",
        )
    for name in ("checkpoint_every", "keep_every"):
        every = c.train[name]
        if every == 0 or c.train.refresh_every % every:
            why = f"must be a multiple of train.{name} = {every}: a checkpoint that stays writes"
            yield "train.refresh_every", why


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a config by path, `section.field`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, (ConfigDict, Mapping))
        flat |= {f"{name}.{key}": leaf for key, leaf in value.items()} if nested else {name: value}
    return flat


def validate(config: ConfigDict) -> ConfigDict:
    """Returns the config if it is valid; else raises `ConfigError` with field, value and remedy."""
    flat = flatten(config)
    for path in flat:
        if path in RENAMED:
            raise ConfigError(f"config.{path} is now config.{RENAMED[path]}")
        if path not in FIELDS:
            section = path.partition(".")[0] + "."
            known = [name for name in FIELDS if name.startswith(section)] or list(FIELDS)
            raise ConfigError(f"config.{path} is not a field; known: {', '.join(known)}")
    for path in FIELDS:
        if path not in flat:
            raise ConfigError(f"config.{path} is missing; start from m3jax.config.default()")
        _check_field(path, flat[path])
    unfit = itertools.chain(_shape(config), _search(config), _training(config), _refresh(config))
    for path, why in unfit:
        raise ConfigError(f"config.{path} = {flat[path]!r}: {why}")
    return config


def _check_field(path: str, value: Any) -> None:
    initial, meaning, accepted = FIELDS[path]
    kind = type(initial)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number if kind is float else type(value) is kind):
        raise ConfigError(
            f"config.{path} = {value!r} has type {type(value).__name__}; expected {kind.__name__}"
            f" ({meaning})"
        )
    if isinstance(accepted, tuple) and value not in accepted:
        instead = REMOVED_VALUES.get(path, {}).get(value, "")
        listed = ", ".join(map(repr, accepted)) + (instead and f"; {instead}")
        raise ConfigError(f"config.{path} = {value!r}; accepted: {listed}")
    if isinstance(accepted, str) and not _inside(value, accepted):
        raise ConfigError(f"config.{path} = {value!r}; accepted: {accepted} ({meaning})")
    if kind is int and value > _largest(path):
        raise ConfigError(f"config.{path} = {value}; at most {_largest(path)} ({meaning})")
    if kind is float:
        with np.errstate(over="ignore", under="ignore"):
            used = float(np.float32(value))
        if abs(used) < np.finfo(np.float32).tiny:  # such numbers count as 0 on many devices
            used = 0.0
        if (value and not used) or not _inside(used, accepted):
            raise ConfigError(
                f"config.{path} = {value!r} is {used:g} in float32, in which it is used; accepted:"
                f" {accepted}, not closer to 0 than 1.2e-38 ({meaning})"
            )


def _largest(path: str) -> int:
    """Returns the largest value of a field with a whole number: sizes and steps index as int32."""
    wide = path == "seed" or path.endswith("bytes")
    return 2**64 - 1 if wide else 2**31 - 1


def _inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)
