"""Converts Hugging Face folders to checkpoints of a stage, and checkpoints to such folders."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from m3jax.checkpoint import checkpoint_folder, checkpoint_steps, read_model
from m3jax.errors import CheckpointError, ConfigError, HuggingFaceError
from m3jax.files import write_atomically
from m3jax.mesh import make_mesh
from m3jax.model.hf import read_params, write_folder
from m3jax.text.tokenizer import BOS, END, PAD, SPECIAL_TOKENS, Tokenizer
from m3jax.text.tokenizer_import import adopt_tokenizer, id_tokenizer
from m3jax.train.checkpoints import Checkpoints, check_owner, claim
from m3jax.train.state import Program
from m3jax.workdir import INPUTS


def import_folder(
    config: ConfigDict,
    workdir: Path,
    folder: Path,
    *,
    tokenizer: str | None = None,
    special: list[str] | None = None,
) -> str:
    """Imports a downloaded Hugging Face model as the checkpoint of step 0 of a stage.

    Args:
      config: config of the stage, with the model's shape and without memories.
      workdir: folder of the run; it gets the model's tokenizer.
      folder: the model's folder, with config.json and weights.
      tokenizer: folder with tokenizer.json, if `folder` has none; or `numbers`, a tokenizer that
        writes every token as its id.
      special: four special tokens of that tokenizer, see `text.tokenizer_import`.

    Returns:
      A sentence with the numbers of parameters and tokens.

    Raises:
      ConfigError: the config reads memories.
      HuggingFaceError, TextError: weights or tokenizer are missing, or do not fit the config or the
        workdir.
      CheckpointError: the stage folder has a checkpoint already, or belongs to another run.
    """
    stage = workdir / config.stage
    if config.memory.source != "none":
        raise ConfigError(
            f"config.memory.source = {config.memory.source!r}: a Llama has read no memories; use"
            " the config of the warmup stage, then launch/train.py --init_from"
        )
    check_owner(stage, config)
    if checkpoint_steps(stage):
        raise CheckpointError(
            f"{checkpoint_folder(stage)} is there already; use another --workdir, or delete {stage}"
        )
    size = config.model.vocabulary
    own, order, ours = _tokenizer(workdir, folder, size, tokenizer, special)
    params = read_params(folder, config.model, config.memory, order)
    program = Program(config, make_mesh(config))
    state = program.init(jax.device_put(params, program.shardings.params))
    if not ours:  # marked as finished, so that launch/prepare.py trains no other in its place
        own.save(workdir / "tokenizer")
        mark = {"taken_from": str(folder.absolute())}
        write_atomically(workdir / "tokenizer" / INPUTS, json.dumps(mark).encode())
    claim(stage, config)
    with contextlib.closing(Checkpoints(stage, config, own.fingerprint)) as checkpoints:
        checkpoints.save(state, 0)
    count = sum(x.size for x in jax.tree.leaves(params))
    return f"{stage}: step 0 with {count} parameters of {folder}; {own.size} tokens"


def _tokenizer(
    workdir: Path, folder: Path, size: int, given: str | None, special: list[str] | None
) -> tuple[Tokenizer, np.ndarray | None, bool]:
    """Returns tokenizer, model id of each token (None: the same), and if the workdir has it."""
    own = workdir / "tokenizer"
    path = Path(given or folder) / "tokenizer.json"
    there = (own / "manifest.json").is_file()
    if given == "numbers":
        text, order = id_tokenizer(size, special, SPECIAL_TOKENS)
    elif path.is_file():
        text, order = adopt_tokenizer(path.read_text("utf-8"), special, SPECIAL_TOKENS)
    elif given or not there:
        places = f"{given} has no" if given else f"neither {folder} nor {workdir} has a"
        raise HuggingFaceError(
            f"{places} tokenizer; download tokenizer.json with the weights, and name its folder"
            " (--tokenizer) where it is another; --tokenizer=numbers does without"
        )
    else:
        return Tokenizer.load(own), None, True
    tokenizer = Tokenizer(text)
    if there and Tokenizer.load(own).fingerprint != tokenizer.fingerprint:
        raise HuggingFaceError(
            f"{own} is another tokenizer than that of {given or folder}; use another --workdir"
        )
    return tokenizer, order, there


def export_folder(checkpoint: str | Path, folder: Path, *, dtype: str | None = None) -> str:
    """Writes a checkpoint as a Hugging Face folder, which `transformers` loads.

    Args:
      checkpoint: stage folder, or checkpoints/STEP in it.
      folder: folder to write; it must not hold a model.
      dtype: dtype of the weights; default the dtype of the parameters.

    Returns:
      A sentence with the folder and the checkpoint.

    Raises:
      CheckpointError, TextError: there is no checkpoint, it is damaged, or its workdir has no
        tokenizer.
      HuggingFaceError: the folder holds a model, or the weights cannot be exported.
    """
    path, config, params, meta, _ = read_model(checkpoint)
    roles = {"bos": BOS, "eos": END, "pad": PAD}
    write_folder(
        folder,
        config.model,
        config.memory,
        params,
        dtype=dtype,
        positions=meta["config"]["data"]["sequence_length"] + 2 + config.memory.reference_length,
        tokenizer=(path.parents[2] / "tokenizer" / "tokenizer.json").read_text("utf-8"),
        special={role: (SPECIAL_TOKENS[token], token) for role, token in roles.items()},
    )
    return f"{folder}: step {meta['step']} of {path.parents[1]} as a Llama"
