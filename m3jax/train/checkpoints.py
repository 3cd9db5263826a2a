"""Checkpoints of a stage: `<stage folder>/checkpoints/<step>` with `state` and `meta` (Orbax).

A checkpoint is whole or absent: Orbax writes to a temporary name and renames, after the checksums
of all files were added; in a bucket it writes `commit_success.txt` last. `meta` is JSON: the
config, the step, the run, the tokenizer's fingerprint, the writer and version of the memories it
reads, and the fingerprints of everything it reads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

import m3jax
from m3jax.checkpoint import (
    FOLDER,
    check_shapes,
    check_tokenizer,
    checkpoint_folder,
    checkpoint_steps,
    damage_named,
    read_meta,
    reads,
    saved_shapes,
    seal,
    verify,
)
from m3jax.checkpoint_folder import Folder, delete_step, reaching, to_folder
from m3jax.config import flatten, to_json
from m3jax.distributed import meet
from m3jax.errors import CheckpointError
from m3jax.files import digest, json_text, read_sealed, write_sealed
from m3jax.private_apis import delete_checkpoints_by, quiet_failed_checkpoints
from m3jax.store import is_bucket
from m3jax.train.stage_files import StageFiles
from m3jax.train.state import TrainState

CONFIG = "config.json"  # of a stage's folder
_TEMPORARY = ".orbax-checkpoint-tmp"  # part of the names of folders that Orbax deletes
_DELETED = "-deleted"  # ending of the names of those that were whole

# Fields that may change when a run is continued, since they change no result. The guard's fields,
# and the checkpoint intervals that it depends on, do after trouble: a diverged run may go on with
# the guard switched on, or with more tries.
_FREE_SECTIONS = ("mesh", "guard")
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


# Ingredients that another version of the knowledge base changes.
_OF_VERSION = ("references", "index", "bank")


class Checkpoints:
    """Saves (in the background), restores and deletes the checkpoints of one run.

    All methods raise `StoreError` if the stage is in a bucket that cannot be reached.

    Args:
      stage_folder: folder of the stage, or its URL in a bucket, gs://….
      config: the run's config.
      tokenizer_fingerprint: fingerprint of the run's tokenizer.
      writer: `{"hash", "path", "step"}` of the writer of the memories that the run reads, or None.
      version: version of the knowledge base that it reads, or None.
      ingredients: fingerprints of everything that it reads, by name.

    Attributes:
      manager: Orbax's `CheckpointManager`.
    """

    def __init__(
        self,
        stage_folder: Folder | str,
        config: ConfigDict,
        tokenizer_fingerprint: str,
        writer: Mapping[str, Any] | None = None,
        version: int | None = None,
        ingredients: Mapping[str, str] = {},
    ):
        self.folder = to_folder(stage_folder) / FOLDER
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self._meta = {
            "name": "m3jax",
            "version": m3jax.__version__,
            "config": json.loads(to_json(config)),
            "tokenizer": tokenizer_fingerprint,
        }
        self.reads(writer, version, ingredients)
        self.begin("")
        self._saving = -1  # step that is being written
        in_bucket = is_bucket(self.folder)
        if not in_bucket:
            self.folder.mkdir(parents=True, exist_ok=True)
        seal_it = None if in_bucket else self._seal
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Retention(config),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=seal_it),
        )
        quiet_failed_checkpoints()
        with reaching(self.folder):
            self.manager = ocp.CheckpointManager(self.folder, options=options)
        if in_bucket:
            delete_checkpoints_by(self.manager, self._delete_from_bucket)
        # Orbax deletes after a save only; a run that was killed between them may save no more.
        self.delete(set(self.steps()) - kept(self.steps(), config))

    def reads(
        self,
        writer: Mapping[str, Any] | None,
        version: int | None,
        ingredients: Mapping[str, str] = {},
    ) -> None:
        """Records what the run reads from now on: writer and version of memories, ingredients."""
        self._meta["writer"] = None if writer is None else dict(writer)
        self._meta["knowledge"] = version
        self._meta["ingredients"] = dict(ingredients)

    def begin(self, start: str) -> None:
        """Names the run by all that it is made from; `start` identifies its first parameters."""
        config = _compared(self._meta["config"])
        made_from = [config, self.tokenizer_fingerprint, self._meta["ingredients"], start]
        self._meta["run"] = digest(json_text(made_from, sort_keys=True))

    def check_reads(
        self, meta: Mapping[str, Any], checkpoint: Folder | str, own: bool = False
    ) -> None:
        """Raises `CheckpointError` if a checkpoint was trained on another writer's memories.

        Args:
          meta: `meta` of the checkpoint.
          checkpoint: its stage folder, or its folder `…/<step>`.
          own: the checkpoint is of this run, so it must record a writer exactly if the run has one.
        """
        ours, theirs = self._meta["writer"], meta["writer"]
        if (own and (ours is None) != (theirs is None)) or not reads(meta, checkpoint, ours):
            raise CheckpointError(
                f"checkpoint {checkpoint} was trained on memories of the writer {theirs}, but this"
                f" run reads memories of {ours}; use the bank that the checkpoint has read"
            )

    def check_ingredients(self, meta: Mapping[str, Any], checkpoint: Folder | str) -> None:
        """Raises `CheckpointError` if the run's checkpoint was trained on other data.

        Another version of the knowledge base may have other references, index and bank. A
        checkpoint of an earlier version of m3jax records nothing to compare.
        """
        ours, theirs = self._meta["ingredients"], meta.get("ingredients")
        if theirs is None and jax.process_index() == 0:
            print(
                f"checkpoint {checkpoint} is of an earlier version of m3jax and records nothing of"
                " what it was trained on: not compared",
                flush=True,
            )
        other_version = meta["knowledge"] != self._meta["knowledge"]
        for name, fingerprint in (theirs or {}).items():
            if ours.get(name) == fingerprint or (name in _OF_VERSION and other_version):
                continue
            raise CheckpointError(
                f"checkpoint {checkpoint} was trained on another {name} ({fingerprint[:40]}) than"
                f" the workdir has now ({ours.get(name, 'none')[:40]}); put back what it was"
                " trained on, or train on the other in another --workdir, or as a stage of another"
                " name with --init_from"
            )

    def save(self, state: TrainState, step: int, more: Mapping[str, Any] = {}) -> None:
        """Copies the state and writes it in the background; does nothing if `step` was saved last.

        `more` holds further entries of `meta`.
        """
        if self.latest() == step:
            return
        self.wait()
        self._saving = step
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave({**self._meta, **more, "step": step}),
        )
        with reaching(self.folder):
            self.manager.save(step, args=arguments)

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is whole."""
        with reaching(self.folder):
            self.manager.wait_until_finished()

    def _seal(self) -> None:
        """Adds checksums to the finished files of a step (in the background, on process 0).

        Called by Orbax right before it renames the temporary folder.
        """
        written = self.folder.glob(f"{self._saving}{_TEMPORARY}*")
        for folder in [path for path in written if not path.name.endswith(_DELETED)]:
            seal(folder)

    def _delete_from_bucket(self, step: int) -> None:
        """Deletes a step that is kept no longer; called by Orbax after a save."""
        if jax.process_index() == 0:
            delete_step(self.folder, step)

    def recorded(self, key: str) -> Any:
        """Returns an entry of `meta` of the newest checkpoint; None without it or a checkpoint."""
        step = self.latest()
        return None if step is None else read_meta(self.folder / str(step)).get(key)

    def steps(self) -> list[int]:
        """Lists the steps with a whole checkpoint, ascending."""
        with reaching(self.folder):
            return sorted(self.manager.all_steps())

    def latest(self) -> int | None:
        """Returns the step of the newest checkpoint; None without one."""
        with reaching(self.folder):
            step: int | None = self.manager.latest_step()
        return step

    def delete(self, steps: Iterable[int]) -> None:
        """Deletes the checkpoints of `steps`; all processes must call it with the same steps.

        Each is renamed to a temporary name first, so that a kill leaves no partial checkpoint that
        looks whole. Orbax removes folders with such names when it next opens the checkpoints. In a
        bucket `commit_success.txt` goes first.
        """
        ordered = sorted(steps, reverse=True)
        if not ordered:
            return
        if jax.process_index() == 0:
            for step in ordered:
                if is_bucket(self.folder):
                    delete_step(self.folder, step)
                    continue
                gone = self.folder / f"{step}{_TEMPORARY}{_DELETED}"
                shutil.rmtree(gone, ignore_errors=True)
                os.rename(self.folder / str(step), gone)
                shutil.rmtree(gone)
        meet("checkpoints deleted")
        with reaching(self.folder):
            self.manager.reload()

    def restore(self, abstract: TrainState) -> TrainState:
        """Restores the newest state onto the shardings of `abstract`; the saved mesh may differ.

        Raises:
          CheckpointError: there is no checkpoint, it is damaged, or its shapes, its tokenizer, the
            writer of its memories or the data that it was trained on differ from the run's.
        """
        folder = checkpoint_folder(self.folder.parent)
        verify(folder, share=(jax.process_index(), jax.process_count()))
        meta = read_meta(folder)
        check_tokenizer(folder, meta, self.tokenizer_fingerprint)
        self.check_reads(meta, folder, own=True)
        self.check_ingredients(meta, folder)
        self._meta["run"] = meta.get("run", self._meta["run"])
        check_shapes(folder, saved_shapes(folder), abstract.params)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        with damage_named(folder):
            return self.manager.restore(int(folder.name), args=arguments)["state"]

    def close(self) -> None:
        """Waits for the last save and stops the background threads."""
        with reaching(self.folder):
            self.manager.close()


