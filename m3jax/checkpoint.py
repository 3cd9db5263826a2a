"""Reads checkpoints of training stages: steps, `meta`, parameters, config and tokenizer.

A checkpoint is a folder `<stage folder>/checkpoints/<step>` with `state` and `meta` (Orbax), and
`checksums.json`, size and checksum of every file in these two, which `train.checkpoints` writes
before the folder gets its name. What is read is compared with them first. In a bucket (gs://…),
which compares checksums itself, there is no `checksums.json`.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding
from ml_collections import ConfigDict

from m3jax.checkpoint_folder import COMMITTED, Folder, reaching, steps_in, to_folder
from m3jax.config import PREFIX_TOKENS, default
from m3jax.errors import CheckpointError, StoreError
from m3jax.failures import raise_if_machine
from m3jax.files import (
    digest,
    first_damaged,
    json_text,
    read_sealed,
    tree_checksums,
    write_sealed,
)
from m3jax.make_model import make_model
from m3jax.mesh import parameter_shardings
from m3jax.mirror import Mirror
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.private_apis import quiet_failed_checkpoints, use_literal_checkpoint_paths
from m3jax.store import Store, is_bucket
from m3jax.text.tokenizer import Tokenizer

use_literal_checkpoint_paths()

FOLDER = "checkpoints"
CHECKSUMS = "checksums.json"
SEGMENTS = ("lower", "memory", "upper")


def checkpoint_steps(stage_folder: Folder | str) -> list[int]:
    """Lists the steps at which a stage has a checkpoint, ascending."""
    return steps_in(to_folder(stage_folder) / FOLDER)


def checkpoint_folder(path: Folder | str, step: int | None = None) -> Folder:
    """Returns the folder `…/<step>` of a stage's newest checkpoint, or of its checkpoint of `step`.

    `path` is a stage folder, or a folder `…/<step>`, which is returned itself.

    Raises:
      CheckpointError: there is no checkpoint, or none of `step`; lists the steps of the stage.
    """
    path = to_folder(path)
    if path.name.isdigit() and step in (None, int(path.name)) and _is_checkpoint(path):
        return path
    steps = checkpoint_steps(path)
    if not steps:
        raise CheckpointError(
            f"no checkpoint in {path}; name the folder of a stage that was trained, or its"
            f" {FOLDER}/<step>"
        )
    if step is not None and step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {path}; there are {steps}")
    return path / FOLDER / str(steps[-1] if step is None else step)


def _is_checkpoint(folder: Folder) -> bool:
    if is_bucket(folder):
        return Store(folder).read(COMMITTED) is not None
    return (folder / "state").is_dir()


def seal(folder: str | Path) -> None:
    """Writes `checksums.json` of a checkpoint folder `…/<step>`."""
    files = tree_checksums(folder)  # those outside the two folders are Orbax's own, which change
    inside = {name: sums for name, sums in files.items() if "/" in name}
    write_sealed(Path(folder) / CHECKSUMS, {"files": inside})


def verify(folder: Folder, part: str = "", share: tuple[int, int] = (0, 1)) -> None:
    """Compares the files of a checkpoint folder `…/<step>` with their checksums.

    A checkpoint without `checksums.json` is not verified; a warning says so. One in a bucket is not
    verified here.

    Args:
      folder: the folder.
      part: only the files whose path begins with this.
      share: index and number of processes that verify this checkpoint together: a share each.

    Raises:
      CheckpointError: a file is missing or damaged; names it and the remedy.
    """
    if is_bucket(folder):
        return
    path = Path(folder) / CHECKSUMS
    if not path.is_file():
        warnings.warn(
            f"checkpoint {folder} is read unverified: it has no {CHECKSUMS}", stacklevel=2
        )
        return
    content = read_sealed(path, "files")
    if content is None:
        raise CheckpointError(
            f"{path} is damaged; restore it from a copy, or move it elsewhere to read the"
            " checkpoint unverified"
        )
    names = sorted(name for name in content["files"] if name.startswith(part))
    with damage_named(folder):
        different = first_damaged(
            folder, {name: content["files"][name] for name in names[share[0] :: share[1]]}
        )
    if different is not None:
        raise CheckpointError(f"{different[0]} {different[1]}; {_remedy(folder)}")


def _remedy(folder: Folder) -> str:
    """Returns, for messages, what to do if a checkpoint cannot be read."""
    earlier = [step for step in steps_in(folder.parent) if step < int(folder.name)]
    use = f"use that of step {earlier[-1]}" if earlier else "begin anew"
    return f"restore it from a copy, or move {folder} elsewhere to {use}"


def read_meta(folder: Folder) -> dict[str, Any]:
    """Reads the `meta` of a checkpoint folder `…/<step>`; raises `CheckpointError` if damaged.

    A process can read it alone: Orbax would wait for all of them to read.
    """
    verify(folder, "meta/")
    alone = ocp.options.MultiprocessingOptions(active_processes={jax.process_index()})
    handler = ocp.JsonCheckpointHandler()
    with (
        damage_named(folder),
        ocp.Checkpointer(handler, multiprocessing_options=alone) as reader,
    ):
        return dict(reader.restore(to_folder(folder) / "meta"))


def restore_params(
    stage_folder: Folder | str,
    model: Model,
    step: int | None = None,
    *,
    mesh: Mesh | None = None,
    tokenizer_fingerprint: str | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Restores a checkpoint's parameters for `model`; returns them and the checkpoint's `meta`.

    The parameters get the model's dtype. If the model has another range of memory layers, layers
    are regrouped into its segments (`restack`); all other shapes must be equal.

    Args:
      stage_folder, step: as in `checkpoint_folder`.
      model: the model that will use the parameters.
      mesh: places the parameters by the sharding rules; None places them on the first local device.
      tokenizer_fingerprint: fingerprint that the checkpoint must record; None skips the check.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged, it was trained with another tokenizer,
        or a parameter has another shape (names the first one and both shapes).
    """
    folder = checkpoint_folder(stage_folder, step)
    verify(folder, share=(0, 1) if mesh is None else (jax.process_index(), jax.process_count()))
    meta = read_meta(folder)
    if tokenizer_fingerprint is not None:
        check_tokenizer(folder, meta, tokenizer_fingerprint)
    shapes, axes = model.abstract()
    saved = saved_shapes(folder)
    stacks = {name: model.segments[name] for name in SEGMENTS if name in shapes}
    alike = _layers(saved) == sum(stacks.values())
    moved = jax.eval_shape(lambda p: restack(p, stacks), saved) if alike else saved
    check_shapes(folder, moved, shapes)
    if mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        shardings, placed = (jax.tree.map(lambda _: device, tree) for tree in (shapes, saved))
    else:
        shardings = parameter_shardings(mesh, axes)
        block = axes["memory"]
        saved_axes = {k: block if k in SEGMENTS else axes[k] for k in saved}
        placed = parameter_shardings(mesh, saved_axes)
    targets = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved, placed
    )
    params = _read_params(folder, targets)

    def convert(params: Params) -> Params:
        return jax.tree.map(lambda x, like: x.astype(like.dtype), restack(params, stacks), shapes)

    return jax.jit(convert, out_shardings=shardings)(params), meta


