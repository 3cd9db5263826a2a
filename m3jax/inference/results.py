"""Results of generation: the text of a row, the memories that it read, and the time it took."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from m3jax.inference.retrieval_schedule import MemoryRetrieval


@dataclasses.dataclass(frozen=True)
class ChunkMemories:
    """Memories that one retrieval put in front of a chunk.

    Attributes:
      retrieval: its tokens; see `retrieval_schedule`.
      query: the text that was searched for.
      ids: references that were read, best first; −1 = none.
      reading: attention weight that each memory received of the queries that generated the chunk's
        tokens, and everything else in the last column, mean over these tokens; `(L, K, G, M + 1)`,
        L memory layers. None unless observed, and for prompt chunks.
    """

    retrieval: MemoryRetrieval
    query: str
    ids: Int[np.ndarray, " M"]
    reading: Float[np.ndarray, "L K G columns"] | None = None


@dataclasses.dataclass(frozen=True)
class Generation:
    """Text generated for one prompt.

    Attributes:
      prompt: its text.
      prompt_tokens: with BOS.
      tokens: generated tokens, a stop token included.
      logprobs: of these, natural logarithm, before temperature and cuts.
      text: of the generated tokens.
      stopped: whether a stop token ended it.
      chunks: memories of every chunk; empty without memory.
      by_token: attention weight on each memory of the chunk, and on everything else, of the query
        that generated each token, mean over memory layers and heads; None unless observed.
    """

    prompt: str
    prompt_tokens: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, " new"]
    logprobs: Float[np.ndarray, " new"]
    text: str
    stopped: bool
    chunks: list[ChunkMemories]
    by_token: Float[np.ndarray, "new columns"] | None = None


@dataclasses.dataclass
class Timing:
    """Times of one call of `Generator.generate`.

    Attributes:
      seconds: altogether.
      first_token: until the first token of every row was there.
      waited: in which the host did nothing but wait for the device.
      tokens: generated, over all rows.
      state_bytes: on the device, of keys and values of the context and of the memories in front.
    """

    seconds: float = 0.0
    first_token: float = 0.0
    waited: float = 0.0
    tokens: int = 0
    state_bytes: int = 0
