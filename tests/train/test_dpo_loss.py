"""DPO: the loss and its gradient against the formula, and what a step does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import close
from train.tiny import tiny_config

from m3jax.config import PREFIX_TOKENS
from m3jax.data.batch import Batch
from m3jax.make_model import make_model
from m3jax.mesh import make_mesh
from m3jax.model.attention_mask import Packing
from m3jax.train.dpo_loss import answer_logprobs, objective_of, preference_objective
from m3jax.train.loss import Forward, objective
from m3jax.train.state import Program
from m3jax.train.step import make_step

BETA = 0.3
ANSWERS = ((2, 5), (7, 8), (9, 11), (13, 14))  # chosen, rejected, chosen, rejected


def config_of(**changes):
    return tiny_config(data__packing="pairs", data__batch_size=2, preference__beta=BETA, **changes)


def as_arrays(batch):
    return jax.tree.map(jnp.asarray, batch)


def batch_of(seed=0):
    """Two rows of 16: two pairs in the first, one in the second."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(4, 264, (2, 2, 16), dtype=np.int32)
    starts = np.repeat([0, 6, 8, 12], [6, 2, 4, 4]).astype(np.int32)
    first = np.repeat([0, 2, 3, 4], [6, 2, 4, 4]).astype(np.int32)
    answers = np.full((2, 16), -1, np.int32)
    for slot, span in enumerate(ANSWERS):
        answers[0, slice(*span)] = slot
    for slot, span in enumerate(ANSWERS[:2]):
        answers[1, slice(*span)] = slot
    logprobs = np.where([[1] * 4, [1, 1, 0, 0]], rng.normal(-9, 3, (2, 4)), 0)
    return as_arrays(
        Batch(
            tokens,
            targets,
            (answers >= 0).astype(np.float32),
            packing=Packing(np.stack([starts] * 2), np.stack([first] * 2)),
            answers=answers,
            base_logprobs=logprobs.astype(np.float32),
        )
    )


def by_hand(model, params, batch):
    """Losses of the three pairs, from the logits, by the formula; differentiable."""
    packing = batch.packing
    logits = model.logits(params, batch.tokens, packing=packing)
    scores = jax.nn.log_softmax(logits)
    losses = []
    for row, pairs in ((0, 2), (1, 1)):
        for pair in range(pairs):
            ratio = []
            for slot in (2 * pair, 2 * pair + 1):
                span = range(*ANSWERS[slot])
                own = sum(scores[row, t, batch.targets[row, t]] for t in span)
                ratio.append(own - batch.base_logprobs[row, slot])
            losses.append(-jnp.log(1 / (1 + jnp.exp(-BETA * (ratio[0] - ratio[1])))))
    return jnp.stack(losses)


@pytest.fixture(scope="module")
def made():
    config = config_of(train__loss_block=4)
    model = make_model(config, PREFIX_TOKENS)
    return config, model, jax.jit(model.init)(jax.random.key(3)), batch_of()


def test_loss_is_the_formula_in_numpy(made):
    _, model, params, batch = made
    packing = batch.packing
    logits = jax.jit(model.logits)(params, batch.tokens, packing=packing)
    logits = np.asarray(logits, np.float64)
    losses, correct = [], 0
    logprobs = np.zeros((2, 4))
    for row, slots in ((0, 4), (1, 2)):
        for slot in range(slots):
            for t in range(*ANSWERS[slot]):
                z = logits[row, t]
                own = z[batch.targets[row, t]] - np.log(np.exp(z - z.max()).sum()) - z.max()
                logprobs[row, slot] += own
        for chosen in range(0, slots, 2):
            gain = logprobs[row] - batch.base_logprobs[row]
            h = gain[chosen] - gain[chosen + 1]
            losses.append(-np.log(1 / (1 + np.exp(-BETA * h))))
            correct += h > 0
    total = preference_objective(Forward(model), params, batch, beta=BETA)[1]
    close(total.loss, np.sum(losses))
    assert (float(total.weight), float(total.correct)) == (3, correct)
    found = answer_logprobs(Forward(model), params, batch)
    close(found, logprobs)


def test_gradient_is_that_of_the_formula(made):
    _, model, params, batch = made
    expected = jax.jit(jax.grad(lambda p: by_hand(model, p, batch).sum()))(params)
    found = jax.jit(
        jax.grad(lambda p: preference_objective(Forward(model), p, batch, beta=BETA)[0])
    )(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        want = expected
        for key in path:
            want = want[key.key]
        close(leaf, want, 1e-4, what=str(path))


@pytest.mark.slow
def test_a_step_makes_the_chosen_answer_likelier_and_the_other_less(made):
    """A toy: one pair that differs in one token."""
    _, model, params, _ = made
    answers = np.full((1, 16), -1, np.int32)
    answers[0, [5, 7]] = 0, 1
    batch = jax.tree.map(lambda x: np.array(x[1:]), batch_of())
    batch = batch._replace(answers=answers, weights=(answers >= 0).astype(np.float32))
    batch = as_arrays(batch)
    logprobs = jax.jit(lambda p: answer_logprobs(Forward(model), p, batch))
    before = logprobs(params)
    batch = batch._replace(base_logprobs=before)
    loss = jax.jit(lambda p: preference_objective(Forward(model), p, batch, beta=BETA)[0])
    close(loss(params), np.log(2))  # nothing has changed yet
    gradient = jax.jit(jax.grad(loss))(params)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    gain = np.asarray(logprobs(moved) - before)[0]
    assert gain[0] > 0 > gain[1]
    assert float(loss(moved)) < np.log(2)


def test_the_objective_follows_the_config(made):
    assert objective_of(made[0]).func is preference_objective
    assert objective_of(tiny_config()) is objective


def train_on(changes, params, batch):
    changes = {"model__prefix": "always", "train__steps": 8, **changes}
    config = config_of(optimizer__learning_rate=3e-3, **changes)
    mesh = make_mesh(config, jax.devices()[: config.mesh.fsdp * config.mesh.tensor])
    program = Program(config, mesh)
    state = program.init(jax.device_put(params, program.shardings.params))
    step, losses = make_step(program), []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, float(metrics["accuracy"])


@pytest.mark.slow
def test_training_lowers_the_loss_and_alike_on_every_mesh(made):
    _, model, params, batch = made
    batch = batch._replace(base_logprobs=answer_logprobs(Forward(model), params, batch))
    losses, accuracy = train_on({"train__microbatches": 2}, params, batch)
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5)
    assert losses[-1] < 0.6 and accuracy == 1
    split = train_on({"mesh__fsdp": 2, "mesh__tensor": 2}, params, batch)
    close(split[0], losses, 1e-4)
