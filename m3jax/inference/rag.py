"""Builds prompts of the RAG baseline: references as text, from the same retriever (Memory³ §9)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from m3jax.retrieval.retriever import Retriever

HEADER = "Reference: "


def rag_prompts(
    retriever: Retriever,
    prompts: Sequence[str],
    count: int,
    against: Sequence[np.ndarray] | None = None,
) -> tuple[list[str], Int[np.ndarray, "n count"]]:
    """Puts references as text in front of prompts, the best reference last, next to the question.

    Args:
      retriever: searches with the whole prompt as the query.
      prompts: n questions.
      count: number of references per prompt.
      against: for each prompt the tokens that no reference may contain; None = no filter.

    Returns:
      The prompts, and the ids of the references in front of each, best first, −1 = none.
    """
    ids = retriever.retrieve(prompts, against, count)
    texts = [retriever.references.texts(row[row >= 0][::-1]) for row in ids]
    return [
        "".join(f"{HEADER}{text.strip()}\n\n" for text in front) + prompt
        for prompt, front in zip(prompts, texts, strict=True)
    ], ids
