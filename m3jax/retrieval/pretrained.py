"""Reads encoders in the folder format of Hugging Face and sentence-transformers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers

from m3jax.errors import HuggingFaceError
from m3jax.failures import raise_if_machine
from m3jax.files import checksum, digest, json_text
from m3jax.model.hf import open_tensors, weight_files
from m3jax.model.hf_config import CONFIG, read_json
from m3jax.retrieval.bert import Architecture, Params, Pooling

_FAMILIES = {"bert": False, "roberta": True, "xlm-roberta": True}  # positions from padding id?
_FIXED = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
_MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers
_POOLING = "1_Pooling/config.json"
_PUBLISHED = f"use the {CONFIG} that the encoder was published with"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Holds an encoder that was read from a folder."""

    architecture: Architecture
    params: Params  # float32 arrays on the host, as `bert.encode` takes them
    pooling: Pooling
    tokenizer: tokenizers.Tokenizer  # adds special tokens, truncates to `max_length`, does not pad
    max_length: int  # most tokens of a text, including special tokens
    lower: bool  # True if texts are lower-cased before tokenization
    fingerprint: str  # hex digest of all other fields


def read_pretrained(folder: Path, pooling: Literal["auto", "mean", "cls"]) -> Pretrained:
    """Reads an encoder: `config.json`, `model.safetensors` (or its shards), `tokenizer.json`.

    With `pooling` = `auto`, the pooling is read from `1_Pooling/config.json`.

    Raises:
      HuggingFaceError: the folder or a file is missing or damaged; the model is not a BERT, RoBERTa
        or XLM-RoBERTa encoder, or has settings, modules or a pooling that are not supported; a
        tensor is missing or has another shape; or the tokenizer does not fit the encoder.
    """
    if not folder.is_dir():
        raise HuggingFaceError(
            f"there is no folder {folder}; set config.retrieval.encoder to the folder of a"
            " downloaded encoder, with config.json, model.safetensors and tokenizer.json"
        )
    architecture = _architecture(folder)
    _check_modules(folder)
    chosen = pooling if pooling != "auto" else _pooling(folder)
    max_length, lower = _limits(folder, architecture)
    tokenizer, text = _tokenizer(folder, architecture, max_length)
    files = weight_files(folder)
    params = _params(files, architecture)
    settings = [1, dataclasses.asdict(architecture), chosen, max_length, lower]
    fingerprint = digest(json_text(settings), text, *map(checksum, files))
    return Pretrained(architecture, params, chosen, tokenizer, max_length, lower, fingerprint)


