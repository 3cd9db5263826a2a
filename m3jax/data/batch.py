"""The batch type shared by the pipeline, the training step and the evaluators."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from m3jax.model.attention_mask import ExplicitMemory, Packing


class Batch(NamedTuple):
    """Rows of tokens with their references or memories.

    The pipeline makes NumPy arrays; in the step they are JAX arrays on the mesh.

    tokens, targets: `(B, T)` int32.
    weights: loss weight of every target, `(B, T)` float32.
    memory: memories read from a bank (`memory.source = precomputed`), with axes
      `(L, B, C, M, K, P, H)`, or as the bank stores them, before `Codec.dequantize`.
    reference_tokens: tokens of references that the step encodes itself, `(B, C, M, W)` int32.
    reference_ids: `(B, C, M)` int32, −1 = no reference; None without references, and in the step.
    packing: position of every text in rows that hold several; else None.
    answers: answer slot of every target in preference pairs, `(B, T)` int32, −1 = no answer. Slots
      2p and 2p + 1 are the chosen and the rejected answer of pair p.
    base_logprobs: log-probability of every answer of the pairs under the base model, `(B, slots)`
      float32, nats.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    memory: ExplicitMemory | None = None
    reference_tokens: Int[Array, "B C M W"] | None = None
    reference_ids: Int[Array, "B C M"] | None = None
    packing: Packing | None = None
    answers: Int[Array, "B T"] | None = None
    base_logprobs: Float[Array, "B slots"] | None = None

    def for_step(self) -> Batch:
        """Returns the batch without reference ids, which the step does not read."""
        return self._replace(reference_ids=None)

    def row_axes(self) -> Any:
        """Returns a batch that holds the index of the batch axis B in place of every array."""
        axes = jax.tree.map(lambda _: 0, self)
        if self.memory is None:
            return axes
        return axes._replace(memory=axes.memory._replace(keys=1, values=1))
