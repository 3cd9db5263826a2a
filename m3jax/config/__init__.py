"""The config of a run: an `ml_collections.ConfigDict` of the fields in `m3jax.config.fields`.

A file in `configs/` calls `default()`, changes fields and returns the result; `validate` refuses a
config that cannot work before anything is allocated.
"""

from __future__ import annotations

import json
from typing import Any

from ml_collections import ConfigDict as ConfigDict

from m3jax.config.checks import IN_STEP as IN_STEP
from m3jax.config.checks import PACKED as PACKED
from m3jax.config.checks import flatten as flatten
from m3jax.config.checks import validate as validate
from m3jax.config.fields import SECTIONS
from m3jax.config.heads import HeadGroup as HeadGroup
from m3jax.config.heads import format_counts as format_counts
from m3jax.config.heads import format_heads as format_heads
from m3jax.config.heads import head_groups as head_groups
from m3jax.config.heads import largest_count as largest_count
from m3jax.config.heads import memory_heads as memory_heads
from m3jax.config.heads import memory_layers as memory_layers
from m3jax.config.heads import parse_counts as parse_counts
from m3jax.config.heads import parse_heads as parse_heads
from m3jax.config.heads import slot_counts as slot_counts
from m3jax.config.heads import stored_slots as stored_slots
from m3jax.errors import ConfigError

# The constant prefix `<s>Reference:` as tokens; m3jax.text.tokenizer reserves these entries.
PREFIX_TOKENS = (1, 2)


def default() -> ConfigDict:
    """Returns a config with every field at its default, locked against unknown fields."""
    values: dict[str, Any] = {}
    for section, (_, fields) in SECTIONS.items():
        defaults = {name: value for name, (value, _, _) in fields.items()}
        values |= {section: defaults} if section else defaults
    return ConfigDict(values).lock()


def parse_options(text: str, **accepted: Any) -> dict[str, Any]:
    """Parses the options of a config file, the TEXT of `--config=file.py:TEXT`.

    Args:
      text: comma-separated words, `name=value` or a bare value of one of the options.
      **accepted: for each option a tuple: its default, then its other values.

    Returns:
      The chosen value of every option, of the same type as its default.

    Raises:
      ConfigError: an unknown or ambiguous option or value; the message lists the accepted values.
    """
    chosen = {name: values[0] for name, values in accepted.items()}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = word.rpartition("=")
        matches = [
            (option, choice)
            for option, choices in accepted.items()
            for choice in choices
            if str(choice) == value and name in ("", option)
        ]
        if len(matches) != 1:
            listed = "; ".join(f"{o}={'|'.join(map(str, c))}" for o, c in accepted.items())
            raise ConfigError(f"config option {word!r} is unknown or ambiguous; accepted: {listed}")
        chosen.update(matches)
    return chosen


def use_alignment_settings(config: ConfigDict) -> None:
    """Sets the fields of `config.stage`, sft or dpo, to the values that Memory³ §7 states.

    For DPO the paper states only the peak learning rate and β; batch size, warmup, weight decay and
    the single epoch are choices made here.
    """
    sft = config.stage == "sft"
    config.data.update(packing="chats" if sft else "pairs", batch_size=512)
    config.preference.beta = 0.01
    config.optimizer.update(schedule="cosine", learning_rate=5e-5 if sft else 4e-6)
    config.optimizer.update(lr_warmup_share=0.1, lr_warmup_steps=0, weight_decay=0.1)
    config.train.update(epochs=3.0 if sft else 1.0, microbatches=1)


def with_epochs(config: ConfigDict, rows: int) -> ConfigDict:
    """Returns the config with steps and warmup steps for `train.epochs` passes over `rows` rows.

    Without `train.epochs` it is returned unchanged. Raises `ConfigError` if the result is invalid.
    """
    if not config.train.epochs:
        return config
    resolved = ConfigDict(config.to_dict())
    steps = max(1, round(config.train.epochs * rows / config.data.batch_size))
    share = config.optimizer.lr_warmup_share
    rise = round(share * steps) if share else config.optimizer.lr_warmup_steps
    resolved.train.steps, resolved.optimizer.lr_warmup_steps = steps, min(rise, steps)
    return validate(resolved).lock()


def prefix_tokens(config: ConfigDict) -> tuple[int, ...]:
    """Returns the prefix of the stage's rows, or (); references always have `PREFIX_TOKENS`."""
    begins = config.model.prefix == "always" or config.memory.source != "none"
    return PREFIX_TOKENS if begins else ()


def to_json(config: ConfigDict) -> str:
    """Returns the config as JSON, indented and with sorted keys."""
    return json.dumps(
        config.to_dict(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False
    )