def read_model(
    checkpoint: Folder | str,
) -> tuple[Folder, ConfigDict, Params, dict[str, Any], Tokenizer]:
    """Reads a checkpoint together with its own config and tokenizer; no other config is needed.

    Args:
      checkpoint: a stage folder, or a folder `checkpoints/<step>` in it, inside its workdir.

    Returns:
      The folder `…/<step>`; the default config with the sections `model` and `memory` that the
        checkpoint records, and blocked attention, which runs on every device; the parameters, on
        one device; `meta`; and the workdir's tokenizer.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged, its config is of another version, or
        its shapes or its tokenizer do not fit.
      TextError: the workdir has no tokenizer.
    """
    folder = checkpoint_folder(checkpoint)
    meta = read_meta(folder)
    workdir = Mirror(folder.parents[2])
    workdir.fetch("tokenizer")
    tokenizer = Tokenizer.load(workdir.local / "tokenizer")
    config = default()
    try:
        for section in ("model", "memory"):
            config[section].update(meta["config"][section])
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"the config of checkpoint {folder} is of another version ({error}); train it again"
        ) from error
    config.model.attention = "blocked"
    model, fingerprint = make_model(config, PREFIX_TOKENS), tokenizer.fingerprint
    params, meta = restore_params(folder, model, tokenizer_fingerprint=fingerprint)
    return folder, config, params, meta, tokenizer


