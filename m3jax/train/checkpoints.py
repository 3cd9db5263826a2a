"""Checkpoints of a stage: `<stage folder>/checkpoints/<step>` with `state` and `meta` (Orbax).

A checkpoint is whole or absent: Orbax writes to a temporary name and renames. `meta` is JSON: the
config, the step, the tokenizer's fingerprint and the writer, that is, whose memories are read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

import m3jax
from m3jax.config import to_json
from m3jax.mesh import parameter_name, parameter_shardings
from m3jax.model.transformer import Model, Params
from m3jax.text.files import write_atomically
from m3jax.train.state import TrainState

FOLDER = "checkpoints"
SEGMENTS = ("lower", "memory", "upper")

# Fields that may change when a run is continued: they change no result.
_FREE_SECTIONS = ("mesh",)
_FREE = (
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.evaluate_every",
    "data.threads",
    "data.prefetch",
    "memory.cache_bytes",
)


class CheckpointError(ValueError):
    """A checkpoint or workdir that does not fit. The message names both sides and the remedy."""


class Checkpoints:
    """Checkpoints of one run; saves in the background.

    Args:
      stage_folder: folder of the stage.
      config: the run's config.
      tokenizer_fingerprint: of the tokenizer the run reads.
      writer: `{"hash", "path", "step"}` of whose memories the run reads, or None.
      version: of the knowledge that it reads, or None.
    """

    def __init__(
        self,
        stage_folder: str | Path,
        config: ConfigDict,
        tokenizer_fingerprint: str,
        writer: Mapping[str, Any] | None = None,
        version: int | None = None,
    ):
        self.folder = Path(stage_folder).absolute() / FOLDER
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self._meta = {
            "name": "m3jax",
            "version": m3jax.__version__,
            "config": json.loads(to_json(config)),
            "tokenizer": tokenizer_fingerprint,
        }
        self.reads(writer, version)
        kept: list[Any] = [policies.LatestN(config.train.keep_last)]
        if config.train.keep_every:
            kept.append(policies.EveryNSteps(config.train.keep_every))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            ),
        )

    def reads(self, writer: Mapping[str, Any] | None, version: int | None) -> None:
        """From now on the run reads memories of this writer, in this version of the knowledge."""
        self._meta["writer"] = None if writer is None else dict(writer)
        self._meta["knowledge"] = version

    def save(self, state: TrainState, step: int) -> None:
        """Copies the state and writes it in the background; does nothing when `step` is saved."""
        if self._manager.latest_step() == step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                meta=ocp.args.JsonSave({**self._meta, "step": step}),
            ),
        )

    def latest_step(self) -> int | None:
        """The newest step with a whole checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state, on the shardings of `abstract` (which may be of another mesh).

        Raises:
          CheckpointError: there is none; or its shapes, tokenizer or writer are others.
        """
        folder = checkpoint_folder(self.folder.parent)
        meta = read_meta(folder)
        _check_tokenizer(folder, meta, self.tokenizer_fingerprint)
        ours, theirs = self._meta["writer"], meta["writer"]
        if (ours is None) != (theirs is None) or not reads(meta, folder, ours):
            raise CheckpointError(
                f"checkpoint {folder} was trained on memories of the writer {theirs}, but this run"
                f" reads memories of {ours}; use the bank of the run's own writer"
            )
        _check_shapes(folder, _saved_shapes(folder), abstract.params)
        try:
            restored = self._manager.restore(
                int(folder.name), args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )
        except (ValueError, OSError, KeyError) as error:
            raise _unreadable(folder, error) from error
        return restored["state"]

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes were told to stop by a signal, and agree to do so at this step."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Waits until the last save is whole."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and stops the background threads."""
        self._manager.close()


