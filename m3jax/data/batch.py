"""The batch of a step: one type from the pipeline to the step and the evaluators."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from m3jax.model.attention_mask import ExplicitMemory, Packing


class Batch(NamedTuple):
    """Rows with their references; NumPy arrays of a pipeline, arrays on the mesh in a step.

    tokens, targets: `(B, T)` int32.
    weights: of the targets, `(B, T)` float32.
    memory: axes `(L, B, C, M, K, P, H)`, or as the bank stores it (`Codec.dequantize`); of
      `memory.source = precomputed`.
    reference_tokens: `(B, C, M, W)` int32; of references that are encoded in the step.
    reference_ids: `(B, C, M)` int32, −1 = none; None without references, and in a step.
    packing: of rows of several texts, else None.
    answers: of pairs, slot of the answer that a target belongs to, `(B, T)` int32, −1 = none. Slots
      2p and 2p + 1 are the chosen and the rejected answer of pair p.
    base_logprobs: of pairs, log-probability of every answer under the base model, `(B, slots)`
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
        """Returns the batch without reference ids, which no step reads."""
        return self._replace(reference_ids=None)

    def row_axes(self) -> Any:
        """Returns a batch of the number of the axis of rows in every array."""
        axes = jax.tree.map(lambda _: 0, self)
        if self.memory is None:
            return axes
        return axes._replace(memory=axes.memory._replace(keys=1, values=1))
