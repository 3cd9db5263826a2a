"""How far floating-point results may be from what is expected: relative to the size of the array.

An absolute tolerance is a property of a processor: the same code, summed in another order, is off
by some units in the last place of the *largest* terms. So differences are compared with the largest
magnitude that is expected. `test_tolerances.py` refuses tests that compare otherwise.
"""

from typing import Any

import jax
import numpy as np


def error(actual: Any, expected: Any) -> float:
    """Largest difference over the largest magnitude expected; NaNs and infinities must be equal."""
    a, b = (np.asarray(x, np.float64) for x in (actual, expected))
    assert b.ndim == 0 or a.shape == b.shape, f"shape {a.shape}, expected {b.shape}"
    b = np.broadcast_to(b, a.shape)
    finite = np.isfinite(b)
    np.testing.assert_array_equal(a[~finite], b[~finite])
    difference = np.abs(a - b)[finite].max(initial=0.0)
    size = np.abs(b[finite]).max(initial=0.0)
    if np.isnan(difference):
        return np.inf
    return float(difference / size) if size else float(difference and np.inf)


def close(actual: Any, expected: Any, relative: float = 1e-5, what: str = "") -> None:
    """Fails if the trees of arrays differ in structure, or a leaf by more than `relative`."""
    theirs, structure = jax.tree_util.tree_flatten_with_path(expected)
    ours = structure.flatten_up_to(actual)
    for ours_leaf, (path, theirs_leaf) in zip(ours, theirs, strict=True):
        off = error(ours_leaf, theirs_leaf)
        place = f"{what}{jax.tree_util.keystr(path)}"
        assert off <= relative, (
            f"{place}: off by {off:.2e} of the largest value, accepted {relative:.0e}\n"
            f"{np.asarray(ours_leaf)}\nexpected\n{np.asarray(theirs_leaf)}"
        )
