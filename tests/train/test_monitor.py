"""What the monitor calls trouble, and what it does not."""

import json
import math

import numpy as np
import pytest
from train.tiny import tiny_config

from m3jax.train.monitor import DIVERGENCE, NOT_FINITE, SPIKE, Monitor

STEPS = 1500


def healthy(seed, steps=STEPS):
    """Losses that fall from 8 to about 2.5 with long-tailed noise, and their gradient norms."""
    rng, step = np.random.default_rng(seed), np.arange(1, steps + 1)
    losses = 2.4 + 5.6 * step**-0.5 + 0.05 * rng.standard_t(4, steps)
    return losses, np.exp(0.3 * rng.standard_normal(steps) + 2.0 * (rng.random(steps) < 0.01))


def watch(losses, norms, **changes):
    """The first trouble, or None."""
    monitor = Monitor(tiny_config(**changes), {})
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1):
        trouble = monitor.observe(step, loss, norm)
        if trouble is not None:
            return trouble
    return None


@pytest.mark.parametrize("seed", range(4))
def test_a_healthy_run_is_left_alone(seed):
    losses, norms = healthy(seed)
    assert watch(losses, norms) is None
    # Memory begins to be read: the loss falls at once, and gradients are wild meanwhile.
    losses[700:] -= 1.0
    norms[700:730] *= 1000
    assert watch(losses, norms) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_is_seen_at_once(value, which):
    series = healthy(0)
    for at in (0, 40):
        changed = [np.array(x) for x in series]
        changed[which][at] = value
        trouble = watch(*changed)
        assert trouble[:4] == (NOT_FINITE, at + 1, at + 1, at + 1)
        assert str(value) in trouble.words


def test_a_spike_is_several_bad_steps_close_together():
    losses, norms = healthy(0)
    losses[[400, 500, 600]] += 5  # single bad batches are no trouble
    assert watch(losses, norms) is None
    losses[[902, 904, 905]] += 5
    assert watch(losses, norms)[:4] == (SPIKE, 903, 906, 906)
    assert watch(losses, norms, guard__patience=1)[:4] == (SPIKE, 401, 401, 401)


def test_large_gradients_count_where_the_loss_is_high_too():
    losses, norms = healthy(0)
    norms[800:810] *= 1e5
    losses[800:810] += 0.2  # within the noise
    trouble = watch(losses, norms)
    assert trouble[:3] == (SPIKE, 801, 803) and "gradient norm" in trouble.words


def test_slow_divergence_names_the_last_good_step():
    losses, norms = healthy(0)
    losses[900:] += 0.002 * np.arange(STEPS - 900)
    trouble = watch(losses, norms)
    assert trouble.reason == DIVERGENCE
    assert 850 < trouble.first == trouble.last < 1000 and 1000 < trouble.seen < 1300
    assert watch(losses[:900], norms[:900]) is None


def test_a_run_that_diverges_from_its_first_steps_is_seen():
    """Nothing normal comes before: a learning rate that is far too high."""
    rng = np.random.default_rng(0)
    losses = 8 + 6 * (1 - np.exp(-np.arange(200) / 10)) + 0.3 * rng.standard_normal(200)
    trouble = watch(losses, np.full(200, 2.0))
    assert trouble.reason == DIVERGENCE and trouble.first <= 32 and trouble.seen <= 64


@pytest.mark.parametrize("seed", range(4))
def test_a_rise_in_the_first_window_is_no_noise(seed):
    """A good checkpoint and a learning rate that rises to far too much, as a real run had it."""
    rng, steps = np.random.default_rng(seed), np.arange(1, 201)
    losses = 0.3 + np.clip(0.08 * (steps - 15), 0, 2.6) + 0.12 * rng.standard_normal(200)
    trouble = watch(losses, np.full(200, 2.0), guard__window=128)
    assert trouble.reason == DIVERGENCE and trouble.first <= 32 and trouble.seen <= 45
    calm = 0.3 + 0.12 * rng.standard_normal(200)
    assert watch(calm, np.full(200, 2.0), guard__window=128) is None


def test_a_monitor_goes_on_where_another_was():
    losses, norms = healthy(1)
    losses[1300:] += 5
    expected = watch(losses, norms)
    for stop in (1, 7, 500, 1301):
        monitor = Monitor(tiny_config(), {})
        for step in range(1, stop + 1):
            assert monitor.observe(step, losses[step - 1], norms[step - 1]) is None
        monitor = Monitor(tiny_config(), json.loads(json.dumps(monitor.state())))
        found = (
            monitor.observe(step, losses[step - 1], norms[step - 1])
            for step in range(stop + 1, STEPS + 1)
        )
        assert next(trouble for trouble in found if trouble) == expected


def test_a_batch_without_weight_has_no_gradient_and_is_no_trouble():
    losses, norms = healthy(2)
    losses[100], norms[100] = 0.0, 0.0
    assert watch(losses, norms) is None
