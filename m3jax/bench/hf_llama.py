"""Hugging Face's Llama in torch at the shape of a config, a baseline of the benchmarks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from m3jax.model.hf_config import their_config

Peer = Sequence[Any]  # the modules torch and transformers


def llama_step(
    peer: Peer, config: ConfigDict, tokens: Int[np.ndarray, "B T"]
) -> Callable[[], float]:
    """Returns a function that takes one train step in float32 on all CPU cores and returns the
    loss.

    A step is loss, gradients, clipping and AdamW; every token except a row's first is a target.
    """
    torch, llama = peer[0], _llama(peer, config).train()
    optimizer = config.optimizer
    rates = {"lr": optimizer.learning_rate, "weight_decay": optimizer.weight_decay}
    adam = torch.optim.AdamW(llama.parameters(), **rates, fused=True)
    batch = torch.from_numpy(np.asarray(tokens, np.int64))

    def step() -> float:
        adam.zero_grad(set_to_none=True)
        loss = llama(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), optimizer.clip_norm)
        adam.step()
        return float(loss.detach())

    return step


def llama_generate(
    peer: Peer, config: ConfigDict, prompts: Int[np.ndarray, "B T"], new: int
) -> Callable[[], Int[np.ndarray, "B n"]]:
    """Returns a function that generates `new` tokens per prompt, greedily, with a key-value cache,
    on all CPU cores."""
    torch, llama = peer[0], _llama(peer, config).eval()
    batch = torch.from_numpy(np.asarray(prompts, np.int64))
    options = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    options |= {"min_new_tokens": new, "max_new_tokens": new}

    def generate() -> np.ndarray:
        with torch.inference_mode():
            rows = llama.generate(batch, attention_mask=torch.ones_like(batch), **options)
        return rows[:, batch.shape[1] :].numpy()

    return generate


def _llama(peer: Peer, config: ConfigDict) -> Any:
    """Makes a Llama of the config's shape with random weights."""
    torch, transformers = peer
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    shape = their_config(config.model, config.model.tied_embeddings, "float32", 4096)
    shape |= {"use_cache": False, "attn_implementation": "sdpa"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
