"""Batches of tokenized texts for a jitted encoder, with rows split over devices.

A text is padded to a bucket that depends only on its own length, the shape of a call depends only
on the bucket, and the rows of a call are independent. So the result of a text is bitwise the same
with any other texts, in any order and on any number of devices of one kind; another kind of device,
XLA version or number of `rows` may change the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, Int32

from m3jax.mesh import ACTIVATIONS, batch_sharding, on_devices, replicated

# Lengths that texts are padded to: at least 16, and at most 1.5 times as long as the text. Lengths
# above twice the query block of the attention are multiples of it.
BUCKETS = tuple(size for i in range(4, 18) for size in (2**i, 3 * 2 ** (i - 1)))
_FULL = 512  # most tokens of a row in calls with all rows; longer texts have fewer rows per call

Call = tuple[
    Int[np.ndarray, " n"], tuple[Int32[np.ndarray, "rows bucket"], Int32[np.ndarray, " rows"]]
]


def calls(
    tokens: Sequence[Sequence[int] | np.ndarray], least: int, rows: int, devices: int, padding: int
) -> Iterator[Call]:
    """Yields, for each call, the positions of its texts in `tokens`, and padded tokens and lengths.

    Texts of fewer than `least` tokens are left out. A call has `rows` rows per device, fewer if a
    row has more than 512 tokens. Rows are filled with the token `padding`; rows without a text have
    length 0.
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
    """Returns the rows per device of a call with rows of `bucket` tokens."""
    return max(1, min(rows, rows * _FULL // bucket))


def by_rows(mesh: Mesh, function: Callable[..., Any]) -> Any:
    """Jits `function(known, *arguments)` with `known` replicated and all else split by rows."""
    rows, whole = ACTIVATIONS.spec(("batch",)), replicated(mesh).spec

    def on_all(known: Any, *arguments: Any) -> Any:
        specs = (whole, *(rows for _ in arguments))
        return on_devices(mesh, function, specs, rows)(known, *arguments)

    return jax.jit(on_all)


def run(
    program: Callable[..., Any], mesh: Mesh, batches: Iterable[tuple[np.ndarray, tuple]]
) -> Iterator[tuple[np.ndarray, Any]]:
    """Runs a program on batches, three calls at a time; yields positions of texts and results."""
    waiting: list[tuple[np.ndarray, Any]] = []
    for places, arguments in batches:
        waiting.append((places, program(*jax.device_put(arguments, batch_sharding(mesh)))))
        if len(waiting) > 2:
            yield jax.device_get(waiting.pop(0))
    yield from map(jax.device_get, waiting)
