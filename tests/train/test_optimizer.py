"""Schedules and update rules against NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerance import close
from train.tiny import tiny_config

from m3jax.config import PREFIX_TOKENS
from m3jax.make_model import make_model
from m3jax.train.optimizer import is_decayed, lr_schedule, make_optimizer


def rates(config):
    return np.array([float(lr_schedule(config)(step)) for step in range(config.train.steps)])


def test_wsd_rises_stays_and_falls():
    config = tiny_config(
        train__steps=20,
        optimizer__lr_warmup_steps=4,
        optimizer__lr_decay_share=0.25,
        optimizer__min_lr_ratio=0.1,
        optimizer__learning_rate=1.0,
    )
    expected = [0.25, 0.5, 0.75, 1.0] + [1.0] * 12 + [0.82, 0.64, 0.46, 0.28]
    close(rates(config), [*expected[:15], 1.0, *expected[16:]])


@pytest.mark.parametrize("rise", [0, 1])
def test_wsd_without_rise_or_fall_is_constant(rise):
    config = tiny_config(optimizer__lr_warmup_steps=rise, optimizer__lr_decay_share=0.0)
    close(rates(config), config.optimizer.learning_rate)


def test_cosine():
    config = tiny_config(
        train__steps=12,
        optimizer__schedule="cosine",
        optimizer__lr_warmup_steps=2,
        optimizer__learning_rate=1.0,
        optimizer__min_lr_ratio=0.2,
    )
    share = np.arange(10) / 10
    cosine = 0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * share))
    close(rates(config), [0.5, 1.0, *cosine])


def parameters(config, seed=0):
    model = make_model(config, PREFIX_TOKENS)
    rng = np.random.default_rng(seed)

    def normal(leaf):
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)

    shapes, _ = model.abstract()
    return jax.tree.map(normal, shapes), jax.tree.map(normal, shapes)


def clipped(gradients, config):
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
    return {k: g * min(1.0, config.optimizer.clip_norm / norm) for k, g in gradients.items()}


def flat(tree):
    """Arrays of a tree by their path, as float64."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path: np.asarray(leaf.astype(jnp.float32), np.float64) for path, leaf in leaves}


def adamw_in_numpy(config, params, gradients, steps):
    """AdamW (arXiv 1711.05101, algorithm 2) with the same gradients at every step."""
    o = config.optimizer
    params, gradients = flat(params), clipped(flat(gradients), config)
    first, second = ({k: np.zeros_like(p) for k, p in params.items()} for _ in range(2))
    for step in range(steps):
        rate = float(lr_schedule(config)(step))
        for k, p in params.items():
            first[k] = o.beta1 * first[k] + (1 - o.beta1) * gradients[k]
            second[k] = o.beta2 * second[k] + (1 - o.beta2) * gradients[k] ** 2
            m = first[k] / (1 - o.beta1 ** (step + 1))
            v = second[k] / (1 - o.beta2 ** (step + 1))
            decay = 0.0 if str(k[-1].key).endswith(("_norm", "_bias")) else o.weight_decay
            params[k] = p - rate * (m / (np.sqrt(v) + o.epsilon) + decay * p)
    return params


def updated(config, params, gradients, steps):
    optimizer = make_optimizer(config)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = update(params, state)
    return params, state


def test_adamw_equals_a_numpy_loop():
    config = tiny_config(model__attention_bias=True, optimizer__weight_decay=0.5)
    params, gradients = parameters(config)
    ours = flat(updated(config, params, gradients, 4)[0])
    expected = adamw_in_numpy(config, params, gradients, 4)
    for path in expected:
        close(ours[path], expected[path])


def test_norms_and_biases_are_not_decayed():
    params, _ = parameters(tiny_config(model__attention_bias=True))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kept = {str(path[-1].key) for path, _ in leaves if not is_decayed(path)}
    biases = {"query_bias", "key_bias", "value_bias"}
    assert kept == {"attention_norm", "mlp_norm", "final_norm"} | biases


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_of_bfloat16_parameters_are_float32(name):
    config = tiny_config(model__param_dtype="bfloat16", optimizer__name=name)
    params, gradients = parameters(config)
    params, state = updated(config, params, gradients, 1)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    moments = [x for x in jax.tree.leaves(state) if x.ndim and x.shape != (3,)]
    assert len(moments) >= len(jax.tree.leaves(params))
    assert {x.dtype for x in moments} == {jnp.dtype("float32")}


def newton_schulz(matrix):
    """Muon's five steps (github.com/KellerJordan/Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_muon_orthogonalises_every_layer_as_one_matrix():
    config = tiny_config(
        memory__layers=2,
        optimizer__name="muon",
        optimizer__weight_decay=0.5,
        optimizer__lr_warmup_steps=0,
    )
    params, gradients = parameters(config)
    ours, before, slope = (
        flat(t) for t in (updated(config, params, gradients, 1)[0], params, gradients)
    )
    adamw = adamw_in_numpy(config, params, gradients, 1)
    rate, decay = config.optimizer.muon_learning_rate, config.optimizer.weight_decay
    D = config.model.hidden
    matrices = {"query": (D, -1), "key": (D, -1), "value": (D, -1), "output": (-1, D)}
    matrices |= {"gate": (D, -1), "up": (D, -1), "down": (-1, D)}
    for path, p in before.items():
        name = str(path[-1].key)
        if name not in matrices:
            close(ours[path], adamw[path], what=name)
            continue
        for layer in range(2):
            step = newton_schulz(slope[path][layer].reshape(matrices[name]))
            scale = np.sqrt(max(1, step.shape[1] / step.shape[0]))
            expected = p[layer] - rate * (scale * step.reshape(p[layer].shape) + decay * p[layer])
            close(ours[path][layer], expected, 1e-4, what=name)
