"""Checks of a config: fields, types, accepted values, and fields that depend on each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from m3jax.config.fields import FIELDS, RENAMED
from m3jax.config.heads import memory_heads
from m3jax.errors import ConfigError

# Values of memory.source with which references are encoded in the step.
IN_STEP = ("online", "stop_gradient")

# Values of data.packing with several texts in a row that do not see each other.
PACKED = ("chats", "pairs")


class Rule(NamedTuple):
    """A condition on fields that depend on each other.

    Attributes:
      path: the field that the message names with its value.
      holds: whether a config meets the condition.
      why: the remedy; `{section.field}` stands for a value.
    """

    path: str
    holds: Callable[[ConfigDict], bool]
    why: str


def _of_pairs(path: str, why: str) -> Rule:
    """Makes the rule of a field that must be 0 where rows hold preference pairs."""
    section, field = path.split(".")
    return Rule(
        path,
        lambda c: c.data.packing != "pairs" or c[section][field] == 0,
        f"must be 0 with data.packing = 'pairs': {why}",
    )


def _marker(role: str) -> Rule:
    others = [name for name in ("user", "assistant", "system") if name != role]
    return Rule(
        f"chat.{role}",
        lambda c: c.chat[role] not in ("", *(c.chat[name] for name in others)),
        "the markers of users and assistants must be there and differ from the others",
    )


def _refreshed(path: str) -> Rule:
    """Makes the rule that the checkpoint which wrote a version of the bank stays."""
    section, field = path.split(".")
    return Rule(
        "train.refresh_every",
        lambda c: (
            c.train.refresh_every == 0
            or (c[section][field] > 0 and c.train.refresh_every % c[section][field] == 0)
        ),
        f"must be a multiple of {path} = {{{path}}}: a checkpoint that stays writes",
    )


_SAME_READING = "the model and its base model read the same"

RULES = (
    # The shape of the model and of its memories.
    Rule(
        "model.kv_heads",
        lambda c: c.model.query_heads % c.model.kv_heads == 0,
        "must divide model.query_heads = {model.query_heads}",
    ),
    Rule("model.head_dim", lambda c: c.model.head_dim % 2 == 0, "must be even (RoPE)"),
    Rule(
        "model.previous_token_head",
        lambda c: c.model.previous_token_head == 0 or c.model.attention_bias,
        "needs model.attention_bias = True",
    ),
    Rule(
        "memory.layers",
        lambda c: c.memory.first_layer + c.memory.layers <= c.model.layers,
        "memory layers from memory.first_layer = {memory.first_layer} on do not all exist;"
        " model.layers = {model.layers}",
    ),
    Rule(
        "mesh.tensor",
        lambda c: memory_heads(c.model, c.memory) is None or c.mesh.tensor == 1,
        "must be 1 with memory.heads = {memory.heads!r}: a bank of some heads is not split by"
        " heads; or store all (memory.heads = '')",
    ),
    Rule(
        "memory.kept_tokens",
        lambda c: c.memory.kept_tokens <= c.memory.reference_length,
        "a reference has at most memory.reference_length = {memory.reference_length} tokens",
    ),
    Rule(
        "model.vocabulary",
        lambda c: c.text.vocabulary <= c.model.vocabulary,
        "must be at least text.vocabulary = {text.vocabulary}",
    ),
    # Writing and finding references.
    Rule(
        "writer.document_context",
        lambda c: not c.writer.document_context or c.memory.source not in IN_STEP,
        "online memories are encoded without their document; use memory.source = 'precomputed', or"
        " writer.document_context = False",
    ),
    Rule(
        "writer.document_context_tokens",
        lambda c: (
            not c.writer.document_context
            or c.writer.document_context_tokens >= 2 * c.memory.reference_length
        ),
        "holds less than two references of memory.reference_length = {memory.reference_length}"
        " tokens; raise it, or set writer.document_context = False",
    ),
    Rule(
        "knowledge.enabled",
        lambda c: not (c.knowledge.enabled and c.retrieval.ids == "stored"),
        "documents name references (retrieval.ids = 'stored') that the selection may drop; set"
        " retrieval.ids = 'search'",
    ),
    Rule(
        "retrieval.candidates",
        lambda c: c.retrieval.candidates >= max(c.memory.per_chunk, c.memory.per_prompt_chunk),
        "must be at least memory.per_chunk and memory.per_prompt_chunk",
    ),
    Rule(
        "retrieval.encoder",
        lambda c: (c.retrieval.embedder == "bert") == bool(c.retrieval.encoder),
        "names the encoder's folder with retrieval.embedder = 'bert' and is empty with others;"
        " it is {retrieval.embedder!r}",
    ),
    Rule(
        "retrieval.checkpoint",
        lambda c: c.retrieval.embedder in ("model", "attention") or not c.retrieval.checkpoint,
        "is read by retrieval.embedder = 'model' and 'attention' only; it is"
        " {retrieval.embedder!r}",
    ),
    Rule(
        "retrieval.rerank",
        lambda c: c.retrieval.embedder == "attention" or not c.retrieval.rerank,
        "needs retrieval.embedder = 'attention'; it is {retrieval.embedder!r}",
    ),
    Rule(
        "retrieval.layer",
        lambda c: c.retrieval.layer <= c.model.layers,
        "is above model.layers = {model.layers}",
    ),
    # Chats and preference pairs.
    _marker("user"),
    _marker("assistant"),
    _of_pairs("memory.dropout", _SAME_READING),
    _of_pairs("train.z_loss", "its loss is of whole answers"),
    _of_pairs("train.refresh_every", _SAME_READING),
    Rule(
        "optimizer.lr_warmup_share",
        lambda c: c.optimizer.lr_warmup_share == 0 or c.train.epochs > 0,
        "is a share of steps that train.epochs gives; without it set optimizer.lr_warmup_steps",
    ),
    # Rows, steps, devices.
    Rule(
        "data.sequence_length",
        lambda c: c.data.sequence_length % c.memory.chunk_length == 0,
        "must be a multiple of memory.chunk_length = {memory.chunk_length}",
    ),
    Rule(
        "train.microbatches",
        lambda c: c.data.batch_size % c.train.microbatches == 0,
        "must divide data.batch_size = {data.batch_size}",
    ),
    Rule(
        "retrieval.ids",
        lambda c: c.retrieval.ids != "stored" or c.data.packing != "concat",
        "ids stored with documents need data.packing = 'document', whose rows begin with one, or"
        " 'chats' or 'pairs'",
    ),
    Rule(
        "optimizer.lr_warmup_steps",
        lambda c: c.optimizer.lr_warmup_steps <= c.train.steps,
        "is longer than train.steps = {train.steps}",
    ),
    Rule(
        "train.refresh_every",
        lambda c: c.train.refresh_every == 0 or c.memory.source == "precomputed",
        "refreshes a bank; memory.source = {memory.source!r} reads none",
    ),
    Rule(
        "train.refresh_every",
        lambda c: c.train.refresh_every == 0 or not c.guard.on,
        "a guarded run may go back to before a refresh, to memories that are gone; set guard.on ="
        " False, or 0 here and run launch/write_bank.py --refresh=all between two calls",
    ),
    _refreshed("train.checkpoint_every"),
    _refreshed("train.keep_every"),
    Rule(
        "guard.patience",
        lambda c: 2 * c.guard.patience <= c.guard.window,
        "twice as many steps must fit into guard.window = {guard.window}",
    ),
    Rule("mesh.fsdp", lambda c: c.mesh.fsdp != 0, "must be -1 or at least 1"),
    Rule(
        "stage",
        lambda c: c.stage != "" and "/" not in c.stage,
        "names a folder of the workdir: not empty, no slash",
    ),
)


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by path, `section.field`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, (ConfigDict, Mapping))
        flat |= {f"{name}.{key}": leaf for key, leaf in value.items()} if nested else {name: value}
    return flat


def validate(config: ConfigDict) -> ConfigDict:
    """Returns the config, or raises `ConfigError` naming the field, its value and the remedy."""
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
    for path, holds, why in RULES:
        if not holds(config):
            raise ConfigError(f"config.{path} = {flat[path]!r}: {why.format_map(config)}")
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
        raise ConfigError(f"config.{path} = {value!r}; accepted: {', '.join(map(repr, accepted))}")
    if isinstance(accepted, str) and not _inside(value, accepted):
        raise ConfigError(f"config.{path} = {value!r}; accepted: {accepted} ({meaning})")


def _inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)
