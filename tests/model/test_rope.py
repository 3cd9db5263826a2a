"""RoPE against rotations of complex numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from model.oracle import oracle_config
from tolerance import close, error

from m3jax.model.rope import Rope, rotate, space_out, turned_layers


@pytest.mark.parametrize("heads", [(3,), (2, 3)])
def test_pairs_are_rotated_complex_numbers(heads: tuple[int, ...]) -> None:
    random, H = np.random.default_rng(0), 8
    x = random.normal(size=(2, 5, *heads, H)).astype(np.float32)
    positions = np.array([0, 1, 7, 130, 2047])
    found = np.asarray(rotate(jnp.asarray(x), jnp.asarray(positions), Rope(10000.0)))
    expected = np.empty_like(x)
    for b, t, *head in np.ndindex(x.shape[:-1]):
        place = (b, t, *head)
        for i in range(H // 2):
            number = complex(x[place][i], x[place][i + H // 2])
            turned = number * np.exp(1j * positions[t] * 10000.0 ** (-2 * i / H))
            expected[place][i], expected[place][i + H // 2] = turned.real, turned.imag
    close(found, expected, 3e-4)  # angles up to 2047
    np.testing.assert_array_equal(found[:, 0], x[:, 0])  # position 0 turns nothing
    close(np.linalg.norm(found, axis=-1), np.linalg.norm(x, axis=-1))


def test_rows_may_have_their_own_positions() -> None:
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 4, 8)).astype(np.float32))
    positions = jnp.array([[0, 1, 2], [7, 3, 3]])
    found = rotate(x, positions, Rope(100.0))
    for row in range(2):
        alone = rotate(x[row : row + 1], positions[row], Rope(100.0))
        np.testing.assert_array_equal(found[row : row + 1], alone)


def test_scores_depend_on_the_distance_alone() -> None:
    random = np.random.default_rng(1)
    q, k = random.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(i: int, j: int) -> float:
        a, b = (rotate(jnp.asarray(x), jnp.array([n]), Rope(100.0)) for x, n in ((q, i), (k, j)))
        return float(jnp.sum(a * b))

    size = float(np.linalg.norm(q) * np.linalg.norm(k))
    close(score(9, 4), score(25, 20), size=size)
    assert error(score(9, 4), score(9, 5), size=size) > 1e-3


def test_dtype_is_kept() -> None:
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    assert rotate(x, jnp.arange(2), Rope(10.0)).dtype == jnp.bfloat16


def test_memories_move_back_by_their_rank() -> None:
    """As if each had been written at positions of its own, also with a factor on keys (YaRN)."""
    rope, random = Rope(100.0, magnitude=1.5), np.random.default_rng(4)
    plain = jnp.asarray(random.normal(size=(2, 3, 1, 5, 8)).astype(np.float32))  # B, M, K, P, H
    written, expected = (
        jnp.stack([rotate(plain[:, m, 0], at + jnp.arange(5), rope) for m, at in enumerate(first)])
        for first in ((40, 40, 40), (40, 33, 26))
    )
    keys = jnp.moveaxis(written, 0, 1)[:, :, None]
    close(space_out(keys, 7, rope)[:, :, 0], jnp.moveaxis(expected, 0, 1), 1e-5)
    np.testing.assert_array_equal(space_out(keys, 0, rope), keys)
    np.testing.assert_array_equal(space_out(keys, 7, rope.at(False)), keys)


def test_layers_without_rope_keep_vectors() -> None:
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 4, 6)), jnp.float32)
    rope, positions = Rope(100.0, magnitude=1.5), jnp.array([2, 5, 9])
    np.testing.assert_array_equal(rotate(x, positions, rope.at(False)), x)
    np.testing.assert_array_equal(rotate(x, positions, rope.at(jnp.array(False))), x)
    found = rotate(x, positions, rope.at(jnp.array([True, False, True, True])[:, None][None, None]))
    np.testing.assert_array_equal(found[:, :, 1], x[:, :, 1])
    others = jnp.array([0, 2, 3])
    np.testing.assert_array_equal(found[:, :, others], rotate(x, positions, rope)[:, :, others])
    model = oracle_config(model__layers=8, model__no_rope_every=3).model
    np.testing.assert_array_equal(np.flatnonzero(~turned_layers(model)), [2, 5])
