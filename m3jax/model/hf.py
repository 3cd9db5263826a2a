"""Folders of Llama-like models as Hugging Face writes them: read, checked and written.

A folder is `config.json` and `model.safetensors`, or parts of it named by
`model.safetensors.index.json`. Its matrices are (out, in), ours (in, out) with heads as axes of
their own; query head n of both belongs to key-value head n // G, and both turn the pairs
(i, i + H/2) by RoPE, so that no weight changes place within a head.

A Llama knows neither memories nor the prefix: its logits are those of `Model(model, memory, ())`,
which is what `model.prefix = "with_memory"` gives in stages without memory. Its own token for the
start of a text is a token of the row, as `<s>` is in `text/corpus.py`. With the prefix of p tokens,
its `position_ids` are 0 … p−1 and then from p + W on, W being `memory.reference_length`.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from m3jax.errors import HuggingFaceError
from m3jax.model.hf_config import CONFIG, check_fields, read_json, their_config
from m3jax.model.parameters import Params, abstract_params, segment_ranges

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")
_COMPUTED = "rotary_emb.inv_freq"  # a buffer that older versions saved


def read_params(
    folder: str | Path,
    model: ConfigDict,
    memory: ConfigDict,
    order: Int[np.ndarray, " n"] | None = None,
) -> Params:
    """Reads the weights of a folder as parameters of `Model(model, memory)`.

    Args:
      folder: what `save_pretrained` writes or a model's page offers for download.
      model: section of a config with the fields of `read_fields`.
      memory: section of a config; `memory.first_layer` and
        `memory.layers` say how layers are stacked.
      order: token of theirs that each of our first n tokens is (`adopt_tokenizer`); all others are
        the same.

    Returns:
      Arrays on the host in `config.model.param_dtype`.

    Raises:
      HuggingFaceError: as `read_fields`; the config has other fields; a file or tensor is missing,
        damaged, of another shape or dtype, or has no place in `Model`.
    """
    folder = Path(folder)
    check_fields(folder, model)
    if order is not None and len(order) > model.vocabulary:
        raise HuggingFaceError(
            f"{folder}: the tokenizer has {len(order)} tokens, but the model only"
            f" {model.vocabulary}; take both from one download"
        )
    read, names = open_tensors(weight_files(folder))
    shapes, tensors = _tensors(model, memory)
    needed = {tensor.name for tensor in tensors}
    missing = sorted(needed - names)
    if missing:
        raise HuggingFaceError(
            f"{folder}: the tensor {missing[0]} is missing ({len(missing)} in all); take"
            f" {CONFIG} and the weights of a model with LM head from one download"
        )
    _check_others(folder, model, read, names - needed)
    params = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
    for tensor in tensors:
        values = read(tensor.name, tensor.theirs)
        if order is not None and tensor.path[0] in _TABLES:
            values = np.concatenate([values[order], values[len(order) :]])
        ours = (values.T if tensor.inputs else values).reshape(tensor.shape)
        tensor.part(params)[...] = ours
    return params


def write_folder(
    folder: str | Path,
    model: ConfigDict,
    memory: ConfigDict,
    params: Params,
    *,
    dtype: str | None = None,
    positions: int = 2048,
    tokenizer: str | None = None,
    special: Mapping[str, tuple[str, int]] | None = None,
) -> None:
    """Writes parameters as a folder that `transformers.LlamaForCausalLM` loads.

    With `model.qk_norm`, which a Llama has not, it is one for `Qwen3ForCausalLM`.

    Biases on query, key and value come with an output bias of zeros, since a Llama has all four. An
    `embedding_scale` becomes a part of the embedding, which is then not tied to the LM head.

    Args:
      folder: made if it is missing; `config.json` is written last.
      model, memory: sections of the config of the parameters.
      params: as `Model(model, memory)` takes them.
      dtype: `float32` or `bfloat16`; default `config.model.param_dtype`.
      positions: `max_position_embeddings`, the longest row that was trained.
      tokenizer: content of `tokenizer.json`, if it is to be written.
      special: text and id of the tokens `bos`, `eos` and `pad`.

    Raises:
      HuggingFaceError: the folder has a `config.json`; an unknown dtype; a shape that
        transformers does not load; parameters of another config.
    """
    folder, dtype = Path(folder), dtype or model.param_dtype
    if (folder / CONFIG).exists():
        raise HuggingFaceError(f"{folder} holds a model already; name another folder or delete it")
    if model.hidden % model.query_heads:
        raise HuggingFaceError(
            f"config.model.query_heads = {model.query_heads} does not divide config.model.hidden ="
            f" {model.hidden}, and transformers loads no such Llama; keep the checkpoint as it is"
        )
    if dtype not in ("float32", "bfloat16"):
        raise HuggingFaceError(f"dtype = {dtype!r}; weights are written in float32 or bfloat16")
    folder.mkdir(parents=True, exist_ok=True)
    tied = model.tied_embeddings and model.embedding_scale == 1
    tensors = _their_tensors(model, memory, params, tied, jax.numpy.dtype(dtype))
    _commit(folder / _WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    named = dict(special or {})
    if tokenizer is not None:
        texts = {f"{role}_token": text for role, (text, _) in named.items()}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **texts}
        _commit(folder / "tokenizer.json", lambda path: path.write_text(tokenizer, "utf-8"))
        _commit(folder / "tokenizer_config.json", lambda path: _write_json(path, settings))
    ids = {f"{role}_token_id": named[role][1] if role in named else None for role in _ROLES}
    content = {**their_config(model, tied, dtype, positions), **ids}
    _commit(folder / CONFIG, lambda path: _write_json(path, content))


_ROLES = ("bos", "eos", "pad")


# -- tensors ---------------------------------------------------------------------------------------
# Of each parameter of a layer: the name in Hugging Face's layer, and how many of our first axes are
# inputs of a matrix; 0 for what is not transposed.
_LAYER = {
    "attention_norm": ("input_layernorm.weight", 0),
    "query": ("self_attn.q_proj.weight", 1),
    "key": ("self_attn.k_proj.weight", 1),
    "value": ("self_attn.v_proj.weight", 1),
    "output": ("self_attn.o_proj.weight", 3),
    "query_bias": ("self_attn.q_proj.bias", 0),
    "key_bias": ("self_attn.k_proj.bias", 0),
    "value_bias": ("self_attn.v_proj.bias", 0),
    "query_norm": ("self_attn.q_norm.weight", 0),
    "key_norm": ("self_attn.k_norm.weight", 0),
    "mlp_norm": ("post_attention_layernorm.weight", 0),
    "gate": ("mlp.gate_proj.weight", 1),
    "up": ("mlp.up_proj.weight", 1),
    "down": ("mlp.down_proj.weight", 1),
}
_TABLES = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}  # a row a token
_OUTSIDE = {**_TABLES, "final_norm": "model.norm.weight"}


class _Tensor(NamedTuple):
    """Place of a tensor of Hugging Face's in our parameters.

    Attributes:
      name: theirs.
      path: keys of ours, in a stack also the layer.
      shape: ours, of one layer.
      inputs: how many of our first axes are a matrix's inputs; 0 for what is not transposed.
    """

    name: str
    path: tuple[Any, ...]
    shape: tuple[int, ...]
    inputs: int = 0

    @property
    def theirs(self) -> tuple[int, ...]:
        """Their shape."""
        if self.path[0] in _TABLES:
            return self.shape
        sides = (math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs]))
        return sides if self.inputs else sides[:1]

    def part(self, params: Params) -> Any:
        """Returns its values in our parameters."""
        return functools.reduce(lambda node, key: node[key], self.path, params)


def _tensors(model: ConfigDict, memory: ConfigDict) -> tuple[Params, list[_Tensor]]:
    """Returns the parameters of a config as shapes, and every tensor that they are made of."""
    shapes, _ = abstract_params(model, memory)
    outside = [field for field in _OUTSIDE if field in shapes]
    tensors = [_Tensor(_OUTSIDE[field], (field,), shapes[field].shape) for field in outside]
    for segment, (low, high) in segment_ranges(model, memory).items():
        stacks = shapes.get(segment, {})
        for field, (theirs, inputs) in _LAYER.items():
            for i in range(high - low if field in stacks else 0):
                name, path = f"model.layers.{low + i}.{theirs}", (segment, field, i)
                tensors.append(_Tensor(name, path, stacks[field].shape[1:], inputs))
    return shapes, tensors


def _their_tensors(
    model: ConfigDict, memory: ConfigDict, params: Params, tied: bool, dtype: Any
) -> dict[str, np.ndarray]:
    """All tensors of `LlamaForCausalLM` or `Qwen3ForCausalLM`, contiguous."""
    tensors = {}
    for tensor in _tensors(model, memory)[1]:
        values, field = np.asarray(tensor.part(params)), tensor.path[:2][-1]
        if values.shape != tensor.shape:
            raise HuggingFaceError(
                f"parameter {field} is {values.shape}, in this config {tensor.shape}; use the"
                " config it was trained with"
            )
        values = values.reshape(tensor.theirs[::-1]).T if tensor.inputs else values
        values = values.reshape(tensor.theirs)
        if field == "embedding" and not tied:
            if model.tied_embeddings:
                tensors["lm_head.weight"] = np.ascontiguousarray(values.astype(dtype))
            values = values * np.float32(model.embedding_scale)
        tensors[tensor.name] = np.ascontiguousarray(values.astype(dtype))
    if model.attention_bias:
        for i in range(model.layers):
            tensors[f"model.layers.{i}.self_attn.o_proj.bias"] = np.zeros(model.hidden, dtype)
    return tensors


_Read = Callable[[str, tuple[int, ...] | None], np.ndarray]


def weight_files(folder: Path) -> list[Path]:
    """Lists the files that hold the tensors of a folder."""
    if (folder / _WEIGHTS).is_file() or not (folder / _INDEX).is_file():
        return [folder / _WEIGHTS]
    places = read_json(folder / _INDEX).get("weight_map")
    names = sorted(set(places.values())) if isinstance(places, dict) else []
    if not names:
        raise HuggingFaceError(f"{folder / _INDEX} names no files; download it again")
    return [folder / name for name in names]


def open_tensors(files: list[Path]) -> tuple[_Read, set[str]]:
    """Returns `read(name, shape)` of a tensor as it is stored, and the names of all tensors.

    Raises `HuggingFaceError` where a file or a tensor is not as needed.
    """
    where: dict[str, tuple[Any, Path]] = {}
    for path in files:
        try:
            handle = safe_open(path, "np")
        except (OSError, SafetensorError) as error:
            raise HuggingFaceError(
                f"{path} is missing or damaged ({error}); download it again, or convert other"
                " weights with from_pretrained(…).save_pretrained(…) of transformers"
            ) from error
        where.update({name: (handle, path) for name in handle.keys()})  # noqa: SIM118

    def read(name: str, shape: tuple[int, ...] | None) -> np.ndarray:
        handle, path = where[name]
        part = handle.get_slice(name)
        actual, dtype = tuple(part.get_shape()), part.get_dtype()
        if (shape is not None and actual != shape) or dtype not in _DTYPES:
            raise HuggingFaceError(
                f"{path}: the tensor {name} is {dtype} of shape {actual}; {CONFIG} needs shape"
                f" {shape} and one of {', '.join(_DTYPES)}; take both from one download"
            )
        return handle.get_tensor(name)

    return read, set(where)


def _check_others(folder: Path, model: ConfigDict, read: _Read, names: set[str]) -> None:
    """Refuses tensors that `Model` has no place for, unless leaving them out changes nothing."""
    for name in sorted(names):
        if name.endswith(_COMPUTED):
            continue
        if name.endswith("self_attn.o_proj.bias"):
            if not read(name, (model.hidden,)).any():
                continue
            why = "the output projection here has no bias; choose another model"
        elif name == "lm_head.weight" and model.tied_embeddings:
            if np.array_equal(read(name, None), read("model.embed_tokens.weight", None)):
                continue
            why = f"it is not the embedding: set tie_word_embeddings to false in {CONFIG}"
        else:
            why = f"take {CONFIG} and the weights from one download, or choose another model"
        raise HuggingFaceError(f"{folder}: the tensor {name} has no place here; {why}")


def _commit(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes under a temporary name, flushes, renames: the file is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
