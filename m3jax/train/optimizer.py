"""Update rules: AdamW with float32 moments, and Muon for the matrices of the blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon

from m3jax.train.schedule import lr_schedule

# Axes of a stacked matrix that a product sums over, and those it makes. Axis 0 is the layer, which
# Muon treats as a batch; heads are not split: the query makes K·G·H outputs at once.
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
    """Makes clipping by the global norm, then AdamW; with `muon`, Muon for the blocks' matrices.

    AdamW (Loshchilov & Hutter, arXiv 1711.05101) decays weights by learning rate · weight_decay,
    but not norms and biases. Arithmetic and moments are float32, also for bfloat16 parameters.
    """
    clip = optax.clip_by_global_norm(config.optimizer.clip_norm)
    if config.optimizer.name == "adamw":
        return _in_float32(optax.chain(clip, _adamw(config)))
    rules = {"matrices": _muon(config), "others": _adamw(config)}
    return _in_float32(optax.chain(clip, optax.partition(rules, _labels)))


def is_decayed(path: Any) -> bool:
    """Returns whether weight decay applies to a parameter: not to norms and biases."""
    return not _leaf_name(path).endswith(("_norm", "_bias"))


def _leaf_name(path: Any) -> str:
    return str(path[-1].key)


def _decay_mask(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: is_decayed(path), params)


def _adamw(config: ConfigDict) -> optax.GradientTransformation:
    options = config.optimizer
    return optax.chain(
        optax.scale_by_adam(options.beta1, options.beta2, options.epsilon),
        optax.add_decayed_weights(options.weight_decay, _decay_mask),
        optax.scale_by_learning_rate(lr_schedule(config)),
    )


def _muon(config: ConfigDict) -> optax.GradientTransformation:
    return muon(
        lr_schedule(config, config.optimizer.muon_learning_rate),
        weight_decay=config.optimizer.weight_decay,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: _MATRICES[_leaf_name(path)], params
        ),
    )


def _labels(params: Any) -> Any:
    def label(path: Any, _: Any) -> str:
        in_block = len(path) > 1  # parameters of the blocks lie inside a segment
        return "matrices" if in_block and _leaf_name(path) in _MATRICES else "others"

    return jax.tree_util.tree_map_with_path(label, params)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(cast(updates), state, cast(params))

    return optax.GradientTransformation(lambda params: inner.init(cast(params)), update)
