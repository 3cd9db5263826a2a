"""The transformer is Hugging Face's Llama: same weights, same logits."""

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from model.oracle import oracle_config, random_tokens
from tolerance import close

from m3jax.make_model import make_model


def llama_params(config: ConfigDict, state: dict[str, np.ndarray]) -> Any:
    """Llama's state dict in m3jax's layout: matrices (in, out) with heads as axes of their own."""
    model = config.model
    D, K, H = model.hidden, model.kv_heads, model.head_dim
    G = model.query_heads // K

    def layer(i: int) -> dict[str, np.ndarray]:
        def matrix(name: str) -> np.ndarray:
            return state[f"model.layers.{i}.{name}.weight"]

        return {
            "attention_norm": matrix("input_layernorm"),
            "query": matrix("self_attn.q_proj").T.reshape(D, K, G, H),
            "key": matrix("self_attn.k_proj").T.reshape(D, K, H),
            "value": matrix("self_attn.v_proj").T.reshape(D, K, H),
            "output": matrix("self_attn.o_proj").T.reshape(K, G, H, D),
            "mlp_norm": matrix("post_attention_layernorm"),
            "gate": matrix("mlp.gate_proj").T,
            "up": matrix("mlp.up_proj").T,
            "down": matrix("mlp.down_proj").T,
        }

    first, last = config.memory.first_layer, config.memory.first_layer + config.memory.layers
    spans = {"lower": (0, first), "memory": (first, last), "upper": (last, model.layers)}
    params: dict[str, Any] = {
        name: jax.tree.map(lambda *x: np.stack(x), *map(layer, range(*span)))
        for name, span in spans.items()
        if span[1] > span[0]
    }
    params["embedding"] = state["model.embed_tokens.weight"]
    params["final_norm"] = state["model.norm.weight"]
    if not model.tied_embeddings:
        params["head"] = state["lm_head.weight"]
    return params


@pytest.mark.parity
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_llamas(require: Callable[[str], ModuleType], tied: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        torch, transformers = require("torch"), require("transformers")
        config = oracle_config(
            model__layers=4,
            model__hidden=32,
            model__head_dim=8,
            model__query_heads=8,
            model__mlp_width=48,
            model__tied_embeddings=tied,
            model__rope_base=500.0,
            memory__first_layer=1,
        )
        model = config.model
        torch.manual_seed(0)
        llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=model.vocabulary,
                hidden_size=model.hidden,
                intermediate_size=model.mlp_width,
                num_hidden_layers=model.layers,
                num_attention_heads=model.query_heads,
                num_key_value_heads=model.kv_heads,
                head_dim=model.head_dim,
                rms_norm_eps=model.norm_epsilon,
                rope_parameters={"rope_type": "default", "rope_theta": model.rope_base},
                tie_word_embeddings=tied,
                initializer_range=0.3,
                attn_implementation="eager",
            )
        ).eval()
        for name, values in llama.named_parameters():
            if "norm" in name:  # ones would hide a norm that is left out
                values.data.add_(0.2 * torch.randn_like(values))
        tokens = random_tokens(3, 2, 40)
        with torch.no_grad():
            expected = llama(torch.from_numpy(tokens).long()).logits.numpy()
    state = {name: values.numpy() for name, values in llama.state_dict().items()}
    params = llama_params(config, state)
    found = np.asarray(jax.jit(make_model(config, ()).logits)(params, tokens))
    assert expected.std() > 0.5
    close(found, expected, 1e-5 * np.abs(expected).max())
