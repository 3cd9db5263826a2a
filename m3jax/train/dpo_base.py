"""Computes and stores the log-probabilities of DPO's base model; training does not load it again.

`<stage folder>/base_logprobs/<split>` holds `manifest.json`, all that the values depend on and if
they are finished; `logprobs.npy`, NaN in rows that are not computed yet; and `crc32c.npy`, the
CRC-32C of every row. A killed run continues with the rows that do not fit theirs. Process 0 alone
opens the files: on a network file system the others may see them late, and then decide otherwise.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import crc32c
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Bool, Float, UInt8, UInt32
from ml_collections import ConfigDict
from tqdm import tqdm

from m3jax.checkpoint import checkpoint_steps, identity_of, restore_params
from m3jax.config import prefix_tokens
from m3jax.data.pipeline import Pipeline
from m3jax.data.rows import PackedRows
from m3jax.distributed import meet
from m3jax.errors import CheckpointError
from m3jax.failures import raise_if_machine
from m3jax.files import digest, json_text, open_array, read_sealed, write_array, write_sealed
from m3jax.make_model import make_model
from m3jax.memory.binding import writer_fingerprint, writer_params
from m3jax.memory.sparsify import sparsifier
from m3jax.mesh import host_rows, replicated, row_spec
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.train.dpo_loss import answer_logprobs
from m3jax.train.loss import Forward, on_rows, place_batch

FOLDER = "base_logprobs"
_MANIFEST, _ARRAY, _SUMS = "manifest.json", "logprobs.npy", "crc32c.npy"
_FINISHED = "finished"  # field of the manifest
_BATCHES_PER_FLUSH = 8
_NAME = 256  # bytes of what identifies a base model
# Names that the manifests of earlier versions lack.
_LATER = ("base checkpoint", "references", "index", "memories")
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
    """Sets `base_logprobs` and `base_model` of pipelines of pairs, computing what is missing.

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
    bindings = {split: _binding(config, pipeline) for split, pipeline in pipelines.items()}

    def needs_no_model() -> bool:
        stored = [load(folders[split], bindings[split]) is not None for split in pipelines]
        return all(stored) and bool(checkpoint_steps(stage_folder))

    if not _from_first(needs_no_model, False):
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
            bindings[split] |= {"base model": base_model, "base checkpoint": identity_of(meta)}
            logprobs = RowLogprobs(config, pipeline, model)
            _compute(folders[split], bindings[split], logprobs, params)
        for leaf in jax.tree.leaves(params):
            leaf.delete()
    for split, pipeline in pipelines.items():
        find = functools.partial(load, folders[split], bindings[split])
        empty = np.zeros((len(pipeline.rows), pipeline.rows.slots), np.float32)
        pipeline.base_logprobs = _from_first(find, empty)
        name = functools.partial(_stored_base_model, folders[split], bindings[split])
        name_of = np.asarray(_from_first(name, np.zeros(_NAME, np.uint8)))
        pipeline.base_model = name_of.tobytes().decode().rstrip("\0")


def _stored_base_model(folder: Path, binding: Mapping[str, Any]) -> UInt8[np.ndarray, " bytes"]:
    """Returns what identifies the base model of a split's finished store, as bytes."""
    manifest = _read_manifest(folder, binding) or {}
    name = f"{manifest.get('base model')}, {manifest.get('base checkpoint')}"
    return np.frombuffer(name.encode().ljust(_NAME, b"\0"), np.uint8)


