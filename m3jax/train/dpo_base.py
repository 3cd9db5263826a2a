"""Log-probabilities of the base model of DPO: computed once and stored, so that it is not loaded.

They lie in `<stage folder>/base_logprobs/<split>`: `manifest.json`, which says what they belong to,
and parts of some rows each. A part is whole or absent: a killed run goes on with the missing ones.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from m3jax.checkpoint import checkpoint_folder, restore_params
from m3jax.config import prefix_tokens
from m3jax.data.batch import Batch
from m3jax.data.pipeline import Pipeline
from m3jax.distributed import meet
from m3jax.errors import CheckpointError
from m3jax.files import read_sealed, write_atomically, write_sealed
from m3jax.make_model import make_model
from m3jax.memory.binding import writer_fingerprint, writer_params
from m3jax.memory.reader import Dequantize
from m3jax.memory.sparsify import sparsifier
from m3jax.memory.storage import npy_bytes
from m3jax.mesh import batch_sharding, host_rows, on_devices, replicated
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.train.dpo_loss import answer_logprobs
from m3jax.train.loss import batch_specs, place_batch

FOLDER = "base_logprobs"
_MANIFEST = "manifest.json"
_BATCHES = 8  # of a part
_SECONDS_BETWEEN_LINES = 15.0
# Fields that change no log-probability beyond rounding.
_FREE = (
    "memory.cache_bytes",
    "model.attention",
    "model.attention_block",
    "model.attention_kv_block",
    "model.remat",
)

Logprobs = Callable[[Params, Batch], Float[Array, "B slots"]]


def hold_base_logprobs(
    config: ConfigDict,
    stage_folder: str | Path,
    pipelines: Mapping[str, Pipeline],
    init_from: str | Path | None,
    mesh: Mesh,
    say: Callable[[str], None] = print,
) -> None:
    """Gives pipelines of pairs the log-probabilities of the base model, computing missing ones.

    The base model is the checkpoint that the stage starts from; its parameters are freed before
    this returns. A stage that has a checkpoint of its own and all log-probabilities does not load
    it. Several processes call it alike.

    Args:
      config: a validated config with data.packing = "pairs".
      stage_folder: of the stage that trains.
      pipelines: by split.
      init_from: stage folder, or `checkpoints/<step>` in it, of the base model.
      mesh: to compute on.
      say: gets a line for every split.

    Raises:
      CheckpointError: no checkpoint to start from; or what is stored belongs to another checkpoint,
        other pairs, memories or settings; names the difference and the remedy.
    """
    folders = {split: Path(stage_folder) / FOLDER / split for split in pipelines}
    stored = {split: load(folders[split], _binding(config, of)) for split, of in pipelines.items()}
    trained = _has_checkpoint(stage_folder)
    if not trained or any(x is None for x in stored.values()):
        if init_from is None:
            raise CheckpointError(
                f"{stage_folder} has no log-probabilities of a base model; name the checkpoint that"
                " is trained on preferences, usually that of SFT: --init_from=WORKDIR/sft"
            )
        model = make_model(config, prefix_tokens(config), mesh)
        tokenizer = next(iter(pipelines.values())).tokenizer.fingerprint
        params, meta = restore_params(init_from, model, mesh=mesh, tokenizer_fingerprint=tokenizer)
        name = _base_model(params, meta, config, mesh)
        for split, pipeline in pipelines.items():
            _compute(config, folders[split], pipeline, model, params, name, say)
            stored[split] = load(folders[split], {**_binding(config, pipeline), "base model": name})
        for leaf in jax.tree.leaves(params):
            leaf.delete()
    for split, pipeline in pipelines.items():
        pipeline.base_logprobs = stored[split]


def load(folder: str | Path, binding: Mapping[str, Any]) -> Float[np.ndarray, "rows slots"] | None:
    """Loads all log-probabilities of a split, in nats; returns None where some are missing.

    Raises:
      CheckpointError: they belong to something else than `binding`, or are damaged.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder, binding)
    if manifest is None:
        return None
    parts = []
    for path in _parts(folder, manifest):
        if not path.exists():
            return None
        try:
            parts.append(np.load(path))
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it, and run again"
            ) from error
    logprobs = np.concatenate(parts)
    if logprobs.shape != (manifest["rows"], manifest["slots"]) or not np.isfinite(logprobs).all():
        raise CheckpointError(f"{folder} is damaged; delete it, and run again")
    return logprobs