def _architecture(folder: Path) -> Architecture:
    path = folder / CONFIG
    config = read_json(path)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise HuggingFaceError(
            f"{path}: model_type = {family!r} is not supported; config.retrieval.encoder takes"
            f" {', '.join(_FAMILIES)}"
        )
    for key, expected in _FIXED.items():
        if config.get(key, expected) != expected:
            raise HuggingFaceError(
                f"{path}: {key} = {config[key]!r} is not supported, only {expected!r}; choose"
                " another encoder"
            )
    try:
        sizes = Architecture(
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            hidden=int(config["hidden_size"]),
            mlp_width=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            positions=int(config["max_position_embeddings"]),
            types=int(config.get("type_vocab_size", 2)),
            padding=int(config.get("pad_token_id", 1)) if _FAMILIES[family] else None,
            norm_epsilon=float(config.get("layer_norm_eps", 1e-12)),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise HuggingFaceError(
            f"{path} lacks a size, or one is no number ({error!r}); {_PUBLISHED}"
        ) from error
    if min(dataclasses.astuple(sizes)[:7]) < 1 or sizes.hidden % sizes.heads:
        raise HuggingFaceError(
            f"{path}: {sizes.heads} heads do not divide hidden_size = {sizes.hidden}, or a size is"
            f" 0; {_PUBLISHED}"
        )
    return sizes


def _check_modules(folder: Path) -> None:
    """Raises if `modules.json` lists a sentence-transformers module that is not supported."""
    path = folder / "modules.json"
    if not path.is_file():
        return
    try:
        modules = json.loads(path.read_text("utf-8"))
        kinds = [module["type"].rpartition(".")[2] for module in modules]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HuggingFaceError(f"{path} is damaged ({error!r}); download it again") from error
    for kind in kinds:
        if kind not in _MODULES:
            raise HuggingFaceError(
                f"{path} names a module {kind!r} after the encoder, which is not supported; choose"
                f" an encoder with {', '.join(_MODULES)} only"
            )


def _pooling(folder: Path) -> Pooling:
    path = folder / _POOLING
    if not path.is_file():
        raise HuggingFaceError(
            f"{path} is missing, which would say how tokens become one vector; set"
            " config.retrieval.pooling to 'mean' (MiniLM) or 'cls' (BGE)"
        )
    config = read_json(path, "set config.retrieval.pooling to 'mean' (MiniLM) or 'cls' (BGE)")
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    chosen = [names.get(key, key) for key, on in config.items() if "mode" in key and on is True]
    if isinstance(config.get("pooling_mode"), str):  # format of newer versions
        chosen = [config["pooling_mode"]]
    match chosen:
        case ["mean"]:
            return "mean"
        case ["cls"]:
            return "cls"
    raise HuggingFaceError(
        f"{path} asks for {' and '.join(chosen) or 'nothing'}; supported is one of mean and cls:"
        " choose another encoder, or set config.retrieval.pooling"
    )


def _limits(folder: Path, architecture: Architecture) -> tuple[int, bool]:
    """Returns the most tokens of a text, and True if texts are to be lower-cased."""
    paths = (folder / "sentence_bert_config.json", folder / "tokenizer_config.json")
    sentence, tokenizer = (
        read_json(path, "download it again") if path.is_file() else {} for path in paths
    )
    longest = sentence.get("max_seq_length") or tokenizer.get("model_max_length")
    if not isinstance(longest, (int, float)) or math.isnan(longest):
        longest = architecture.longest
    max_length = int(min(longest, architecture.longest))
    if max_length < 3:
        raise HuggingFaceError(
            f"{folder} allows texts of {max_length} tokens, too few for one word between two"
            " special ones; correct max_seq_length in sentence_bert_config.json"
        )
    return max_length, bool(sentence.get("do_lower_case"))


def _tokenizer(
    folder: Path, architecture: Architecture, max_length: int
) -> tuple[tokenizers.Tokenizer, str]:
    path = folder / "tokenizer.json"
    try:
        text = path.read_text("utf-8")
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise_if_machine(error)
        raise HuggingFaceError(
            f"{path} is missing or damaged ({error}); download it again, or write it with"
            " AutoTokenizer.from_pretrained(…).save_pretrained(…) of transformers"
        ) from error
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= architecture.vocabulary:
        raise HuggingFaceError(
            f"{path} has tokens up to {largest}, but the encoder has only"
            f" {architecture.vocabulary}; take both from one download"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer, text


def _params(files: list[Path], architecture: Architecture) -> Params:
    D, F = architecture.hidden, architecture.mlp_width
    read = _reader(files)

    def linear(name: str, source: str, width: int, out: int) -> Params:
        weight = read(f"{source}.weight", (out, width)).T
        return {name: weight, f"{name}_bias": read(f"{source}.bias", (out,))}

    def norm(name: str, source: str) -> Params:
        scale, bias = read(f"{source}.weight", (D,)), read(f"{source}.bias", (D,))
        return {f"{name}_scale": scale, f"{name}_bias": bias}

    def layer(i: int) -> Params:
        start = f"encoder.layer.{i}."
        names = ("query", "key", "value")
        parts = [linear("qkv", f"{start}attention.self.{name}", D, D) for name in names]
        return {
            **{key: np.concatenate([p[key] for p in parts], axis=-1) for key in parts[0]},
            **linear("output", f"{start}attention.output.dense", D, D),
            **norm("attention_norm", f"{start}attention.output.LayerNorm"),
            **linear("up", f"{start}intermediate.dense", D, F),
            **linear("down", f"{start}output.dense", F, D),
            **norm("mlp_norm", f"{start}output.LayerNorm"),
        }

    rows = {
        "words": ("word", architecture.vocabulary),
        "positions": ("position", architecture.positions),
        "types": ("token_type", architecture.types),
    }
    tables = {
        name: read(f"embeddings.{source}_embeddings.weight", (size, D))
        for name, (source, size) in rows.items()
    }
    layers = [layer(i) for i in range(architecture.layers)]
    return {
        "embedding": {**tables, **norm("norm", "embeddings.LayerNorm")},
        "layers": {key: np.stack([each[key] for each in layers]) for key in layers[0]},
    }


_LAST = "embeddings.word_embeddings.weight"  # its prefix (`bert.`) precedes all names


def _reader(files: list[Path]) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    """Returns a function `read(name, shape)` that reads a tensor of the files as float32."""
    read_stored, names = open_tensors(files)
    prefix = next((name.removesuffix(_LAST) for name in sorted(names) if name.endswith(_LAST)), "")

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        # Weights that were converted from TensorFlow have older names.
        older = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        older = older.replace("LayerNorm.bias", "LayerNorm.beta")
        stored = next((n for n in (prefix + name, prefix + older) if n in names), None)
        if stored is None:
            raise HuggingFaceError(
                f"{' and '.join(map(str, files))}: the tensor {prefix + name} is missing; take"
                f" {CONFIG} and the weights from one download"
            )
        return read_stored(stored, shape).astype(np.float32)

    return read
