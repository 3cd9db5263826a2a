"""Every key of a `config.json` with every kind of wrong value: read, or refused by name."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m3jax.errors import HuggingFaceError
from m3jax.model.hf_config import read_fields

BASE: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "intermediate_size": 172, "head_dim": 16, "rms_norm_eps": 1e-5},
    **{"max_position_embeddings": 512, "rope_theta": 1e4, "tie_word_embeddings": True},
    **{"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "model_type": "llama"},
    **{"sliding_window": None, "use_sliding_window": False, "layer_types": None},
    **{"quantization_config": None, "partial_rotary_factor": None, "unknown": None},
    **{"rope_scaling": None, "rope_parameters": None, "no_rope_layers": [1] * 8},
    "no_rope_layer_interval": 4,
}
ROPE: tuple[dict[str, Any], ...] = (
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "beta_slow": 1.0, "beta_fast": 32.0, "truncate": True},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.1},
    {"type": "linear", "factor": 2.0},
)
MORE = {"rope_theta": 1e4, "original_max_position_embeddings": 256, "partial_rotary_factor": 1}
WRONG: tuple[Any, ...] = (
    *(None, "x", "", "8", -1, 0, 1, 3, 1.5, 1e308, 1e-320, float("nan"), float("inf")),
    *(2**70, -(2**70), [], ["a"], [None], {}, {"a": 1}, {"a": {}}, True, False),
)


def changed(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The content with each key missing, and with each wrong value."""
    for key in content:
        yield {name: value for name, value in content.items() if name != key}
        for value in WRONG:
            yield content | {key: value}


def contents(family: str) -> Iterator[dict[str, Any]]:
    base = BASE | {"model_type": family}
    yield from changed(base)
    for rope, name in itertools.product(ROPE, ("rope_scaling", "rope_parameters")):
        yield from (base | {name: part} for part in changed(rope | MORE))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_wrong_values_of_a_config_are_refused_by_name(family: str, tmp_path: Path) -> None:
    path, read, refused = tmp_path / "config.json", 0, 0
    every = 5 if family == "smollm3" else 11  # coprime to the values of a key and its lack
    for content in itertools.islice(contents(family), 0, None, every):
        path.write_text(json.dumps(content))
        try:
            read_fields(tmp_path)
            read += 1
        except HuggingFaceError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error), content
    assert len(WRONG) % 5 != 4 and read > 30 and refused > 60


@pytest.mark.parametrize("text", ["", "3", "[]", "null", '"x"', '{"a":', "\0", "[" * 100_000])
def test_other_peoples_json_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(HuggingFaceError, match=r"config\.json is missing or damaged"):
        read_fields(tmp_path)
