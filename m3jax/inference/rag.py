"""The RAG baseline: references as text in the prompt, found by the same retriever (Memory³ §9)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from m3jax.retrieval.retriever import Retriever
from m3jax.text.references import ReferenceReader

HEADER = "Reference: "


def with_references(
    prompts: Sequence[str], ids: Int[np.ndarray, "n k"], references: ReferenceReader
) -> list[str]:
    """Prompts behind the text of their references, the best one last, next to the question.

    Args:
      prompts: n questions.
      ids: references of each, best first; −1 is left out.
      references: their texts.
    """
    found = []
    for prompt, row in zip(prompts, ids, strict=True):
        texts = references.texts(row[row >= 0][::-1])
        found.append("".join(f"{HEADER}{text.strip()}\n\n" for text in texts) + prompt)
    return found


def retrieve(
    prompts: Sequence[str],
    retriever: Retriever,
    count: int,
    against: Sequence[np.ndarray] | None = None,
) -> Int[np.ndarray, "n k"]:
    """References of prompts, best first, −1 where there is none; the whole prompt is the query."""
    return retriever.retrieve(list(prompts), against, count)
