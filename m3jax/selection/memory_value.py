"""Measures how much the memory of each reference lowers the validation loss (Memory³ §10).

For every pair of a row and a reference that its chunks retrieve, the drop is the summed loss of the
row without this memory in any chunk, minus its loss with the memory. All other memories of the row
stay in place. Each pair costs one forward pass of the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.config import prefix_tokens
from m3jax.data.batch import Batch
from m3jax.data.pipeline import Pipeline
from m3jax.files import write_array
from m3jax.make_model import make_model
from m3jax.memory.reader import Dequantize
from m3jax.model.parameters import Params
from m3jax.train.loss import Forward
from m3jax.workdir import begin_part, only_writer

NOTHING, EVERYTHING = -1, -2  # values of `absent`: no memory, all memories
# Summed loss of a row in nats without the memory of reference `absent`; `weight`: sum over targets.
MEASURED = np.dtype([("row", "<i8"), ("absent", "<i8"), ("loss", "<f8"), ("weight", "<f8")])


class RowLosses:
    """Computes summed losses of rows without some of their precomputed memories.

    `dequantize` must be the `Pipeline.dequantize` of the pipeline that reads the batches.
    """

    def __init__(self, config: ConfigDict, dequantize: Dequantize | None) -> None:
        self.model, self._dequantize = make_model(config, prefix_tokens(config)), dequantize
        self._losses = jax.jit(self._token_losses)

    def __call__(
        self,
        params: Params,
        batch: Batch,
        rows: Int[np.ndarray, " n"],
        absent: Int[np.ndarray, " n"],
    ) -> Float[np.ndarray, " n"]:
        """Returns the loss (nats) of row `rows[i]` of the batch without reference `absent[i]`.

        A row may occur several times; `absent[i]` is a reference id, `NOTHING` or `EVERYTHING`.
        """
        ids = batch.reference_ids
        losses = jax.device_get(self._losses(params, batch.for_step(), ids, rows, absent))
        weights = np.asarray(batch.weights, np.float64)[rows]
        return (losses.astype(np.float64) * weights).sum(axis=1)

    def _token_losses(
        self, params: Params, batch: Batch, ids: Array, rows: Array, absent: Array
    ) -> Array:
        """Computes the cross-entropy `(n, T)` of every token."""
        picked = jax.tree.map(lambda x, axis: jnp.take(x, rows, axis), batch, batch.row_axes())
        absent = absent[:, None, None]
        present = (ids[rows] != absent) & (absent != EVERYTHING)
        memory = picked.memory  # a memory of length 0 receives no attention
        memory = memory._replace(length=jnp.where(present, memory.length, 0))
        picked = picked._replace(memory=memory)
        hidden = Forward(self.model, dequantize=self._dequantize).hidden(params, picked)
        return self.model.token_losses(params, hidden, picked.targets)


def row_losses(
    losses: RowLosses,
    pipeline: Pipeline,
    params: Params,
    rows: Int[np.ndarray, " n"],
    absent: int = NOTHING,
) -> Shaped[np.ndarray, " n"]:
    """Returns `MEASURED` records of rows with all memories (`NOTHING` absent) or with none."""
    parts = []
    for ids, batch in _batches(pipeline, rows):
        places = np.arange(pipeline.batch_size)
        values = losses(params, batch, places, np.full(len(places), absent))[: len(ids)]
        weights = np.asarray(batch.weights, np.float64).sum(axis=1)[: len(ids)]
        parts.append(_measured(ids, np.full(len(ids), absent), values, weights))
    return np.concatenate(parts)


def measure_drops(
    losses: RowLosses,
    pipeline: Pipeline,
    params: Params,
    rows: Int[np.ndarray, " n"],
    folder: Path,
    identity: dict[str, Any],
) -> Shaped[np.ndarray, " m"]:
    """Measures the loss of each row with all memories, and without each reference it retrieves.

    Writes one file per batch to `folder`; an interrupted measurement resumes if `identity` (JSON
    values of all that the losses depend on) is unchanged.

    Returns:
      `MEASURED` records: for every row one with `NOTHING` absent, then one for each reference that
      it retrieves, in ascending order.

    Raises:
      LockError: another process is writing the folder.
    """
    parts, size = [], pipeline.batch_size
    with only_writer(folder):
        begin_part(folder, {**identity, "rows": rows.tolist()})
        for low in tqdm(range(0, len(rows), size), desc="measured", unit=" batches"):
            path = folder / f"{low:09d}.npy"
            if not path.is_file():
                write_array(path, _measure_batch(losses, pipeline, params, rows[low : low + size]))
            parts.append(np.load(path))
    return np.concatenate(parts)


def _measure_batch(
    losses: RowLosses, pipeline: Pipeline, params: Params, rows: Int[np.ndarray, " n"]
) -> Shaped[np.ndarray, " m"]:
    """Measures the rows of one batch; see `measure_drops`."""
    ((_, batch),) = _batches(pipeline, rows)
    ids = np.asarray(batch.reference_ids)
    pairs = [
        (place, absent)
        for place in range(len(rows))
        for absent in [NOTHING, *np.unique(ids[place][ids[place] >= 0]).tolist()]
    ]
    places, absent = np.array(pairs, np.int64).T
    size = pipeline.batch_size
    placed = jax.device_put(batch)
    values = np.zeros(len(pairs))
    for low in range(0, len(pairs), size):
        chosen = np.arange(low, low + size) % len(pairs)  # every call has the same shape
        part = losses(params, placed, places[chosen], absent[chosen])
        values[low : low + size] = part[: len(pairs) - low]
    weights = np.asarray(batch.weights, np.float64).sum(axis=1)
    return _measured(rows[places], absent, values, weights[places])


def _batches(
    pipeline: Pipeline, rows: Int[np.ndarray, " n"]
) -> Iterator[tuple[Int[np.ndarray, " b"], Batch]]:
    """Yields row numbers and their batch; the last batch is padded with copies of its last row."""
    for low in range(0, len(rows), pipeline.batch_size):
        part = rows[low : low + pipeline.batch_size]
        fill = np.minimum(np.arange(pipeline.batch_size), len(part) - 1)
        yield part, pipeline.read(part[fill])


def _measured(
    rows: np.ndarray, absent: np.ndarray, loss: np.ndarray, weight: np.ndarray
) -> Shaped[np.ndarray, " m"]:
    return np.array([*zip(rows, absent, loss, weight, strict=True)], MEASURED)


def drops(measured: Shaped[np.ndarray, " m"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns row, reference and drop of the row's loss (nats) for each pair of `measure_drops`."""
    whole = measured[measured["absent"] == NOTHING]
    pairs = measured[measured["absent"] >= 0]
    order = np.argsort(whole["row"])
    base = whole["loss"][order][np.searchsorted(whole["row"][order], pairs["row"])]
    return pairs["row"], pairs["absent"], pairs["loss"] - base
