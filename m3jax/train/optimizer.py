"""Optimizers: AdamW with float32 moments, Muon for the matrices of the layers; learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon

# Input and output axes of the stacked weight matrices. Axis 0 is the layer, which Muon treats as a
# batch axis; heads are not split: the query matrix has K·G·H outputs.
_MATRICES = {
    "query": MuonDimensionNumbers((1,), (2, 3, 4)),  # (layer, D, K, G, H)
    "key": MuonDimensionNumbers((1,), (2, 3)),  # (layer, D, K, H)
    "value": MuonDimensionNumbers((1,), (2, 3)),
    "output": MuonDimensionNumbers((1, 2, 3), (4,)),  # (layer, K, G, H, D)
    "gate": MuonDimensionNumbers((1,), (2,)),  # (layer, D, F)
    "up": MuonDimensionNumbers((1,), (2,)),
    "down": MuonDimensionNumbers((1,), (2,)),  # (layer, F, D)
}


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Makes the config's optimizer: clipping by the global norm, then AdamW or Muon.

    Muon updates the matrices of the layers, and AdamW then all other parameters. AdamW (Loshchilov
    & Hutter, arXiv 1711.05101) decays weights by learning rate · weight_decay, except norms and
    biases. Arithmetic and moments are float32, also for bfloat16 parameters.
    """
    clip = optax.clip_by_global_norm(config.optimizer.clip_norm)
    if config.optimizer.name == "adamw":
        return _in_float32(optax.chain(clip, _adamw(config)))
    rules = {"matrices": _muon(config), "others": _adamw(config)}
    return _in_float32(optax.chain(clip, optax.partition(rules, _by_path(_label))))


def is_decayed(path: Any) -> bool:
    """Returns True if weight decay applies to the parameter at `path`: all but norms and biases."""
    return not _leaf_name(path).endswith(("_norm", "_bias"))


def _leaf_name(path: Any) -> str:
    return str(path[-1].key)


def _by_path(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Makes a function that maps a tree of parameters to `function(path)` at each leaf."""
    return lambda params: jax.tree.map_with_path(lambda path, _: function(path), params)


def _adamw(config: ConfigDict) -> optax.GradientTransformation:
    options = config.optimizer
    return optax.chain(
        optax.scale_by_adam(options.beta1, options.beta2, options.epsilon),
        optax.add_decayed_weights(options.weight_decay, _by_path(is_decayed)),
        optax.scale_by_learning_rate(lr_schedule(config)),
    )


def _muon(config: ConfigDict) -> optax.GradientTransformation:
    return muon(
        lr_schedule(config, config.optimizer.muon_learning_rate),
        weight_decay=config.optimizer.weight_decay,
        muon_weight_dimension_numbers=_by_path(lambda path: _MATRICES[_leaf_name(path)]),
    )


def _label(path: Any) -> str:
    in_block = len(path) > 1  # parameters of layers lie inside a segment
    return "matrices" if in_block and _leaf_name(path) in _MATRICES else "others"


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(cast(updates), state, cast(params))

    return optax.GradientTransformation(lambda params: inner.init(cast(params)), update)


def lr_schedule(config: ConfigDict, peak: float | None = None) -> optax.Schedule:
    """Makes the config's learning-rate schedule: linear warmup, then `wsd` or `cosine`.

    `wsd` is warmup-stable-decay: a constant rate, then a linear decay.

    Steps count from 0: step s makes the update s + 1. The warmup reaches the peak at step
    `lr_warmup_steps − 1`; the decay would reach `min_lr_ratio · peak` at step `train.steps`.

    Args:
      config: a validated config.
      peak: peak learning rate; default `optimizer.learning_rate`.
    """
    optimizer, steps = config.optimizer, config.train.steps
    peak = optimizer.learning_rate if peak is None else peak
    rise, final = optimizer.lr_warmup_steps, optimizer.min_lr_ratio * peak
    pieces: list[tuple[int, optax.Schedule]] = []  # (first step, schedule)
    if rise:
        pieces.append((0, optax.linear_schedule(peak / rise, peak, max(1, rise - 1))))
    if optimizer.schedule == "cosine":
        length = max(1, steps - rise)
        cosine = optax.cosine_decay_schedule(peak, length, alpha=optimizer.min_lr_ratio)
        pieces.append((rise, cosine))
    else:
        fall = min(round(optimizer.lr_decay_share * steps), steps - rise)
        pieces.append((rise, optax.constant_schedule(peak)))
        if fall:
            pieces.append((steps - fall, optax.linear_schedule(peak, final, fall)))
    starts, schedules = zip(*pieces, strict=True)
    return optax.join_schedules(schedules, starts[1:])
