"""Which tokens are kept: against loops over one reference at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import close

from m3jax.memory.sparsify import select, sparsify, token_weights

R, W, K, G, H, P = 4, 9, 2, 3, 4, 4
USABLE = np.arange(W) < np.array([9, 5, 2, 0])[:, None]


def arrays(seed: int = 0, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(seed)
    q, k = random.normal(size=(R, W, K, G, H)), random.normal(size=(R, W, K, H))
    return jnp.asarray(scale * q, jnp.float32), jnp.asarray(k, jnp.float32)


def loops(q: Any, k: Any, selection: str) -> np.ndarray:
    """w of Memory³ §3.3 in float64, each reference cut to its usable tokens."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    result = np.full((R, K, W), -np.inf)
    for r, head in np.ndindex(R, K):
        n = USABLE[r].sum()
        result[r, head, :n] = 0
        for g in range(G):
            for i in range(n):
                scores = np.exp([q[r, i, head, g] @ k[r, j, head] / H**0.5 for j in range(n)])
                result[r, head, :n] += scores / scores.sum() if selection == "exact" else scores
    return result


def test_exact_weights() -> None:
    q, k = arrays()
    found = np.asarray(token_weights(q, k, jnp.asarray(USABLE), "exact"))
    expected = loops(q, k, "exact")
    close(found, expected)
    # Every usable query gives one unit of attention for each query head.
    total = np.where(USABLE[:, None], found, 0).sum(-1)
    close(total, np.broadcast_to(G * USABLE.sum(1)[:, None], (R, K)))


def test_approximate_weights_up_to_one_factor_a_head() -> None:
    q, k = arrays()
    found = np.asarray(token_weights(q, k, jnp.asarray(USABLE), "approximate"))
    expected = loops(q, k, "approximate")
    for r, head in np.ndindex(R - 1, K):
        n = USABLE[r].sum()
        factor = expected[r, head, 0] / found[r, head, 0]
        close(factor * found[r, head, :n], expected[r, head, :n])
    assert (found[3] == -np.inf).all()


@pytest.mark.parametrize("selection", ["exact", "approximate"])
def test_large_scores_do_not_overflow(selection: str) -> None:
    q, k = arrays(scale=1e4)
    weights = np.asarray(token_weights(q, k, jnp.asarray(USABLE), selection))
    assert np.isfinite(weights[:, :, 0][:3]).all() and not np.isnan(weights).any()


def test_the_rules_differ() -> None:
    q, k = arrays(scale=2.0)
    usable = jnp.asarray(USABLE)
    exact, approximate = (
        np.asarray(select(q, k, usable, kept=P, selection=rule)[0])
        for rule in ("exact", "approximate")
    )
    assert (exact != approximate).any()


@pytest.mark.parametrize("selection", ["exact", "approximate"])
def test_the_heaviest_are_kept_in_reference_order(selection: str) -> None:
    q, k = arrays()
    rotated, v = arrays(1)[1], arrays(2)[1]
    written = sparsify(q, k, rotated, v, jnp.asarray(USABLE), kept=P, selection=selection)
    np.testing.assert_array_equal(written.length, [4, 4, 2, 0])
    weights = loops(q, k, selection)
    for r, head in np.ndindex(R, K):
        n = int(written.length[r])
        kept = sorted(np.argsort(-weights[r, head], kind="stable")[:n])
        assert list(written.indices[r, head, :n]) == kept
        for stored, source in ((written.keys, rotated), (written.values, v)):
            np.testing.assert_array_equal(stored[r, head, :n], source[r, kept, head])
            assert not np.asarray(stored[r, head, n:]).any()
        assert not np.asarray(written.indices[r, head, n:]).any()


def test_of_equal_weights_the_earlier_token_wins() -> None:
    q, k = jnp.zeros((1, 6, 1, 1, 4)), jnp.zeros((1, 6, 1, 4))
    usable = jnp.asarray([[False, True, True, True, True, False]])
    indices, length = select(q, k, usable, kept=3, selection="exact")
    np.testing.assert_array_equal(indices, [[[1, 2, 3]]])
    np.testing.assert_array_equal(length, [3])


def test_gradients_flow_to_what_is_kept_and_not_to_the_choice() -> None:
    q, k = arrays()
    rotated, v = arrays(1)[1], arrays(2)[1]
    usable = jnp.asarray(USABLE)

    def loss(q: Any, k: Any, rotated: Any, v: Any) -> Any:
        written = sparsify(q, k, rotated, v, usable, kept=P, selection="exact")
        return jnp.sum(written.keys) + 2 * jnp.sum(written.values)

    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, rotated, v)
    indices, length = select(q, k, usable, kept=P, selection="exact")
    expected = np.zeros((R, W, K))
    for r, head in np.ndindex(R, K):
        expected[r, np.asarray(indices)[r, head, : length[r]], head] = 1
    assert not np.asarray(gradients[0]).any() and not np.asarray(gradients[1]).any()
    for gradient, factor in zip(gradients[2:], (1, 2), strict=True):
        np.testing.assert_array_equal(
            gradient, np.broadcast_to(factor * expected[..., None], (R, W, K, H))
        )