def kept(steps: Sequence[int], config: ConfigDict) -> set[int]:
    """Selects the checkpoints to keep: the `train.keep_last` newest and multiples of `keep_every`.

    With a guard, only multiples of `train.checkpoint_every` count towards `train.keep_last`, so
    that a checkpoint written when the run was stopped displaces none of them; the newest and step 0
    (the start of an imported model) are kept in addition.
    """
    train, guarded = config.train, config.guard.on
    regular = [s for s in steps if not guarded or (s and s % train.checkpoint_every == 0)]
    forever = [s for s in steps if train.keep_every and s % train.keep_every == 0]
    stay = {max(steps, default=0), *sorted(regular)[-train.keep_last :], *forever}
    return (stay | {0} if guarded else stay) & set(steps)


class _Retention:
    """Implements Orbax's preservation policy by `kept`."""

    def __init__(self, config: ConfigDict):
        self._config = config

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        stay = kept([checkpoint.step for checkpoint in checkpoints], self._config)
        return [checkpoint.step in stay for checkpoint in checkpoints]


def knowledge_version(stage_folder: Folder | str) -> int | None:
    """Returns the version of the knowledge base that a stage's newest checkpoint was trained on.

    None if there is no checkpoint, or it was trained without memories.
    """
    steps = checkpoint_steps(stage_folder)
    return read_meta(checkpoint_folder(stage_folder)).get("knowledge") if steps else None


