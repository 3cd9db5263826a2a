"""Computes and stores the log-probabilities of DPO's base model; training does not load it again.

`<stage folder>/base_logprobs/<split>` holds `manifest.json`, all that the values depend on, and
`logprobs.npy`, NaN in rows that are not computed yet; a killed run continues with these rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.checkpoint import checkpoint_steps, restore_params
from m3jax.config import prefix_tokens
from m3jax.data.pipeline import Pipeline
from m3jax.distributed import meet
from m3jax.errors import CheckpointError
from m3jax.files import read_sealed, write_array, write_sealed
from m3jax.make_model import make_model
from m3jax.memory.binding import writer_fingerprint, writer_params
from m3jax.memory.sparsify import sparsifier
from m3jax.mesh import host_rows, replicated, row_spec
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.train.dpo_loss import answer_logprobs
from m3jax.train.loss import Forward, on_rows, place_batch

FOLDER = "base_logprobs"
_MANIFEST, _ARRAY = "manifest.json", "logprobs.npy"
# Fields that change no log-probability beyond rounding.
_FREE = (
    "memory.cache_bytes",
    "model.attention",
    "model.attention_block",
    "model.attention_kv_block",
    "model.remat",
)


def hold_base_logprobs(
    config: ConfigDict,
    stage_folder: str | Path,
    pipelines: Mapping[str, Pipeline],
    init_from: str | Path | None,
    mesh: Mesh,
) -> None:
    """Sets `base_logprobs` of pipelines of preference pairs, computing missing log-probabilities.

    The base model is the checkpoint that the stage starts from; its parameters are freed before
    this returns. It is not loaded if the stage has a checkpoint of its own and all values are
    stored. With several processes, all must call this.

    Args:
      config: a validated config with data.packing = "pairs".
      stage_folder: folder of the DPO stage.
      pipelines: pipeline of every split.
      init_from: stage folder, or `checkpoints/<step>` in it, of the base model.
      mesh: mesh to compute on.

    Raises:
      CheckpointError: the base model is needed and is missing, does not fit, or gives values that
        are not finite; or the stored values are damaged or belong to another checkpoint, other
        pairs, memories or settings. Names the difference and the remedy.
    """
    folders = {split: Path(stage_folder) / FOLDER / split for split in pipelines}
    for split, pipeline in pipelines.items():
        pipeline.base_logprobs = load(folders[split], _binding(config, pipeline))
    whole = all(pipeline.base_logprobs is not None for pipeline in pipelines.values())
    if whole and checkpoint_steps(stage_folder):
        return
    if init_from is None:
        raise CheckpointError(
            f"{stage_folder} has no log-probabilities of a base model; name the checkpoint that"
            " is trained on preferences, usually that of SFT: --init_from=WORKDIR/sft"
        )
    model = make_model(config, prefix_tokens(config), mesh)
    tokenizer = next(iter(pipelines.values())).tokenizer.fingerprint
    params, meta = restore_params(init_from, model, mesh=mesh, tokenizer_fingerprint=tokenizer)
    base_model = _base_model(params, meta, config, mesh)
    for split, pipeline in pipelines.items():
        binding = {**_binding(config, pipeline), "base model": base_model}
        _compute(folders[split], binding, RowLogprobs(config, pipeline, model), params)
        pipeline.base_logprobs = load(folders[split], binding)
        if pipeline.base_logprobs is None:
            raise CheckpointError(
                f"{init_from} gives pairs of {split} log-probabilities that are not finite; start"
                f" from another checkpoint, and delete {folders[split]}"
            )
    for leaf in jax.tree.leaves(params):
        leaf.delete()


def load(folder: str | Path, binding: Mapping[str, Any]) -> Float[np.ndarray, "rows slots"] | None:
    """Loads the log-probabilities of a split, in nats; returns None if some rows are missing.

    Raises:
      CheckpointError: they were computed for something other than `binding`, or are damaged.
    """
    folder = Path(folder)
    if not _is_begun(folder, binding):
        return None
    try:
        logprobs = np.load(folder / _ARRAY)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{folder / _ARRAY} is damaged ({error}); delete {folder}, and run again"
        ) from error
    return logprobs if np.isfinite(logprobs).all() else None


class RowLogprobs:
    """Computes log-probabilities of the answers in a pipeline's rows.

    Calling it with parameters yields the values of the rows `first … last − 1`, in arrays
    `(rows, slots)` in nats, one per batch, the same on every process.
    """

    def __init__(self, config: ConfigDict, pipeline: Pipeline, model: Model):
        self.pipeline, self.mesh = pipeline, model.mesh
        self._rows = host_rows(model.mesh, pipeline.batch_size)
        forward = Forward(model, sparsifier(config.memory), pipeline.dequantize)
        logprobs = on_rows(model, functools.partial(answer_logprobs, forward), row_spec(0))
        whole = None if model.mesh is None else replicated(model.mesh)
        self._logprobs = jax.jit(logprobs, out_shardings=whole)

    def __call__(self, params: Params, first: int, last: int) -> Iterator[np.ndarray]:
        for low in range(first, last, self.pipeline.batch_size):
            rows = np.minimum(low + self._rows.ids, last - 1)
            batch = place_batch(self.mesh, self.pipeline.read(rows), self._rows)
            yield np.asarray(jax.device_get(self._logprobs(params, batch)))[: last - low]


def _compute(
    folder: Path, binding: Mapping[str, Any], logprobs: RowLogprobs, params: Params
) -> None:
    """Computes and stores the missing rows of a split."""
    rows, writes = logprobs.pipeline.rows, jax.process_index() == 0
    if not _is_begun(folder, binding) and writes:
        write_array(folder / _ARRAY, np.full((len(rows), rows.slots), np.nan, np.float32))
        write_sealed(folder / _MANIFEST, dict(binding))
    meet("base log-probabilities begun")
    stored = np.load(folder / _ARRAY, mmap_mode="r+" if writes else "r")
    missing = np.flatnonzero(~np.isfinite(stored).all(axis=1))
    meet("base log-probabilities read")
    if not missing.size:
        return
    batch_size = logprobs.pipeline.batch_size
    first = int(missing[0]) // batch_size * batch_size  # whole batches, as without a kill
    title = f"base log-probabilities ({folder.name})"
    bar = tqdm(total=len(rows), initial=first, desc=title, unit=" rows", disable=not writes)
    for values in logprobs(params, first, len(rows)):
        if writes:
            stored[first : first + len(values)] = values
        first += len(values)
        bar.update(len(values))
    bar.close()
    if writes:
        stored.flush()
    meet("base log-probabilities written")


def _base_model(params: Params, meta: Mapping[str, Any], config: ConfigDict, mesh: Mesh) -> str:
    """Describes a checkpoint: its step, and the fingerprint of the weights that write memories."""
    gather = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    whole = jax.tree.map(lambda x: np.asarray(gather(x)), writer_params(params))  # one at a time
    return f"step {meta['step']}, weights {writer_fingerprint(whole, config.memory)}"


def _is_begun(folder: Path, binding: Mapping[str, Any]) -> bool:
    """Tests whether values of a split are stored; raises `CheckpointError` for another binding."""
    path = folder / _MANIFEST
    if not path.exists():
        return False
    manifest = read_sealed(path)
    if manifest is None:
        raise CheckpointError(f"{path} is damaged; delete {folder}, and run again")
    for name, ours in binding.items():
        theirs = manifest.get(name)
        if theirs != ours:
            raise CheckpointError(
                f"{folder} holds log-probabilities that belong to another {name}:"
                f" {str(theirs)[:100]} there, {str(ours)[:100]} here. Use the checkpoint, pairs and"
                " config of before, or another --workdir, or delete the stage folder"
            )
    return True


def _binding(config: ConfigDict, pipeline: Pipeline) -> dict[str, Any]:
    """Lists everything that log-probabilities depend on, except for the parameters."""
    settings = {}
    for section in ("model", "memory", "retrieval"):
        for field, value in config[section].items():
            if f"{section}.{field}" not in _FREE:
                settings[f"{section}.{field}"] = value
    return {
        "pairs": pipeline.rows.corpus.fingerprint,
        "config": json.loads(json.dumps(settings, sort_keys=True)),
        "sequence_length": config.data.sequence_length,
        "shift": pipeline.shift,
        "batch_size": pipeline.batch_size,
        "bank": None if pipeline.bank is None else pipeline.bank.writer["hash"],
        "knowledge": None if pipeline.version is None else pipeline.version.number,
    }
