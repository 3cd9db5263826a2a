"""How far floating-point results may be from what is expected: relative to the size of the array.

An absolute tolerance is a property of a processor: the same code, summed in another order, is off
by some units in the last place of the *largest* terms. So differences are compared with the largest
magnitude that is expected. `test_portable.py` refuses tests that compare otherwise.
"""

from typing import Any

import jax
import numpy as np


def error(actual: Any, expected: Any, size: float | None = None) -> float:
    """Returns the largest difference, relative to the largest magnitude expected.

    NaNs and infinities must be equal.

    Args:
      actual, expected: arrays of one shape, or a number for all that is expected.
      size: what the difference is relative to instead; for results of terms that cancel.
    """
    a, b = (np.asarray(x, np.float64) for x in (actual, expected))
    assert b.ndim == 0 or a.shape == b.shape, f"shape {a.shape}, expected {b.shape}"
    b = np.broadcast_to(b, a.shape)
    finite = np.isfinite(b)
    np.testing.assert_array_equal(a[~finite], b[~finite])
    difference = np.abs(a[finite] - b[finite]).max(initial=0.0)
    if size is None:
        size = np.abs(b[finite]).max(initial=0.0)
    if np.isnan(difference):
        return np.inf
    return float(difference / size) if size else float(np.inf if difference else 0)


def close(
    actual: Any, expected: Any, relative: float = 1e-5, size: float | None = None, what: str = ""
) -> None:
    """Fails if `error` is more than `relative`."""
    off = error(actual, expected, size)
    assert off <= relative, (
        f"{what}: off by {off:.2e} of the largest value, accepted {relative:.0e}\n"
        f"{np.asarray(actual)}\nexpected\n{np.asarray(expected)}"
    )


def close_trees(actual: Any, expected: Any, relative: float = 1e-5) -> None:
    """Fails if trees differ in structure, or a leaf by more than `relative` of its size."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(expected)
    assert jax.tree.structure(actual) == structure
    for ours, (path, theirs) in zip(jax.tree.leaves(actual), leaves, strict=True):
        close(ours, theirs, relative, what=jax.tree_util.keystr(path))
