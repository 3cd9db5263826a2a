"""Folders of Hugging Face's Llama: what is read and written equals theirs; the rest is refused."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict
from model.oracle import oracle_config, random_params, random_tokens
from safetensors.numpy import load_file, save_file
from text.test_tokenizer_import import NAMED, OURS, TEXTS, train_tokenizer
from tolerance import close

from m3jax.config import PREFIX_TOKENS
from m3jax.errors import HuggingFaceError
from m3jax.make_model import make_model
from m3jax.model.hf import read_params, write_folder
from m3jax.model.hf_config import read_fields
from m3jax.text.tokenizer import Tokenizer as OurTokenizer
from m3jax.text.tokenizer_import import adopt_tokenizer

WEIGHTS = "model.safetensors"
LLAMA3 = {
    **{"model__rope_scaling": "llama3", "model__rope_factor": 8.0},
    **{"model__rope_original_length": 20, "model__rope_low_rotations": 0.5},
}
FIVE_TO_ONE = {"model__query_heads": 10, "model__head_dim": 6, "model__hidden": 20}  # 10 · 6 ≠ 20


def scaled(kind: str, length: int = 0, **numbers: Any) -> dict[str, Any]:
    """Scaled RoPE as transformers has it; `length` is the context before."""
    known = {"rope_type": kind, "rope_theta": 300.0, **numbers}
    if length:
        known["original_max_position_embeddings"] = length
    return {"head_dim": 16, "rope_parameters": known}


def with_fields(folder: Path, **changes: Any) -> ConfigDict:
    """A config with the shape of a folder."""
    config = oracle_config(**changes)
    config.model.update(read_fields(folder))
    return config


def params_of(config: ConfigDict) -> Any:
    dtype = jnp.dtype(config.model.param_dtype)
    return jax.tree.map(lambda x: np.asarray(x).astype(dtype), random_params(config))


def change_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; ... deletes one."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def refused(folder: Path, *parts: str, config: ConfigDict | None = None) -> None:
    with pytest.raises(HuggingFaceError) as caught:
        config = config or with_fields(folder)
        read_params(folder, config.model, config.memory)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


@pytest.fixture
def config() -> ConfigDict:
    return oracle_config(**FIVE_TO_ONE)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = oracle_config(**FIVE_TO_ONE)
    folder = tmp_path_factory.mktemp("written")
    write_folder(folder, config.model, config.memory, params_of(config))
    return folder


@pytest.fixture
def folder(tmp_path: Path, written: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "llama"))


# -- there and back --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {},
        FIVE_TO_ONE,
        {"model__tied_embeddings": True},
        {"model__attention_bias": True},
        {"model__qk_norm": True, "model__attention_bias": True},
        {"model__param_dtype": "bfloat16"},
        {"model__layers": 4, "memory__first_layer": 1},
        {"model__rope_scaling": "linear", "model__rope_factor": 2.0},
        LLAMA3,
        {**LLAMA3, "model__rope_scaling": "yarn", "model__rope_magnitude": 1.2},
        {"model__no_rope_every": 2, "model__attention_bias": True},
        {"model__no_rope_every": 1},
    ],
)
def test_what_is_written_is_read_bitwise(changes: dict[str, Any], tmp_path: Path) -> None:
    config = oracle_config(**changes)
    params = params_of(config)
    write_folder(tmp_path / "llama", config.model, config.memory, params, positions=77)
    fields = read_fields(tmp_path / "llama")
    assert fields == {name: config.model[name] for name in fields}
    equal(read_params(tmp_path / "llama", config.model, config.memory), params)
    written = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert written["max_position_embeddings"] == 77 and written["pad_token_id"] is None
    assert written["dtype"] == written["torch_dtype"] == config.model.param_dtype
    assert not list((tmp_path / "llama").glob("*.tmp"))


def test_layers_are_stacked_as_the_config_says(folder: Path, config: ConfigDict) -> None:
    whole = read_params(folder, config.model, config.memory)
    other = config.copy_and_resolve_references()
    other.memory.first_layer, other.memory.layers = 2, 1
    found = read_params(folder, other.model, other.memory)
    assert set(found) >= {"lower", "memory"} and "upper" not in found
    for name, values in found["lower"].items():
        np.testing.assert_array_equal(values, whole["memory"][name])
        np.testing.assert_array_equal(found["memory"][name], whole["upper"][name])


def test_weights_in_several_files(folder: Path, config: ConfigDict) -> None:
    expected, tensors = (
        read_params(folder, config.model, config.memory),
        load_file(folder / WEIGHTS),
    )
    (folder / WEIGHTS).unlink()
    refused(folder, f"{WEIGHTS} is missing or damaged", "download it again")
    names, places = sorted(tensors), {}
    for i, part in enumerate((names[:9], names[9:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        places.update(dict.fromkeys(part, file))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    equal(read_params(folder, config.model, config.memory), expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors is missing", "download it again")
    index.write_text("{}")
    refused(folder, "model.safetensors.index.json names no files", "download it again")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_of_half_width(folder: Path, config: ConfigDict, dtype: Any) -> None:
    expected = read_params(folder, config.model, config.memory)
    change_tensors(folder, lambda t: t.update({n: v.astype(dtype) for n, v in t.items()}))
    equal(
        read_params(folder, config.model, config.memory),
        jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), expected),
    )
    config.model.param_dtype = "bfloat16"
    leaves = jax.tree.leaves(read_params(folder, config.model, config.memory))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(ml_dtypes.bfloat16)}


def test_export_in_bfloat16_rounds_once(folder: Path, tmp_path: Path, config: ConfigDict) -> None:
    params = read_params(folder, config.model, config.memory)
    write_folder(tmp_path, config.model, config.memory, params, dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    equal(read_params(tmp_path, config.model, config.memory), rounded)


def test_tokens_in_another_order(folder: Path, config: ConfigDict) -> None:
    params = read_params(folder, config.model, config.memory)
    order = np.array([3, 1, 0, 4, 2])
    found = read_params(folder, config.model, config.memory, order)
    for name in ("embedding", "head"):
        np.testing.assert_array_equal(found[name][:5], params[name][order])
        np.testing.assert_array_equal(found[name][5:], params[name][5:])


def test_tokens_that_mean_nothing_are_half_a_line_feed(folder: Path, config: ConfigDict) -> None:
    params = read_params(folder, config.model, config.memory)
    order = np.array([-1, 1, -1, 4, 3, *range(5, 260), 2])
    with pytest.raises(HuggingFaceError, match=r"config.model.vocabulary = 261"):
        read_params(folder, config.model, config.memory, order, 7)
    config.model.vocabulary = 261  # one token is added
    for line_feed in (7, None):
        found = read_params(folder, config.model, config.memory, order, line_feed)
        for name in ("embedding", "head"):
            rows = params[name]
            like = rows.mean(0) if line_feed is None else rows[line_feed]
            np.testing.assert_array_equal(found[name][[0, 2]], np.stack([like / 2] * 2))
            np.testing.assert_array_equal(found[name][order >= 0], rows[order[order >= 0]])
    more = np.array([*range(261)])
    with pytest.raises(HuggingFaceError, match="has 261 tokens, but the model only 260"):
        read_params(folder, config.model, config.memory, more)


def test_harmless_tensors_are_left_out(tmp_path: Path) -> None:
    config = oracle_config(model__tied_embeddings=True)
    params = params_of(config)
    write_folder(tmp_path, config.model, config.memory, params)

    def more(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        tensors["model.layers.0.self_attn.o_proj.bias"] = np.zeros(12, np.float32)

    change_tensors(tmp_path, more)
    equal(read_params(tmp_path, config.model, config.memory), params)


# -- config.json -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"rope_parameters": ..., "rope_theta": 5e5}, {"rope_base": 5e5}),
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": ...}, {"rope_base": 7.0}),
        (
            {
                "rope_parameters": ...,
                "rope_theta": ...,
                "rope_scaling": {"rope_type": "default", "rope_theta": 9},
            },
            {"rope_base": 9.0},
        ),
        ({"rope_parameters": ..., "rope_theta": ...}, {"rope_base": 10_000.0}),
        ({"rope_scaling": None, "sliding_window": None, "hidden_act": ...}, {}),
        ({"dtype": ..., "torch_dtype": "bfloat16", "pretraining_tp": 1}, {}),
        ({"num_key_value_heads": ...}, {"kv_heads": 10}),
        ({"head_dim": ..., "num_attention_heads": 2, "num_key_value_heads": 1}, {"head_dim": 10}),
        ({"head_dim": None}, {"head_dim": 2}),
        ({"rms_norm_eps": ...}, {"norm_epsilon": 1e-6}),
        ({"tie_word_embeddings": ...}, {"tied_embeddings": False}),
        ({"tie_word_embeddings": True}, {"tied_embeddings": True}),
        (
            {
                "model_type": "qwen2",
                "attention_bias": ...,
                "use_sliding_window": False,
                "sliding_window": 4096,
                "layer_types": ["full_attention"] * 3,
            },
            {"attention_bias": True},
        ),
        ({"model_type": "qwen3", "head_dim": 2}, {"qk_norm": True, "attention_bias": False}),
        ({"model_type": "mistral", "sliding_window": None}, {"qk_norm": False}),
        ({"sliding_window": 4096}, {}),
        ({"model_type": "smollm3"}, {"no_rope_every": 0}),  # the fourth of three layers
        ({"model_type": "smollm3", "no_rope_layer_interval": 2}, {"no_rope_every": 2}),
        (
            {
                **{"model_type": "smollm3", "no_rope_layers": [1, 1, 0], "rope_parameters": ...},
                **{"rope_theta": ..., "tie_word_embeddings": ...},
            },
            {"no_rope_every": 3, "rope_base": 2e6, "tied_embeddings": True},
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0]}, {"no_rope_every": 0}),
        ({"model_type": "llama", "no_rope_layers": [1, 0, 1]}, {"no_rope_every": 0}),
    ],
)
def test_old_and_new_keys(folder: Path, changes: dict[str, Any], fields: dict[str, Any]) -> None:
    before = read_fields(folder)
    change_config(folder, **changes)
    found = read_fields(folder)
    assert {name: found[name] for name in fields} == fields
    touched = {"query_heads", "kv_heads", "head_dim", *fields}
    assert {k: v for k, v in found.items() if k not in touched} == {
        k: v for k, v in before.items() if k not in touched
    }


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gpt2"}, ("model_type = 'gpt2'", "not gated", "llama, mistral, qwen2")),
        ({"model_type": "mixtral"}, ("model_type = 'mixtral'", "experts")),
        ({"model_type": ...}, ("model_type = None",)),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            ("rope_scaling.low_freq_factor = None", "number above 0"),
        ),
        ({"rope_scaling": {"type": "dynamic"}}, ("rope_scaling", "linear, llama3, yarn only")),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
            ("rope_scaling", "rounds"),
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1}}}, ("full_attention",)),
        ({"rope_theta": 5e5}, ("several RoPE bases", "500000.0", "delete")),
        ({"rope_parameters": ..., "rope_theta": -1}, ("rope_theta = -1", "above 0")),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor = 0.5", "whole heads")),
        ({"hidden_act": "gelu"}, ("hidden_act = 'gelu'", "silu", "choose another model")),
        ({"mlp_bias": True}, ("mlp_bias = True", "no biases")),
        ({"sliding_window": 40}, ("sliding_window = 40", "whole row")),
        (
            {"model_type": "mistral", "max_position_embeddings": 32768},
            ("sliding_window = 4096", "whole row of 32768"),
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True},
            ("use_sliding_window = True", "whole row"),
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types",)),
        ({"model_type": "qwen2", "num_key_value_heads": ...}, ("num_key_value_heads = None",)),
        ({"quantization_config": {"bits": 4}}, ("quantization_config", "bfloat16")),
        (
            {"model_type": "smollm3", "no_rope_layers": [0, 1, 1]},
            ("no_rope_layers = [0, 1, 1]", "every n-th"),
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, ("no_rope_layers = [1]", "3 layers")),
        (
            {"model_type": "smollm3", "no_rope_layer_interval": 0},
            ("no_rope_layer_interval = 0", "above 0"),
        ),
        ({"hidden_size": ...}, ("hidden_size = None is not a size", "published with")),
        ({"vocab_size": 0}, ("vocab_size = 0 is not a size",)),
        ({"num_key_value_heads": 3}, ("3 key-value heads", "do not fit together")),
        ({"head_dim": 5}, ("query heads of 5",)),
        ({"head_dim": ..., "num_attention_heads": 7, "num_key_value_heads": 7}, ("do not fit",)),
    ],
)
def test_what_the_model_cannot_compute_is_refused(
    folder: Path, config: ConfigDict, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    change_config(folder, **changes)
    refused(folder, "config.json", *parts, config=config)


def test_a_folder_that_is_none(tmp_path: Path, config: ConfigDict) -> None:
    refused(tmp_path / "none", "config.json is missing or damaged", WEIGHTS, config=config)
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json is missing or damaged (no JSON object)", config=config)


def test_a_config_of_another_shape_names_all_that_differs(folder: Path, config: ConfigDict) -> None:
    config.model.hidden, config.model.rope_base = 16, 10_000.0
    refused(
        folder,
        "set config.model.hidden = 20, config.model.rope_base = 100.0",
        config=config,
    )


# -- tensors ---------------------------------------------------------------------------------------
def _drop(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.layers.2.mlp.up_proj.weight"]


def _headless(tensors: dict[str, np.ndarray]) -> None:
    del tensors["lm_head.weight"]


def _more(name: str, values: np.ndarray) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({name: values})


ONES = np.ones(20, np.float32)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_drop, ("model.layers.2.mlp.up_proj.weight is missing (1 in all)", "one download")),
        (_headless, ("lm_head.weight is missing", "LM head")),
        (
            _more("model.layers.1.self_attn.o_proj.bias", ONES),
            ("model.layers.1.self_attn.o_proj.bias", "has no bias", "choose another model"),
        ),
        (_more("model.layers.0.self_attn.q_proj.bias", ONES), ("q_proj.bias has no place here",)),
        (_more("model.layers.3.input_layernorm.weight", ONES), ("layers.3", "one download")),
        (_more("score.weight", ONES), ("score.weight has no place here",)),
        (
            _more("model.norm.weight", np.ones(13, np.float32)),
            ("model.norm.weight is F32 of shape (13,)", "needs shape (20,)"),
        ),
        (
            _more("model.layers.0.self_attn.k_proj.weight", np.ones((20, 12), np.float32)),
            ("k_proj.weight is F32 of shape (20, 12)", "needs shape (12, 20)"),
        ),
        (_more("model.norm.weight", np.ones(20, np.int8)), ("is I8 of shape (20,)", "BF16")),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    folder: Path, change: Callable[[dict[str, np.ndarray]], None], parts: tuple[str, ...]
) -> None:
    change_tensors(folder, change)
    refused(folder, *parts)


def test_a_head_of_its_own_beside_tied_embeddings_is_refused(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    refused(folder, "lm_head.weight", "set tie_word_embeddings to false")


def test_damaged_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])
    refused(folder, f"{WEIGHTS} is missing or damaged", "download it again")


def test_a_folder_is_written_once(folder: Path, config: ConfigDict) -> None:
    params = jax.tree.map(lambda x: x + 1, read_params(folder, config.model, config.memory))
    with pytest.raises(HuggingFaceError, match="holds another model"):
        write_folder(folder, config.model, config.memory, params)
    (folder / "config.json").unlink()  # as a stopped export leaves it
    with pytest.raises(HuggingFaceError, match="dtype = 'float16'"):
        write_folder(folder, config.model, config.memory, params, dtype="float16")
    write_folder(folder, config.model, config.memory, params)
    equal(read_params(folder, config.model, config.memory), params)
    with pytest.raises(HuggingFaceError, match="parameter query is"):
        other = oracle_config(model__hidden=20)
        write_folder(folder.parent / "other", other.model, other.memory, params)
    with pytest.raises(HuggingFaceError, match="query_heads = 10 does not divide .*hidden = 12"):
        other = oracle_config(model__query_heads=10)
        write_folder(folder.parent / "other", other.model, other.memory, params)
    with pytest.raises(HuggingFaceError, match="no_rope_every = 2 with config.model.qk_norm"):
        other = oracle_config(model__no_rope_every=2, model__qk_norm=True)
        write_folder(folder.parent / "other", other.model, other.memory, params)
    assert not (folder.parent / "other" / "config.json").exists()


# -- Hugging Face's models -------------------------------------------------------------------------
def _libraries(require: Callable[[str], ModuleType]) -> tuple[ModuleType, ModuleType]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        return require("torch"), require("transformers")


def _their_logits(
    libraries: tuple[ModuleType, ModuleType], folder: Path, tokens: np.ndarray, **options: Any
) -> np.ndarray:
    """Logits of a folder, computed in float64: in float32 theirs are as far from these as ours."""
    torch, transformers = libraries
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        options = {name: torch.from_numpy(values) for name, values in options.items()}
        return model.eval()(torch.from_numpy(tokens).long(), **options).logits.numpy()


def _same(found: Any, expected: np.ndarray) -> None:
    assert expected.std() > 0.5
    close(found, expected, 1e-5 * np.abs(expected).max())


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "changes", "dtype"),
    [
        (
            "Llama",
            {"num_attention_heads": 10, "num_key_value_heads": 2, "hidden_size": 40, "head_dim": 6},
            "float32",
        ),
        ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}, "float32"),
        ("Llama", {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}, "bfloat16"),
        ("Qwen2", {"num_key_value_heads": 1}, "float32"),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 6}, "float32"),
        ("Llama", scaled("linear", factor=3.0), "float32"),
        (
            "Llama",
            scaled("llama3", 16, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
            "float32",
        ),
        ("Qwen3", scaled("yarn", 16, factor=4.0), "float32"),
        ("Qwen2", scaled("yarn", 8, factor=4.0, beta_fast=9, beta_slow=0.5), "float32"),
        (
            "Llama",
            scaled("yarn", 12, factor=4.0, attention_factor=0.8),
            "float32",
        ),
        ("Qwen3", {"num_key_value_heads": 2, "head_dim": 10}, "float32"),
        ("SmolLM3", {"num_hidden_layers": 5, "num_key_value_heads": 2, "head_dim": 6}, "float32"),
        (
            "SmolLM3",
            {
                **{"no_rope_layer_interval": 2, "tie_word_embeddings": False},
                **scaled("yarn", 16, factor=4.0),
            },
            "float32",
        ),
    ],
)
def test_their_folders_give_their_logits(
    require: Callable[[str], ModuleType],
    family: str,
    changes: dict[str, Any],
    dtype: str,
    tmp_path: Path,
) -> None:
    torch, transformers = libraries = _libraries(require)
    shape = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "initializer_range": 0.3,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        **changes,
    }
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llama = getattr(transformers, f"{family}ForCausalLM")(
            getattr(transformers, f"{family}Config")(**shape)
        )
        for name, values in llama.named_parameters():
            if "norm" in name or "bias" in name:  # ones and zeros would hide what is left out
                values.data.add_(0.2 * torch.randn_like(values))
        llama.to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config = with_fields(tmp_path, memory__first_layer=1, memory__layers=1)
    tokens = random_tokens(3, 2, 40)
    found = jax.jit(make_model(config, ()).logits)(
        read_params(tmp_path, config.model, config.memory), tokens
    )
    _same(found, _their_logits(libraries, tmp_path, tokens))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({**FIVE_TO_ONE, "memory__first_layer": 1}, "float32"),
        ({"model__tied_embeddings": True, "model__rope_base": 7.0}, "float32"),
        ({"model__tied_embeddings": True, "model__embedding_scale": 3.0}, "float32"),
        ({"model__attention_bias": True, "model__embedding_scale": 0.7}, "float32"),
        ({"model__norm_epsilon": 0.01}, "bfloat16"),
        ({"model__qk_norm": True, "model__attention_bias": True}, "float32"),
        (LLAMA3, "float32"),
        ({**LLAMA3, "model__rope_scaling": "yarn", "model__rope_magnitude": 1.2}, "float32"),
        ({"model__no_rope_every": 2, "model__attention_bias": True}, "float32"),
    ],
)
def test_our_folders_give_our_logits(
    require: Callable[[str], ModuleType], changes: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    libraries = _libraries(require)
    config, tokens = oracle_config(**changes), random_tokens(4, 2, 30)
    params = random_params(config)
    if dtype == "bfloat16":
        params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    write_folder(tmp_path, config.model, config.memory, params, dtype=dtype)
    expected = _their_logits(libraries, tmp_path, tokens)
    _same(jax.jit(make_model(config, ()).logits)(params, tokens), expected)

    # With the prefix theirs reads it as the first tokens, at the positions it has here.
    p, first = len(PREFIX_TOKENS), len(PREFIX_TOKENS) + config.memory.reference_length
    long = np.concatenate([np.tile(np.array(PREFIX_TOKENS, np.int32), (2, 1)), tokens], axis=1)
    positions = np.concatenate([np.arange(p), first + np.arange(30)])[None].repeat(2, 0)
    expected = _their_logits(libraries, tmp_path, long, position_ids=positions)[:, p:]
    _same(jax.jit(make_model(config, PREFIX_TOKENS).logits)(params, tokens), expected)


@pytest.mark.parity
def test_their_tokenizer_reads_ours(
    require: Callable[[str], ModuleType], tmp_path: Path, folder: Path, config: ConfigDict
) -> None:
    _, transformers = _libraries(require)
    content = adopt_tokenizer(train_tokenizer().to_str(), NAMED, OURS).text
    special = {"bos": ("<s>", 1), "eos": ("</s>", 3), "pad": ("<pad>", 0)}
    params = read_params(folder, config.model, config.memory)
    write_folder(tmp_path, config.model, config.memory, params, tokenizer=content, special=special)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 3, 0)
    for text in (TEXTS[0], TEXTS[3]):
        assert theirs.encode(text) == list(OurTokenizer(content).encode(text))
