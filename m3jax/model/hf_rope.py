"""Conversion between RoPE in Hugging Face's `config.json` and the fields `rope_…` of
`config.model`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from m3jax.errors import HuggingFaceError

# Keys of scaled RoPE in `config.json`, by ours; a default that is None must be given.
_Numbers = dict[str, tuple[str, float | None]]
_LLAMA3: _Numbers = {
    "rope_factor": ("factor", None),
    "rope_low_rotations": ("low_freq_factor", None),
    "rope_high_rotations": ("high_freq_factor", None),
}
_YARN: _Numbers = {
    "rope_factor": ("factor", None),
    "rope_low_rotations": ("beta_slow", 1.0),
    "rope_high_rotations": ("beta_fast", 32.0),
}
_NUMBERS: dict[str, _Numbers] = {
    "linear": {"rope_factor": ("factor", None)},
    "llama3": _LLAMA3,
    "yarn": _YARN,
}
_PARTS = ("rope_parameters", "rope_scaling")  # the names in transformers 5 and before


def read_rope(path: Path, settings: dict[str, Any], base: float) -> dict[str, Any]:
    """Returns the fields `rope_…` of `config.model`, from the keys of any version of transformers.

    `base` is that of a family whose `config.json` names none.

    Raises:
      HuggingFaceError: RoPE is partial, differs between layers, or is scaled in a way that is not
        supported; a number is missing; or keys disagree about the base.
    """
    bases = {"rope_theta": settings.get("rope_theta")}
    fields: dict[str, Any] = {}
    for key in _PARTS:
        part = settings.get(key) or {}
        if not isinstance(part, dict):
            _refuse(path, key, part, "it must be an object")
        if any(isinstance(value, dict) for value in part.values()):
            _refuse(path, key, part, "all layers here have the same RoPE; choose another model")
        if part.get("partial_rotary_factor") not in (1, None):
            _refuse(path, key, part, "RoPE here turns whole heads")
        kind = part.get("rope_type") or part.get("type") or "default"
        if kind != "default":
            fields |= _scaled(path, key, kind, part, settings)
        bases[f"{key}.rope_theta"] = part.get("rope_theta")
    given = {key: _number(path, key, value) for key, value in bases.items() if value is not None}
    if len(set(given.values())) > 1:
        raise HuggingFaceError(
            f"{path} has several RoPE bases: {given}; delete all but the one it was trained with"
        )
    return {"rope_base": next(iter(given.values()), base), "rope_scaling": "none", **fields}


def read_no_rope(path: Path, settings: dict[str, Any]) -> int:
    """Returns `config.model.no_rope_every` from the keys of SmolLM3; 0 if all layers have RoPE.

    Raises `HuggingFaceError` unless the layers without RoPE are every n-th one.
    """
    layers, named = settings["num_hidden_layers"], settings.get("no_rope_layers")
    every = settings.get("no_rope_layer_interval")
    every = 4 if every is None else every
    if type(every) is not int or every < 1:
        _refuse(path, "no_rope_layer_interval", every, "it must be a whole number above 0")
    if named is not None:  # 1 is a layer with RoPE
        if not isinstance(named, list) or len(named) < layers:
            _refuse(path, "no_rope_layers", named, f"it must be a list of {layers} layers")
        named = [bool(has) for has in named[:layers]]
        every = named.index(False) + 1 if False in named else 0
        if named != [every == 0 or number % every != 0 for number in range(1, layers + 1)]:
            why = "the layers without RoPE here are every n-th; choose another model"
            _refuse(path, "no_rope_layers", settings["no_rope_layers"], why)
    return every if every <= layers else 0


def their_rope(model: ConfigDict) -> dict[str, Any]:
    """Returns `rope_parameters` of `config.json` for the section `model` of a config."""
    entries: dict[str, Any] = {"rope_theta": model.rope_base, "rope_type": "default"}
    if model.rope_scaling == "none":
        return entries
    entries["rope_type"] = model.rope_scaling
    for field, (key, _) in _NUMBERS[model.rope_scaling].items():
        entries[key] = model[field]
    if model.rope_scaling != "linear":
        entries["original_max_position_embeddings"] = model.rope_original_length
    if model.rope_scaling == "yarn":
        entries["attention_factor"] = model.rope_magnitude
    return entries


def _scaled(
    path: Path, name: str, kind: Any, part: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Returns the fields of scaled RoPE; `part` is the object `name` of `settings`."""
    if not isinstance(kind, str) or kind not in _NUMBERS:
        _refuse(path, name, part, f"RoPE is scaled as {', '.join(_NUMBERS)} only")
    if part.get("truncate") is False:
        _refuse(path, name, part, "yarn here rounds the pairs between which it interpolates")
    fields: dict[str, Any] = {"rope_scaling": kind}
    for field, (key, default) in _NUMBERS[kind].items():
        value = default if part.get(key) is None else part[key]
        fields[field] = _number(path, f"{name}.{key}", value)
    if kind == "linear":
        return fields
    length = settings.get("original_max_position_embeddings")
    length = length or part.get("original_max_position_embeddings")
    length = length or settings.get("max_position_embeddings")
    fields["rope_original_length"] = int(_number(path, "max_position_embeddings", length))
    if kind == "yarn":
        fields["rope_magnitude"] = _magnitude(path, f"{name}.attention_factor", part, fields)
    return fields


def _magnitude(path: Path, key: str, part: dict[str, Any], fields: dict[str, Any]) -> float:
    """Returns YaRN's factor on rotated vectors, 0.1 · ln(factor) + 1 by default."""
    if part.get("attention_factor") is not None:
        return _number(path, key, part["attention_factor"])

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(max(fields["rope_factor"], 1.0)) + 1.0

    weights = [part.get("mscale"), part.get("mscale_all_dim")]
    if not all(weights):
        return scale(1.0)
    own, everywhere = (_number(path, key, weight) for weight in weights)
    return scale(own) / scale(everywhere)


def _number(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        _refuse(path, key, value, "it must be a finite number above 0")
    return float(value)


def _refuse(path: Path, key: str, value: Any, why: str) -> NoReturn:
    raise HuggingFaceError(f"{path}: {key} = {value!r} is not supported; {why}")
