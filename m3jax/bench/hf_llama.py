"""Hugging Face's Llama in torch, as a training step of the same shape to time ours against."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict


class MissingLlama(ImportError):
    """torch or transformers is not installed. The message says how to install them."""


def llama_step(config: ConfigDict, tokens: Int[np.ndarray, "B T"]) -> Callable[[], float]:
    """A step of `LlamaForCausalLM` on these tokens: loss, gradients, clipping and AdamW.

    Args:
      config: the shape, optimizer and number of layers; float32, without recomputation.
      tokens: the batch; every token but the first is a target.

    Returns:
      A call that takes a step, on all cores, and returns the loss.

    Raises:
      MissingLlama: it is not installed.
    """
    torch, llama = _llama(config)
    optimizer = config.optimizer
    llama.train()
    adam = torch.optim.AdamW(
        llama.parameters(),
        lr=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
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
    config: ConfigDict, prompts: Int[np.ndarray, "B T"], new: int
) -> Callable[[], Int[np.ndarray, "B n"]]:
    """`LlamaForCausalLM.generate`, greedy, with its cache.

    Args:
      config: the shape; float32.
      prompts: tokens of prompts of one length.
      new: tokens generated for each; none ends a row.

    Returns:
      A call that generates, on all cores.

    Raises:
      MissingLlama: it is not installed.
    """
    torch, llama = _llama(config)
    llama.eval()
    batch = torch.from_numpy(np.asarray(prompts, np.int64))
    options = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}

    def generate() -> np.ndarray:
        with torch.inference_mode():
            found = llama.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                min_new_tokens=new,
                max_new_tokens=new,
                **options,
            )
        return found[:, batch.shape[1] :].numpy()

    return generate


def _llama(config: ConfigDict) -> tuple[Any, Any]:
    """torch, and a Llama of the config's shape with random weights."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch
            import transformers
    except ImportError as error:
        raise MissingLlama(
            f"{error.name} is not installed: pip install -c constraints.txt -e '.[parity]'"
        ) from error
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = config.model
    shape = transformers.LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.query_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        rms_norm_eps=model.norm_epsilon,
        tie_word_embeddings=model.tied_embeddings,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return torch, transformers.LlamaForCausalLM(shape)
