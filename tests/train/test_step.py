"""The objective and the step: against NumPy, over microbatches, over meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import close
from train.tiny import SyntheticPipeline, tiny_config

from m3jax.config import prefix_tokens
from m3jax.make_model import make_model
from m3jax.memory.sparsify import sparsifier
from m3jax.mesh import host_rows, make_mesh
from m3jax.model.collectives import Parallel
from m3jax.model.vocab_parallel import cross_entropy
from m3jax.train.loss import Forward, mean, objective, place_batch
from m3jax.train.state import Program
from m3jax.train.step import make_step

SOURCES = ("none", "precomputed", "online")


def model_of(config):
    return make_model(config, prefix_tokens(config), make_mesh(config))


def run(config, steps, batches=None):
    """Metrics of some steps, and the state after them."""
    mesh = make_mesh(config)
    rows, program = host_rows(mesh, config.data.batch_size), Program(config, mesh)
    state, step = program.init(), make_step(program)
    pipeline, metrics = SyntheticPipeline(config), []
    for index in range(steps):
        batch = batches[index] if batches else pipeline.batch(index)
        with jax.transfer_guard("disallow"):
            state, values = step(state, place_batch(mesh, batch, rows))
        metrics.append(jax.device_get(values))
    return metrics, jax.device_get(state)


def first_moments(state):
    """(1 − β1) · clipped gradient after one step."""
    return state.optimizer[1][0].mu


@pytest.mark.parametrize("source", SOURCES)
def test_loss_equals_numpy(source):
    config = tiny_config(source)
    model, batch = model_of(config), SyntheticPipeline(config).batch(0)
    batch = batch.for_step()

    @jax.jit
    def compute(batch):
        params = jax.jit(model.init)(jax.random.key(0))
        context = {"memory": batch.memory, "reference_tokens": batch.reference_tokens}
        logits = model.logits(params, batch.tokens, **context, sparsify=sparsifier(config.memory))
        minimised, total = objective(Forward(model, sparsifier(config.memory)), params, batch)
        return (mean(minimised, total.weight), total), logits

    (ours, total), logits = compute(batch)
    logits = np.asarray(logits, np.float64)
    summed = correct = 0.0
    for row, position in np.ndindex(batch.tokens.shape):
        weight, target = batch.weights[row, position], batch.targets[row, position]
        scores = logits[row, position]
        summed += weight * (np.log(np.exp(scores).sum()) - scores[target])
        correct += weight * (scores.argmax() == target)
    weight = batch.weights.sum()
    close(total, (summed, weight, correct))
    close(ours, summed / weight)


def test_z_loss_equals_numpy_and_is_not_reported():
    """The value against a loop over tokens, the gradient against differences of that loop."""
    rng, factor, block = np.random.default_rng(0), 0.3, 2
    x, table = rng.normal(size=(2, 4, 5)), rng.normal(size=(7, 5))
    targets, weights = rng.integers(0, 7, (2, 4)), rng.random((2, 4))

    def loops(x, table):
        minimised = plain = 0.0
        for row, position in np.ndindex(2, 4):
            scores = [
                sum(a * b for a, b in zip(x[row, position], line, strict=True)) for line in table
            ]
            normalizer = np.log(sum(np.exp(score) for score in scores))
            entropy = normalizer - scores[targets[row, position]]
            plain += weights[row, position] * entropy
            minimised += weights[row, position] * (entropy + factor * normalizer**2)
        return minimised, plain

    def ours(x, table):
        batch = jnp.asarray(targets), jnp.asarray(weights, jnp.float32)
        minimised, *rest = cross_entropy(Parallel(), x, table, *batch, block, factor)
        return minimised, rest

    arguments = [jnp.asarray(value, jnp.float32) for value in (x, table)]
    (minimised, (plain, _)), gradients = jax.value_and_grad(ours, (0, 1), has_aux=True)(*arguments)
    close((minimised, plain), loops(x, table))
    for number, gradient in enumerate(gradients):
        expected = np.empty(gradient.shape)
        for place in np.ndindex(gradient.shape):
            sides = []
            for step in (1e-5, -1e-5):
                moved = [x.copy(), table.copy()]
                moved[number][place] += step
                sides.append(loops(*moved)[0])
            expected[place] = (sides[0] - sides[1]) / 2e-5
        close(gradient, expected)


@pytest.mark.slow
def test_z_loss_changes_the_step_but_not_what_a_loss_means():
    plain, other = run(tiny_config(), 2), run(tiny_config(train__z_loss=0.1), 2)
    assert plain[0][0]["loss"] == other[0][0]["loss"]  # of the same parameters
    assert plain[0][0]["gradient_norm"] != other[0][0]["gradient_norm"]
    assert plain[0][1]["loss"] != other[0][1]["loss"]


@pytest.mark.slow
def test_normed_heads_and_z_loss_on_eight_devices_equal_one():
    """Heads of different devices share the scales of their norms."""
    changes = {"model__qk_norm": True, "train__z_loss": 0.1}
    one, eight = (run_on(mesh, "none", **changes) for mesh in ("one", "2x2x2"))
    for name in one[0][0]:
        ours, theirs = ([values[name] for values in metrics] for metrics in (eight[0], one[0]))
        close(ours, theirs, what=name)
    ours, expected = (first_moments(state) for state in (eight[1], one[1]))
    assert np.abs(expected["memory"]["key_norm"]).max() > 1e-6
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        close(x, y, 1e-4)  # steps of Adam magnify the rounding of another order


def test_batch_without_weight_has_loss_zero_and_no_gradient():
    config = tiny_config()
    batch = SyntheticPipeline(config).batch(0)._replace(weights=np.zeros((8, 16), np.float32))
    metrics, state = run(config, 1, [batch])
    assert metrics[0]["loss"] == 0 and metrics[0]["gradient_norm"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_microbatches_equal_the_whole_batch():
    whole = run(tiny_config("precomputed"), 2)
    parts = run(tiny_config("precomputed", train__microbatches=4), 2)
    for name in ("loss", "accuracy", "gradient_norm", "mean_loss"):
        ours = [values[name] for values in parts[0]]
        close(ours, [v[name] for v in whole[0]], what=name)
    ours, expected = (jax.tree.leaves(first_moments(state)) for _, state in (parts, whole))
    for x, y in zip(ours, expected, strict=True):
        close(x, y, 1e-4)  # steps of Adam magnify the rounding of another order


MESHES = {
    "one": {"fsdp": 1},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "slices": {"slice": 2, "data": 2, "fsdp": 2},
    "fsdp": {"fsdp": 8},
    "tensor": {"fsdp": 1, "tensor": 8},
}


def run_on(mesh, source, **changes):
    heads = {"model__query_heads": 16, "model__kv_heads": 8, "model__head_dim": 4}
    axes = {f"mesh__{axis}": size for axis, size in MESHES[mesh].items()}
    return run(tiny_config(source, **heads, **axes, **changes), 3)


@pytest.fixture(scope="module")
def on_one_device():
    return functools.cache(lambda source: run_on("one", source))


QUICK = {("precomputed", "slices")}  # the slow ones are the other pairs of sources and meshes
PAIRS = [(source, name) for source in SOURCES for name in MESHES if name != "one"]
PAIRS.append(("stop_gradient", "2x2x2"))


@pytest.mark.parametrize(
    ("source", "mesh"),
    [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS],
)
def test_eight_devices_equal_one(source, mesh, on_one_device):
    one = on_one_device(source)
    parts = 2 if mesh == "2x2x2" else 1
    # A loss in four blocks of a row must be that in one, too.
    eight = run_on(mesh, source, train__microbatches=parts, train__loss_block=4)
    for name in one[0][0]:
        ours = [values[name] for values in eight[0]]
        close(ours, [v[name] for v in one[0]], what=name)
    ours, expected = (jax.tree.leaves(first_moments(state)) for _, state in (eight, one))
    for x, y in zip(ours, expected, strict=True):
        close(x, y, 1e-4)  # steps of Adam magnify the rounding of another order


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "mesh"),
    [("precomputed", "fsdp"), ("online", "slices"), ("stop_gradient", "fsdp")],
)
def test_counts_of_heads_on_eight_devices_equal_one(source, mesh):
    """Layers in three groups, one of them without slots."""
    changes = {
        "model__layers": 4,
        "memory__layers": 3,
        "memory__counts": "0:0+1+2+3+4+5+6+0,2:1+1+0+0+0+0+0+1",
        "memory__selection": "reconstruction",
        "memory__each": 1,
    }
    one, eight = (run_on(name, source, **changes) for name in ("one", mesh))
    for name in one[0][0]:
        ours, theirs = ([values[name] for values in metrics] for metrics in (eight[0], one[0]))
        close(ours, theirs, what=name)
    ours, expected = (jax.tree.leaves(first_moments(state)) for _, state in (eight, one))
    for x, y in zip(ours, expected, strict=True):
        close(x, y, 1e-4)  # steps of Adam magnify the rounding of another order


def test_state_is_sharded_from_the_start():
    config = tiny_config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, optimizer__name="muon")
    state = Program(config, make_mesh(config)).init()
    sharded = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path[-2:], simple=True, separator="/")
        sharded.setdefault(name, []).append(leaf.addressable_shards[0].data.shape)
    assert sharded["memory/query"] == [(1, 8, 1, 2, 8)] * 2  # the parameter and Muon's moment
    assert sharded["params/embedding"] == [(66, 16)]
    assert sharded["mu/embedding"] == sharded["nu/embedding"] == [(66, 16)]


def test_metrics_average_since_the_last_line():
    config = tiny_config()
    assert config.train.log_every == 2
    metrics, _ = run(config, 4)
    weights = [SyntheticPipeline(config).batch(step).weights.sum() for step in range(4)]
    losses = [values["loss"] for values in metrics]
    for low in (0, 2):
        expected = np.average(losses[low : low + 2], weights=weights[low : low + 2])
        close(metrics[low]["mean_loss"], losses[low])
        close(metrics[low + 1]["mean_loss"], expected)


def test_model_learns():
    config = tiny_config(train__steps=60, optimizer__learning_rate=1e-2)
    metrics, _ = run(config, 60)
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]
