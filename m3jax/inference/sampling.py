"""Samples the next token from the logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m3jax.errors import InferenceError
from m3jax.random_key import LARGEST_SEED, random_key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Samples tokens from logits; greedy by default.

    A row's samples depend on the seed, its row id, the number of tokens generated before, and its
    logits, not on the other rows of the batch.

    Attributes:
      temperature: divides the logits; 0, or less than float32 can hold, takes the likeliest token.
      top_k: sample from this many of the likeliest tokens only; 0 = all.
      top_p: sample from the fewest of the likeliest tokens whose probabilities sum up to this.
      seed: of the sampling, from 0 to 2^64 − 1.

    Raises:
      InferenceError: temperature or top_k below 0, top_p outside (0, 1], or an unusable seed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, accepted in (
            ("temperature", self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 is all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", 0 <= self.seed <= LARGEST_SEED, f"from 0 to {LARGEST_SEED}"),
        ):
            if not good:
                raise InferenceError(f"{name} = {getattr(self, name)}; it must be {accepted}")

    def __call__(
        self, logits_BV: Float[Array, "B V"], rows_B2: Int[Array, "B 2"], number: Int[Array, ""]
    ) -> Int[Array, " B"]:
        """Samples the token with index `number` of each row; `rows_B2` as `State.rows`."""
        if self.temperature < np.finfo(np.float32).tiny:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        # The largest is 0 afterwards, whatever the temperature.
        logits_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / self.temperature
        if self.top_k and self.top_k < logits_BV.shape[-1]:
            least = jax.lax.top_k(logits_BV, self.top_k)[0][:, -1:]
            logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
        if self.top_p < 1:
            logits_BV = _nucleus(logits_BV, self.top_p)
        fold, key = jax.vmap(jax.random.fold_in, (0, 0)), random_key(self.seed)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number + rows_B2[:, 1])
        keys = fold(keys, rows_B2[:, 0])
        return jax.vmap(jax.random.categorical)(keys, logits_BV).astype(jnp.int32)


def _nucleus(logits_BV: Array, top_p: float) -> Array:
    """Sets logits to −∞ except for the fewest tokens whose probabilities sum up to `top_p`."""
    ordered = jnp.sort(logits_BV, axis=-1, descending=True)
    share = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
    least = jnp.take_along_axis(ordered, kept - 1, axis=-1)
    return jnp.where(logits_BV < least, -jnp.inf, logits_BV)