def checkpoint_folder(path: str | Path, step: int | None = None) -> Path:
    """The folder of one checkpoint.

    Args:
      path: a stage folder (its newest checkpoint, or that of `step`) or a folder `…/<step>`.
      step: the step wanted; default the newest.

    Raises:
      CheckpointError: no checkpoint there; names those that exist.
    """
    path = Path(path).absolute()
    if path.name.isdigit() and (path / "state").is_dir() and step in (None, int(path.name)):
        return path
    found = (path / FOLDER).iterdir() if (path / FOLDER).is_dir() else ()
    steps = sorted(int(entry.name) for entry in found if entry.name.isdigit())
    if not steps:
        raise CheckpointError(
            f"no checkpoint in {path}; name the folder of a stage that was trained, or its"
            f" {FOLDER}/<step>"
        )
    if step is not None and step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {path}; there are {steps}")
    return path / FOLDER / str(steps[-1] if step is None else step)


def read_meta(folder: str | Path) -> dict[str, Any]:
    """The `meta` of a checkpoint folder `…/<step>`."""
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            return dict(reader.restore(Path(folder).absolute() / "meta"))
    except (ValueError, OSError) as error:
        raise _unreadable(Path(folder), error) from error


def restore_params(
    stage_folder: str | Path,
    model: Model,
    step: int | None = None,
    *,
    mesh: Mesh | None = None,
    tokenizer_fingerprint: str | None = None,
) -> tuple[Params, dict[str, Any]]:
    """The parameters of a checkpoint, for another stage, the writer and evaluation.

    Layers that lie in other segments (another range of memory layers) are restacked, and the dtype
    becomes the model's; all other shapes must be the model's.

    Args:
      stage_folder: a stage folder or a folder `checkpoints/<step>` of it.
      model: the model that will use the parameters.
      step: step of the checkpoint; default the newest.
      mesh: place the parameters by the sharding rules; default the first local device.
      tokenizer_fingerprint: when given, must be the checkpoint's.

    Returns:
      The parameters and the checkpoint's `meta`.

    Raises:
      CheckpointError: no checkpoint; one of another shape (names the first parameter that differs
        and both shapes) or of another tokenizer.
    """
    folder = checkpoint_folder(stage_folder, step)
    meta = read_meta(folder)
    if tokenizer_fingerprint is not None:
        _check_tokenizer(folder, meta, tokenizer_fingerprint)
    shapes, axes = model.abstract()
    saved = _saved_shapes(folder)
    stacks = {name: model.segments[name] for name in SEGMENTS if name in shapes}
    if _layers(saved) == sum(stacks.values()):
        _check_shapes(folder, jax.eval_shape(lambda p: restack(p, stacks), saved), shapes)
    else:
        _check_shapes(folder, saved, shapes)
    if mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
        placed = jax.tree.map(lambda _: device, saved)
    else:
        shardings = parameter_shardings(mesh, axes, shapes)
        block = axes["memory"]
        saved_axes = {k: block if k in SEGMENTS else axes[k] for k in saved}
        placed = parameter_shardings(mesh, saved_axes, saved)
    wanted = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved, placed
    )
    params = _read_params(folder, wanted)

    def convert(params: Params) -> Params:
        return jax.tree.map(lambda x, like: x.astype(like.dtype), restack(params, stacks), shapes)

    return jax.jit(convert, out_shardings=shardings)(params), meta


def restack(params: Params, stacks: Mapping[str, int]) -> Params:
    """The same layers in other segments.

    Args:
      params: parameters with layers stacked in any of `lower`, `memory`, `upper`.
      stacks: layers of every segment wanted; their sum is the number of layers.
    """
    present = [params[name] for name in SEGMENTS if name in params]
    layers = jax.tree.map(lambda *x: jnp.concatenate(x), *present)
    result = {name: value for name, value in params.items() if name not in SEGMENTS}
    start = 0
    for name, count in stacks.items():
        result[name] = jax.tree.map(lambda x, a=start, b=start + count: x[a:b], layers)
        start += count
    return result


def stage_of(checkpoint: str | Path) -> Path:
    """The stage folder of a checkpoint, which may be named by its `checkpoints/<step>`."""
    path = Path(checkpoint).absolute()
    return path.parents[1] if path.parent.name == FOLDER else path