def check_owner(stage_folder: str | Path, config: ConfigDict) -> None:
    """Checks that a stage folder is new, or that its `config.json` is this run's config.

    Without `config.json`, the config that its newest checkpoint records counts. Fields that change
    no result may differ: the mesh, the guard, threads, and the intervals of
    logging, saving and evaluation.

    Raises:
      CheckpointError: `config.json` is damaged, or a field differs; names it and both values.
    """
    path, steps = Path(stage_folder) / CONFIG, checkpoint_steps(stage_folder)
    if path.exists():
        read = read_sealed(path, unsealed=True)
        if read is None:
            raise CheckpointError(
                f"{path} is damaged; restore it from a copy, or move it elsewhere: the same command"
                " writes it again"
            )
    elif steps:
        read = read_meta(checkpoint_folder(stage_folder))["config"]
    else:
        return
    ours, theirs = _compared(json.loads(to_json(config))), _compared(read)
    for field in sorted(ours.keys() | theirs.keys()):
        theirs_value, our_value = (side.get(field, "absent") for side in (theirs, ours))
        if theirs_value != our_value:
            raise CheckpointError(
                f"{StageFiles(path.parent).place} belongs to another run: config.{field} is"
                f" {theirs_value!r} there and {our_value!r} here. Use the same config, or another"
                " --workdir"
            )


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config that change results, by path."""
    fields = flatten(config).items()
    return {f: v for f, v in fields if f not in _FREE and f.split(".")[0] not in _FREE_SECTIONS}


def claim(stage_folder: str | Path, config: ConfigDict) -> None:
    """Marks a stage folder as this run's by its `config.json`; raises as `check_owner`."""
    check_owner(stage_folder, config)
    if jax.process_index() == 0:
        write_sealed(Path(stage_folder) / CONFIG, json.loads(to_json(config)))
        StageFiles(Path(stage_folder)).put(CONFIG)
