"""The config of a run: an `ml_collections.ConfigDict` of the fields in `m3jax.config.fields`.

A file in `configs/` calls `default()`, changes fields and returns the result; `validate` refuses
what cannot work before anything is allocated.
"""

from __future__ import annotations

import json
import textwrap

from ml_collections import ConfigDict as ConfigDict

from m3jax.config.alignment import use_alignment_settings as use_alignment_settings
from m3jax.config.checks import IN_STEP as IN_STEP
from m3jax.config.checks import PACKED as PACKED
from m3jax.config.checks import flatten as flatten
from m3jax.config.checks import validate as validate
from m3jax.config.fields import FIELDS
from m3jax.config.heads import format_heads as format_heads
from m3jax.config.heads import memory_heads as memory_heads
from m3jax.config.heads import parse_heads as parse_heads
from m3jax.config.heads import stored_heads as stored_heads
from m3jax.config.options import parse_options as parse_options
from m3jax.errors import ConfigError

# The constant prefix `<s>Reference:` as tokens; m3jax.text.tokenizer reserves these entries.
PREFIX_TOKENS = (1, 2)


def default() -> ConfigDict:
    """Returns a config with every field at its default, locked against unknown fields."""
    config = ConfigDict()
    for path, (value, _, _) in FIELDS.items():
        node, *rest = path.split(".")
        if rest:
            if node not in config:
                config[node] = ConfigDict()
            config[node][rest[0]] = value
        else:
            config[node] = value
    return config.lock()


def describe(section: str = "") -> str:
    """Describes all fields of a section, or of all: default, accepted values, meaning with unit.

    Raises:
      ConfigError: there is no such section.
    """
    chosen = {path: field for path, field in FIELDS.items() if section in ("", _section(path))}
    if not chosen:
        known = dict.fromkeys(filter(None, map(_section, FIELDS)))
        raise ConfigError(f"{section} is no section of the config; known: {', '.join(known)}")
    lines: list[str] = []
    before = ""
    for path, (value, meaning, accepted) in chosen.items():
        if _section(path) != before:
            lines.append("")
            before = _section(path)
        accepted = (False, True) if isinstance(value, bool) else accepted
        choices = " | ".join(map(repr, accepted)) if isinstance(accepted, tuple) else accepted
        lines.append(f"{path} = {value!r}" + (f"    accepts {choices}" if choices else ""))
        lines.append(textwrap.indent(textwrap.fill(meaning, 96), " " * 4))
    return "\n".join(lines).strip()


def _section(path: str) -> str:
    return path.rpartition(".")[0]


def with_epochs(config: ConfigDict, rows: int) -> ConfigDict:
    """Returns the config with the steps, and warmup steps, of `train.epochs` passes over `rows`."""
    if not config.train.epochs:
        return config
    resolved = ConfigDict(config.to_dict())
    steps = max(1, round(config.train.epochs * rows / config.data.batch_size))
    share = config.optimizer.lr_warmup_share
    rise = round(share * steps) if share else config.optimizer.lr_warmup_steps
    resolved.train.steps, resolved.optimizer.lr_warmup_steps = steps, min(rise, steps)
    return validate(resolved).lock()


def uses_prefix(config: ConfigDict) -> bool:
    """Returns True where rows of this stage begin with the constant prefix."""
    return config.model.prefix == "always" or config.memory.source != "none"


def prefix_tokens(config: ConfigDict) -> tuple[int, ...]:
    """Returns the prefix of this stage's rows; references always have `PREFIX_TOKENS`."""
    return PREFIX_TOKENS if uses_prefix(config) else ()


def to_json(config: ConfigDict) -> str:
    """Writes the config as stable, readable JSON."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)


def from_json(text: str) -> ConfigDict:
    """Reads the config of `to_json`.

    Raises:
      ConfigError: it is no JSON object, or has unknown or missing fields.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not a config: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"not a config: expected a JSON object, got {text[:40]!r}")
    return validate(ConfigDict(values)).lock()
