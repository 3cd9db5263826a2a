"""Direct preference optimisation (DPO; Memory³ §6.4): the objective of preference pairs.

    loss = −log σ( β · [ log π(chosen) − log π₀(chosen) − log π(rejected) + log π₀(rejected) ] )

with log-probabilities of whole answers, π the model and π₀ the base model. The batch carries the
log-probabilities under π₀ (`m3jax.train.dpo_base`), so that only the weights of π are loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from m3jax.data.batch import Batch
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.train.loss import Forward, Sums, objective


def objective_of(config: ConfigDict) -> Callable[..., tuple[Array, Sums]]:
    """Returns the objective of a stage: `preference_objective` for pairs, else `objective`."""
    if config.data.packing != "pairs":
        return objective
    return functools.partial(preference_objective, beta=config.preference.beta)


def answer_logprobs(forward: Forward, params: Params, batch: Batch) -> Float[Array, "B slots"]:
    """Computes the log-probability of each answer in nats, without a gradient; 0 in empty slots.

    Only the shape of the batch's `base_logprobs` is read.
    """
    return _by_answer(forward.model, params, forward.hidden(params, batch), batch)[0]


def _by_answer(
    model: Model, params: Params, hidden: Array, batch: Batch
) -> tuple[Float[Array, "B slots"], Float[Array, "B T slots"]]:
    """Returns the log-probability of each answer, and the weight of every token in each answer."""
    assert batch.answers is not None and batch.base_logprobs is not None
    slots = batch.base_logprobs.shape[1]
    share_BTS = jax.nn.one_hot(batch.answers, slots, dtype=jnp.float32)  # −1 is in none
    share_BTS = share_BTS * batch.weights.astype(jnp.float32)[..., None]
    losses = model.token_losses(params, jax.lax.stop_gradient(hidden), batch.targets)
    return -jnp.sum(share_BTS * losses[..., None], axis=1), share_BTS


def preference_objective(
    forward: Forward, params: Params, batch: Batch, *, beta: float
) -> tuple[Float[Array, ""], Sums]:
    """Returns the sum to minimise over the pairs of a batch, and the sums to report.

    The reported sums, which have no gradient, are the DPO loss (nats), the number of pairs, and the
    number of pairs with a margin above 0: the chosen answer has gained more log-probability over
    the base model than the rejected answer.

    The minimised sum has the value and the gradient of the loss; the gradient is computed as one
    weighted cross-entropy, since ∂loss/∂log π(answer) is the same for all tokens of an answer.

    Args:
      forward, params: the model and its parameters.
      batch: rows of preference pairs.
      beta: β, `preference.beta` of the config.
    """
    model, hidden = forward.model, forward.hidden(params, batch)
    logprobs_BS, share_BTS = _by_answer(model, params, hidden, batch)
    assert batch.base_logprobs is not None
    gain_BS = logprobs_BS - batch.base_logprobs.astype(jnp.float32)
    real = (jnp.sum(share_BTS, axis=1) > 0)[:, 0::2].astype(jnp.float32)
    margin = beta * (gain_BS[:, 0::2] - gain_BS[:, 1::2])
    total = jnp.sum(real * jax.nn.softplus(-margin))
    # −∂loss/∂log π of the chosen answer; the rejected answer has the opposite sign.
    slope = real * beta * jax.nn.sigmoid(-margin)
    slope_BS = jnp.stack([slope, -slope], axis=-1).reshape(gain_BS.shape)
    weights_BT = jax.lax.stop_gradient(jnp.sum(share_BTS * slope_BS[:, None], axis=-1))
    linear, _, _ = model.summed_loss(params, hidden, batch.targets, weights_BT)
    minimised = linear + jax.lax.stop_gradient(total - linear)
    return minimised, Sums(total, jnp.sum(real), jnp.sum(real * (margin > 0)))
