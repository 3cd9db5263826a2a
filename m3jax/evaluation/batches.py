"""Continues many prompts in batches of one size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from m3jax.inference.generate import Generator


def continue_prompts(
    generator: Generator,
    prompts: Sequence[np.ndarray],
    new: int,
    batch_size: int,
    options: Mapping[str, Sequence[Any]],
    *,
    progress: str = "",
) -> list[str]:
    """Returns the texts that continue prompts; prompts of similar length run together.

    Args:
      generator: generates the texts.
      prompts: their tokens, without BOS.
      new: most tokens of a text.
      batch_size: prompts of a batch; the last batch is filled up with copies.
      options: arguments of `Generator.generate` with one value per prompt, by name.
      progress: name of a progress bar; "" shows none.
    """
    texts = [""] * len(prompts)
    order = np.argsort([-len(prompt) for prompt in prompts], kind="stable")
    starts = range(0, len(prompts), batch_size)
    for low in tqdm(starts, desc=progress, unit="batch", disable=not progress):
        part = order[low : low + batch_size].tolist()
        part += part[-1:] * (batch_size - len(part))
        of_part: dict[str, Any] = {
            name: [values[i] for i in part] for name, values in options.items()
        }
        generations = generator.generate([prompts[i] for i in part], new, **of_part)
        for i, generation in zip(part, generations, strict=True):
            texts[i] = generation.text
    return texts