def _base_model(params: Params, meta: Mapping[str, Any], config: ConfigDict, mesh: Mesh) -> str:
    """Returns the step of a checkpoint and the fingerprint of the weights that write memories."""
    gather = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    whole = jax.tree.map(lambda x: np.asarray(gather(x)), writer_params(params))  # one at a time
    return f"step {meta['step']}, weights {writer_fingerprint(whole, config.memory)}"


def row_logprobs(config: ConfigDict, model: Model, dequantize: Dequantize | None) -> Logprobs:
    """Returns `logprobs(params, batch)`: of every answer of a global batch, on every device."""
    sparsify = sparsifier(config.memory)

    def local(params: Params, batch: Batch) -> Array:
        return answer_logprobs(model, params, batch, sparsify, dequantize)

    def logprobs(params: Params, batch: Batch) -> Array:
        if model.mesh is None:
            return local(params, batch)
        rows = batch_sharding(model.mesh).spec
        specs = (model.specs(), batch_specs(batch))
        return on_devices(model.mesh, local, specs, rows)(params, batch)

    whole = None if model.mesh is None else replicated(model.mesh)
    return jax.jit(logprobs, out_shardings=whole)


def each_batch(
    pipeline: Pipeline, mesh: Mesh | None, first: int, last: int
) -> Iterator[tuple[int, Batch]]:
    """Yields batches of rows `first … last − 1` in order, on the mesh, and their real rows."""
    B = pipeline.batch_size
    rows_of_host, place = np.arange(B), jax.device_put
    if mesh is not None:
        of_host = host_rows(mesh, B)
        rows_of_host, place = of_host.ids, functools.partial(place_batch, mesh, rows=of_host)
    for low in range(first, last, B):
        rows = np.minimum(low + rows_of_host, last - 1)
        yield min(B, last - low), place(pipeline.read(rows).for_step())


def _compute(
    config: ConfigDict,
    folder: Path,
    pipeline: Pipeline,
    model: Model,
    params: Params,
    base_model: str,
    say: Callable[[str], None],
) -> None:
    """Writes the parts of a split that are missing."""
    rows, slots = len(pipeline.rows), pipeline.rows.slots
    binding = {**_binding(config, pipeline), "base model": base_model}
    manifest = _read_manifest(folder, binding)
    first_process = jax.process_index() == 0
    if manifest is None:
        count = -(-rows // (_BATCHES * pipeline.batch_size))
        manifest = {**binding, "rows": rows, "slots": slots, "parts": count}
        if first_process:
            write_sealed(folder / _MANIFEST, manifest)
    missing = [(n, path) for n, path in enumerate(_parts(folder, manifest)) if not path.exists()]
    meet("base log-probability parts listed")
    logprobs = row_logprobs(config, model, pipeline.dequantize)
    started = shown = time.monotonic()
    each = _BATCHES * pipeline.batch_size
    for number, (part, path) in enumerate(missing, 1):
        low, high = part * each, min((part + 1) * each, rows)
        parts = [
            np.asarray(jax.device_get(logprobs(params, batch)))[:real]
            for real, batch in each_batch(pipeline, model.mesh, low, high)
        ]
        if first_process:
            write_atomically(path, npy_bytes(np.concatenate(parts)))
            now = time.monotonic()
            if now - shown > _SECONDS_BETWEEN_LINES or number == len(missing):
                shown = now
                say(
                    f"base log-probabilities ({folder.name}): {high} of {rows} rows,"
                    f" {now - started:.0f} s"
                )
    meet("base log-probability parts written")


def _parts(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    return [folder / f"part-{part:05d}.npy" for part in range(manifest["parts"])]


def _read_manifest(folder: Path, binding: Mapping[str, Any]) -> dict[str, Any] | None:
    path = folder / _MANIFEST
    if not path.exists():
        return None
    manifest = read_sealed(path)
    if manifest is None:
        raise CheckpointError(f"{path} is damaged; delete {folder}, and run again")
    for name, ours in binding.items():
        theirs = manifest.get(name)
        if theirs != ours:
            raise CheckpointError(
                f"{folder} holds log-probabilities that belong to another {name}:"
                f" {_short(theirs)} there, {_short(ours)} here. Use the checkpoint, pairs and"
                " config of before, or another --workdir, or delete the stage folder"
            )
    return manifest


def _binding(config: ConfigDict, pipeline: Pipeline) -> dict[str, Any]:
    """Lists all that log-probabilities depend on, but for the parameters."""
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


def _short(value: Any) -> str:
    return str(value)[:100]


def _has_checkpoint(stage_folder: str | Path) -> bool:
    try:
        checkpoint_folder(stage_folder)
    except CheckpointError:
        return False
    return True
