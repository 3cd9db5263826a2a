"""RAG baseline: references as text in the prompt, by the same retriever (Memory³ §9)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from m3jax.text.references import ReferenceReader

HEADER = "Reference: "


def with_references(
    prompts: Sequence[str], ids: Int[np.ndarray, "n k"], references: ReferenceReader
) -> list[str]:
    """Puts references as text in front of prompts, the best one last, next to the question.

    Args:
      prompts: n questions.
      ids: references of each, best first; −1 is left out.
      references: their texts.
    """
    with_texts = []
    for prompt, row in zip(prompts, ids, strict=True):
        texts = references.texts(row[row >= 0][::-1])
        with_texts.append("".join(f"{HEADER}{text.strip()}\n\n" for text in texts) + prompt)
    return with_texts