def reads(
    meta: Mapping[str, Any], checkpoint: str | Path, writer: Mapping[str, Any] | None
) -> bool:
    """Whether a checkpoint reads memories of a writer.

    It does where it was trained on them, and where a refresh wrote them for it: with weights of its
    own stage. One that has read none reads all.

    Args:
      meta: of the checkpoint.
      checkpoint: its stage folder, or its own.
      writer: `{"hash", "path", "step"}` of a bank.
    """
    recorded = meta["writer"]
    if recorded is None or writer is None or recorded["hash"] == writer["hash"]:
        return True
    return bool(writer["path"]) and Path(writer["path"]) == stage_of(checkpoint)


def knowledge_version(stage_folder: str | Path) -> int | None:
    """The version of the knowledge that the newest checkpoint of a stage has read.

    None: there is no checkpoint, or it has read none.
    """
    try:
        folder = checkpoint_folder(stage_folder)
    except CheckpointError:
        return None
    return read_meta(folder).get("knowledge")


def check_owner(stage_folder: str | Path, config: ConfigDict) -> None:
    """Refuses a stage folder whose `config.json` is of another run.

    Fields that change no result may differ: the mesh, threads, and how often something is logged,
    saved or evaluated.

    Raises:
      CheckpointError: names the first field that differs and both values.
    """
    path = Path(stage_folder) / "config.json"
    if not path.exists():
        return
    ours = _flatten(json.loads(to_json(config)))
    try:
        theirs = _flatten(json.loads(path.read_text("utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a config: {error}") from error
    for field in sorted(ours.keys() | theirs.keys()):
        if field in _FREE or field.split(".")[0] in _FREE_SECTIONS:
            continue
        there, here = (side.get(field, "absent") for side in (theirs, ours))
        if there != here:
            raise CheckpointError(
                f"{path.parent} belongs to another run: config.{field} is {there!r} there and"
                f" {here!r} here. Use the same config, another --workdir, or delete the folder"
            )


def claim(stage_folder: str | Path, config: ConfigDict) -> None:
    """Writes `config.json`: from now on the stage folder is this run's. Raises as `check_owner`."""
    check_owner(stage_folder, config)
    if jax.process_index() == 0:
        write_atomically(Path(stage_folder) / "config.json", (to_json(config) + "\n").encode())


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{sub}": leaf for sub, leaf in value.items()})
        else:
            flat[key] = value
    return flat


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {folder} cannot be read ({error}); delete it to use an earlier one"
    )


def _check_tokenizer(folder: Path, meta: Mapping[str, Any], fingerprint: str) -> None:
    if meta["tokenizer"] != fingerprint:
        raise CheckpointError(
            f"checkpoint {folder} was trained with the tokenizer {meta['tokenizer'][:12]}, but the"
            f" workdir has {fingerprint[:12]}; use the workdir it was trained in"
        )


def _saved_shapes(folder: Path) -> Params:
    """Shapes and dtypes of the parameters in a checkpoint, from its metadata."""
    try:
        # The handler itself: a Checkpointer would warn that `state` is a part of a checkpoint.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            tree = handler.metadata(folder / "state").tree["params"]
    except (ValueError, OSError, KeyError, AttributeError) as error:
        raise _unreadable(folder, error) from error
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _read_params(folder: Path, wanted: Params) -> Params:
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            options = ocp.args.PyTreeRestore(
                {"params": wanted}, restore_args={"params": arguments}, partial_restore=True
            )
            return reader.restore(folder / "state", args=options)["params"]
    except (ValueError, OSError, KeyError) as error:
        raise _unreadable(folder, error) from error


def _layers(shapes: Params) -> int:
    """Layers in all segments."""
    return sum(jax.tree.leaves(shapes[name])[0].shape[0] for name in SEGMENTS if name in shapes)


def _check_shapes(folder: Path, saved: Params, wanted: Params) -> None:
    sides = [
        {
            parameter_name(path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (saved, wanted)
    ]
    for name in sorted(sides[0].keys() | sides[1].keys()):
        there, here = (side.get(name, "absent") for side in sides)
        if there != here:
            raise CheckpointError(
                f"checkpoint {folder} has another shape: parameter {name} is {there} there and"
                f" {here} in this config; use the config it was trained with"
            )