def restack(params: Params, stacks: Mapping[str, int]) -> Params:
    """Regroups the stacked layers into segments; `stacks` maps each segment to its layer count."""
    present = [params[name] for name in SEGMENTS if name in params]
    layers = jax.tree.map(lambda *x: jnp.concatenate(x), *present)
    result = {name: value for name, value in params.items() if name not in SEGMENTS}
    start = 0
    for name, count in stacks.items():
        result[name] = jax.tree.map(lambda x, a=start, b=start + count: x[a:b], layers)
        start += count
    return result


@contextlib.contextmanager
def damage_named(folder: Folder, *more: type[Exception]) -> Iterator[None]:
    """Turns errors of reading in the block into a `CheckpointError` that names the checkpoint.

    These are `ValueError`, `OSError`, `KeyError` and `more`. Raises `StoreError` where it is in a
    bucket that cannot be reached.
    """
    quiet_failed_checkpoints()
    errors: tuple[type[Exception], ...] = (ValueError, OSError, KeyError, *more)
    try:
        with reaching(folder):
            yield
    except errors as error:
        if isinstance(error, StoreError):
            raise
        raise_if_machine(error)
        raise CheckpointError(
            f"checkpoint {folder} cannot be read ({error}); {_remedy(folder)}"
        ) from error


def check_tokenizer(folder: Folder, meta: Mapping[str, Any], fingerprint: str) -> None:
    """Raises `CheckpointError` if a checkpoint was trained with another tokenizer."""
    if meta["tokenizer"] != fingerprint:
        raise CheckpointError(
            f"checkpoint {folder} was trained with the tokenizer {meta['tokenizer'][:12]}, but the"
            f" workdir has {fingerprint[:12]}; use the workdir it was trained in"
        )


def saved_shapes(folder: Folder) -> Params:
    """Reads the shapes and dtypes of a checkpoint's parameters from its metadata."""
    # The handler itself: a Checkpointer would warn that `state` is a part of a checkpoint.
    handler = contextlib.closing(ocp.PyTreeCheckpointHandler())
    with damage_named(folder, AttributeError), handler as reader:  # None where files are missing
        tree = reader.metadata(folder / "state").tree["params"]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _read_params(folder: Folder, targets: Params) -> Params:
    arguments = ocp.checkpoint_utils.construct_restore_args(targets)
    with damage_named(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        options = ocp.args.PyTreeRestore(
            {"params": targets}, restore_args={"params": arguments}, partial_restore=True
        )
        return reader.restore(folder / "state", args=options)["params"]


def _layers(shapes: Params) -> int:
    return sum(jax.tree.leaves(shapes[name])[0].shape[0] for name in SEGMENTS if name in shapes)


def check_shapes(folder: Folder, saved: Params, needed: Params) -> None:
    """Raises `CheckpointError` if any shape differs; names the first parameter and both shapes."""
    trees = [jax.tree.leaves_with_path(tree) for tree in (saved, needed)]
    name_of = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    sides = [{name_of(path): leaf.shape for path, leaf in leaves} for leaves in trees]
    for name in sorted(sides[0].keys() | sides[1].keys()):
        theirs, ours = (side.get(name, "absent") for side in sides)
        if theirs != ours:
            raise CheckpointError(
                f"checkpoint {folder} has another shape: parameter {name} is {theirs} there and"
                f" {ours} in this config; use the config it was trained with"
            )


def stage_of(checkpoint: Folder | str) -> Folder:
    """Returns the stage folder of a checkpoint: of a stage folder or of `…/checkpoints/<step>`."""
    path = to_folder(checkpoint)
    return path.parents[1] if path.parent.name == FOLDER and path.name.isdigit() else path


def reads(
    meta: Mapping[str, Any], checkpoint: Folder | str, writer: Mapping[str, Any] | None
) -> bool:
    """Tests whether a checkpoint can use memories of a bank's writer (`Bank.writer`).

    It can if it was trained on memories of this writer, if the writer is a checkpoint of its own
    run (a refresh), or if it was trained without memories. A `writer` of None fits every one.
    """
    recorded = meta["writer"]
    if recorded is None or writer is None or recorded["hash"] == writer["hash"]:
        return True
    if writer.get("run"):
        return bool(writer["run"] == meta.get("run"))
    # A bank of an earlier version, which has not recorded the run.
    return bool(writer["path"]) and writer["path"] == str(stage_of(checkpoint))


def identity_of(meta: Mapping[str, Any]) -> str:
    """Returns what identifies a checkpoint wherever it lies: its run and step, by its `meta`."""
    run = meta.get("run") or digest(json_text(dict(meta), sort_keys=True))  # an earlier version's
    return f"step {meta['step']} of run {run}"
