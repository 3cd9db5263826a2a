"""Calls of a jitted encoder with the tokens of texts, their rows split over devices.

A text is padded to a length that depends on its own tokens alone, in calls whose shape depends on
that length alone; and within a call no row sees another. So a text gives the same bits with any
other texts, in any order and on any number of devices of one kind; other kinds of devices, versions
of XLA or `rows` may change the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, Int32

from m3jax.mesh import ACTIVATIONS, batch_sharding, on_devices, replicated

# Tokens that a text is padded to: at most a half more than it has. Beyond twice the query block of
# the attention these are multiples of it.
BUCKETS = tuple(size for i in range(4, 18) for size in (2**i, 3 * 2 ** (i - 1)))
_FULL = 512  # tokens up to which a call has all its rows; longer texts come in fewer

Call = tuple[
    Int[np.ndarray, " n"], tuple[Int32[np.ndarray, "rows bucket"], Int32[np.ndarray, " rows"]]
]


def calls(
    tokens: Sequence[Sequence[int] | np.ndarray], least: int, rows: int, devices: int, padding: int
) -> Iterator[Call]:
    """Yields positions of texts in `tokens`, and tokens and lengths of the call that encodes them.

    Texts of fewer than `least` tokens are left out. Each of the devices, over which a call is
    split, encodes `rows` texts at a time, fewer above 512 tokens; `padding` fills them.
    """
    lengths = np.array([len(ids) for ids in tokens], np.int32)
    buckets = np.array(BUCKETS)[np.searchsorted(BUCKETS, lengths)]
    for bucket in np.unique(buckets[lengths >= least]).tolist():
        size = rows_of(bucket, rows) * devices
        chosen = np.flatnonzero((lengths >= least) & (buckets == bucket))
        for start in range(0, len(chosen), size):
            places = chosen[start : start + size]
            filled = np.full((size, bucket), padding, np.int32)
            real = np.zeros(size, np.int32)
            real[: len(places)] = lengths[places]
            for row, i in enumerate(places.tolist()):
                filled[row, : lengths[i]] = tokens[i]
            yield places, (filled, real)


def rows_of(bucket: int, rows: int) -> int:
    """Returns the rows of one device in a call with texts of this length."""
    return max(1, min(rows, rows * _FULL // bucket))


def by_rows(mesh: Mesh, function: Callable[..., Any]) -> Any:
    """Jits a function of what every device has whole, and of arrays of which it has its rows."""
    rows, whole = ACTIVATIONS.spec(("batch",)), replicated(mesh).spec

    def on_all(known: Any, *arguments: Any) -> Any:
        specs = (whole, *(rows for _ in arguments))
        return on_devices(mesh, function, specs, rows)(known, *arguments)

    return jax.jit(on_all)


def run(
    program: Callable[..., Any], mesh: Mesh, batches: Iterable[tuple[np.ndarray, tuple]]
) -> Iterator[tuple[np.ndarray, Any]]:
    """Runs a program for arguments with positions of texts, three calls at a time; yields both."""
    waiting: list[tuple[np.ndarray, Any]] = []
    for places, arguments in batches:
        waiting.append((places, program(*jax.device_put(arguments, batch_sharding(mesh)))))
        if len(waiting) > 2:
            yield jax.device_get(waiting.pop(0))
    yield from map(jax.device_get, waiting)