def load(folder: str | Path, binding: Mapping[str, Any]) -> Float[np.ndarray, "rows slots"] | None:
    """Loads the log-probabilities of a split, in nats; returns None if they are not finished.

    Raises:
      CheckpointError: they were computed for something other than `binding`, or are damaged.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder, binding)
    if manifest is None or not manifest[_FINISHED]:
        return None
    logprobs, intact = _read_array(folder, manifest)
    if not intact.all():
        raise _damaged(folder, f"{(~intact).sum()} rows of {_ARRAY} do not fit {_SUMS}")
    return logprobs


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
    """Computes and stores the missing rows of a split, in whole batches, as without a kill."""
    rows, batch_size = len(logprobs.pipeline.rows), logprobs.pipeline.batch_size
    first = int(_from_first(functools.partial(_begin, folder, binding, batch_size), 0))
    writes = jax.process_index() == 0
    stored = sums = None
    if writes and first < rows:
        stored, sums = (np.load(folder / name, mmap_mode="r+") for name in (_ARRAY, _SUMS))
    title = f"base log-probabilities ({folder.name})"
    bar = tqdm(total=rows, initial=first, desc=title, unit=" rows", disable=stored is None)
    for batch, values in enumerate(logprobs(params, first, rows), 1):
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"--init_from gives pairs of {folder.name} log-probabilities that are not finite"
                f" ({binding['base model']}); start from another checkpoint, in another --workdir"
            )
        if stored is not None and sums is not None:
            stored[first : first + len(values)] = values
            sums[first : first + len(values)] = _sums_of(values)
            if batch % _BATCHES_PER_FLUSH == 0:
                stored.flush()
                sums.flush()
        first += len(values)
        bar.update(len(values))
    bar.close()
    if stored is not None and sums is not None:
        stored.flush()
        sums.flush()
    if writes:
        write_sealed(folder / _MANIFEST, {**binding, _FINISHED: True})


def _begin(folder: Path, binding: Mapping[str, Any], batch_size: int) -> int:
    """Makes the store of a split if there is none; returns the first row of the missing batches."""
    manifest = _read_manifest(folder, binding)
    if manifest is None:
        manifest = {**binding, _FINISHED: False}
        empty = np.full((binding["rows"], binding["slots"]), np.nan, np.float32)
        write_array(folder / _ARRAY, empty)
        write_array(folder / _SUMS, np.zeros(len(empty), np.uint32))
        write_sealed(folder / _MANIFEST, manifest)
    missing = ~_read_array(folder, manifest)[1]
    return int(missing.argmax()) // batch_size * batch_size if missing.any() else len(missing)


def _from_first(find: Callable[[], Any], like: Any) -> Any:
    """Returns what `find` finds in process 0, an array of the shape of `like`, in all processes."""
    array = find() if jax.process_index() == 0 else like
    assert np.shape(array) == np.shape(like)
    meet("base log-probabilities of process 0")
    return multihost_utils.broadcast_one_to_all(array)


def _base_model(params: Params, meta: Mapping[str, Any], config: ConfigDict, mesh: Mesh) -> str:
    """Describes a checkpoint: its step, and the fingerprint of the weights that write memories."""
    gather = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    whole = jax.tree.map(lambda x: np.asarray(gather(x)), writer_params(params))  # one at a time
    return f"step {meta['step']}, weights {writer_fingerprint(whole, config.memory)}"


def _read_manifest(folder: Path, binding: Mapping[str, Any]) -> dict[str, Any] | None:
    """Reads a split's manifest, None without one; raises `CheckpointError` for another binding."""
    if not (folder / _MANIFEST).exists():
        return None
    manifest = read_sealed(folder / _MANIFEST, _FINISHED, "rows", "slots")
    if manifest is None:
        raise _damaged(folder, f"{_MANIFEST} does not fit its checksum")
    for name, ours in binding.items():
        theirs = manifest.get(name, ours if name in _LATER else None)
        if theirs != ours:
            raise CheckpointError(
                f"{folder} holds log-probabilities that belong to another {name}:"
                f" {str(theirs)[:100]} there, {str(ours)[:100]} here. Use the checkpoint, pairs and"
                " config of before, or another --workdir or stage"
            )
    return manifest


def _read_array(
    folder: Path, manifest: Mapping[str, Any]
) -> tuple[Float[np.ndarray, "rows slots"], Bool[np.ndarray, " rows"]]:
    """Reads the values of a split, NaN where there are none, and tells which rows are intact.

    A store without `crc32c.npy`, as older versions wrote it, is intact where values are finite.
    Raises `CheckpointError` if a file cannot be read or has another shape or dtype.
    """
    arrays: list[np.ndarray] = []
    rows, slots = manifest["rows"], manifest["slots"]
    for name, shape, dtype in ((_ARRAY, (rows, slots), "f4"), (_SUMS, (rows,), "u4")):
        if name == _SUMS and not (folder / name).exists():
            return arrays[0], np.isfinite(arrays[0]).all(axis=1)
        try:
            array = open_array(folder / name)
        except (ValueError, OSError) as error:
            raise_if_machine(error)
            raise _damaged(folder, f"{name}: {error}") from error
        if array.shape != shape or array.dtype != np.dtype(dtype):
            raise _damaged(folder, f"{name} has the shape {array.shape} and dtype {array.dtype}")
        arrays.append(array)
    return arrays[0], _sums_of(arrays[0]) == arrays[1]


def _sums_of(logprobs: Float[np.ndarray, "rows slots"]) -> UInt32[np.ndarray, " rows"]:
    return np.array([crc32c.crc32c(row.tobytes()) for row in logprobs], np.uint32)


def _damaged(folder: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is damaged ({how}); restore it from a copy, or move it elsewhere and run again"
        " with the --init_from of before, which computes it again"
    )


def _binding(config: ConfigDict, pipeline: Pipeline) -> dict[str, Any]:
    """Lists everything that log-probabilities depend on, except for the parameters."""
    assert isinstance(pipeline.rows, PackedRows)
    plan, settings = pipeline.rows.plan, {}
    for section in ("model", "memory", "retrieval"):
        for field, value in config[section].items():
            if f"{section}.{field}" not in _FREE:
                settings[f"{section}.{field}"] = value
    return {
        "pairs": pipeline.rows.corpus.fingerprint,
        "config": json.loads(json_text(settings, sort_keys=True)),
        "sequence_length": config.data.sequence_length,
        "shift": pipeline.shift,
        "batch_size": pipeline.batch_size,
        "bank": None if pipeline.bank is None else pipeline.bank.writer["hash"],
        "knowledge": None if pipeline.version is None else pipeline.version.number,
        "references": pipeline.ingredients.get("references"),
        "index": pipeline.ingredients.get("index"),
        "memories": pipeline.ingredients.get("bank"),
        "packing plan": digest(json_text(plan)),
        "rows": len(plan),
        "slots": pipeline.rows.slots,
    }
