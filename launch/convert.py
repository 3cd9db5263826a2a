"""Takes a Llama of Hugging Face as the first checkpoint of a stage, or writes a checkpoint as one.

    python launch/convert.py --from_hf=FOLDER --config=configs/….py --workdir=runs/llama \\
        '--special_tokens=<|pad|>,<|begin|>,<|reserved|>,<|end|>'
    python launch/convert.py --to_hf=FOLDER --workdir=runs/wiki --checkpoint=runs/wiki/continual

--from_hf reads config.json and model.safetensors (or its parts) of a Llama, Qwen2 or Qwen3 and
writes step 0 of WORKDIR/<config.stage>, from which launch/write_bank.py and launch/train.py go on.
The config must have the model's shape; where it has not, the message lists what to set. A
tokenizer.json becomes WORKDIR/tokenizer; without one, the workdir must have the tokenizer that the
model was trained with. A tokenizer of others must be a byte-level BPE; four of its special tokens
become `<pad> <s> <reference> </s>`, and it is renumbered with the rows of the embedding. For
`<reference>` take one that the model has never seen. --tokenizer names another folder that has it.
Where it is lost, --tokenizer=numbers writes texts as numbers of tokens (`t403 t17`), and
--special_tokens are four numbers; launch/make_texts.py has the model make up such texts.

--to_hf writes what transformers.LlamaForCausalLM (Qwen3ForCausalLM where model.qk_norm is on) and
AutoTokenizer load. A Llama reads no memories; its logits are those of the checkpoint without
memories. If that was trained with the prefix, begin with `<s><reference>` at the position_ids 0 and
1, and give the text those from 2 + memory.reference_length on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from m3jax import cli

if TYPE_CHECKING:
    import numpy as np

    from m3jax.text.tokenizer import Tokenizer

_CONFIG = config_flags.DEFINE_config_file("config", None, "--from_hf: the config of the stage.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_FROM = flags.DEFINE_string("from_hf", None, "Folder of a downloaded model to read.")
_TO = flags.DEFINE_string("to_hf", None, "Folder to write; it must not hold a model.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "--to_hf: stage folder, or checkpoints/STEP in it; default WORKDIR/warmup.",
)
_SPECIAL = flags.DEFINE_list(
    "special_tokens",
    None,
    "--from_hf: the tokens of its tokenizer that become padding, start of a text, mark of a"
    " reference and end of a text; not needed for a folder written by --to_hf.",
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "--from_hf: folder with the model's tokenizer.json, where its own has none; or `numbers`: texts"
    " are numbers of tokens.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "--to_hf: of the weights; default model.param_dtype."
)


def main(argv: list[str]) -> None:
    """Reads or writes a folder."""
    from m3jax.config import validate

    workdir = Path(str(_WORKDIR.value))
    if (_FROM.value is None) == (_TO.value is None):
        raise app.UsageError("give one of --from_hf and --to_hf")
    used = (_CONFIG, _SPECIAL, _TOKENIZER) if _FROM.value is None else (_CHECKPOINT, _DTYPE)
    for flag in used:
        if flag.value is not None:
            raise app.UsageError(f"--{flag.name} has no use here; leave it out")
    if _FROM.value is None:
        _write(workdir, Path(str(_TO.value)))
    elif _CONFIG.value is None:
        raise app.UsageError("--from_hf needs --config, the config of the stage")
    else:
        _read(validate(_CONFIG.value), workdir, Path(_FROM.value))


def _read(config: ConfigDict, workdir: Path, folder: Path) -> None:
    import contextlib

    import jax

    from m3jax.config import prefix_tokens
    from m3jax.make_model import make_model
    from m3jax.mesh import make_mesh
    from m3jax.model.hf import read_params
    from m3jax.train.checkpoints import Checkpoints, claim
    from m3jax.train.optimizer import make_optimizer
    from m3jax.train.state import abstract_state, init_state, state_shardings

    stage = workdir / config.stage
    _check_stage(config, stage)
    tokenizer, order, ours = _tokenizer(workdir, folder, config.model.vocabulary)
    params = read_params(folder, config.model, config.memory, order)
    model, optimizer = make_model(config, prefix_tokens(config)), make_optimizer(config)
    abstract = abstract_state(model, optimizer, make_mesh(config))
    state = init_state(
        *(config, model, optimizer, abstract),
        jax.device_put(params, state_shardings(abstract).params),
    )
    if not ours:
        _save_tokenizer(tokenizer, workdir, folder)
    claim(stage, config)
    with contextlib.closing(Checkpoints(stage, config, tokenizer.fingerprint)) as checkpoints:
        checkpoints.save(state, 0)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{stage}: step 0 with {count} parameters of {folder}; {tokenizer.size} tokens")


def _check_stage(config: ConfigDict, stage: Path) -> None:
    """Refuses a stage that reads memories or has begun."""
    from m3jax.checkpoint import checkpoint_folder
    from m3jax.errors import CheckpointError, ConfigError
    from m3jax.train.checkpoints import check_owner

    if config.memory.source != "none":
        raise ConfigError(
            f"config.memory.source = {config.memory.source!r}: a Llama has read no memories; use"
            " the config of the warmup stage, then launch/train.py --init_from"
        )
    check_owner(stage, config)
    try:
        found = checkpoint_folder(stage)
    except CheckpointError:
        return
    raise CheckpointError(f"{found} is there already; use another --workdir, or delete {stage}")


def _tokenizer(workdir: Path, folder: Path, size: int) -> tuple[Tokenizer, np.ndarray | None, bool]:
    """The tokenizer, which token of theirs each of its tokens is, whether the workdir has it."""
    from m3jax.errors import HuggingFaceError
    from m3jax.text.id_tokenizer import numbered_tokenizer
    from m3jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer
    from m3jax.text.tokenizer_import import adopt_tokenizer

    given, own = _TOKENIZER.value, workdir / "tokenizer"
    path = Path(given or folder) / "tokenizer.json"
    there = (own / "manifest.json").is_file()
    if given == "numbers":
        text, order = numbered_tokenizer(size, _SPECIAL.value, SPECIAL_TOKENS)
    elif path.is_file():
        text, order = adopt_tokenizer(path.read_text("utf-8"), _SPECIAL.value, SPECIAL_TOKENS)
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


def _save_tokenizer(tokenizer: Tokenizer, workdir: Path, folder: Path) -> None:
    """With the mark of a finished part, so that launch/prepare.py trains no other in its place."""
    from m3jax.files import write_atomically
    from m3jax.workdir import INPUTS

    tokenizer.save(workdir / "tokenizer")
    mark = {"taken_from": str(folder.absolute())}
    write_atomically(workdir / "tokenizer" / INPUTS, json.dumps(mark).encode())


def _write(workdir: Path, folder: Path) -> None:
    from m3jax.checkpoint import read_model
    from m3jax.model.hf import write_folder
    from m3jax.text.tokenizer import BOS, END, PAD, SPECIAL_TOKENS

    checkpoint, config, params, meta, _ = read_model(_CHECKPOINT.value or workdir / "warmup")
    roles = {"bos": BOS, "eos": END, "pad": PAD}
    write_folder(
        folder,
        config.model,
        config.memory,
        params,
        dtype=_DTYPE.value,
        positions=meta["config"]["data"]["sequence_length"] + 2 + config.memory.reference_length,
        tokenizer=(checkpoint.parents[2] / "tokenizer" / "tokenizer.json").read_text("utf-8"),
        special={role: (SPECIAL_TOKENS[token], token) for role, token in roles.items()},
    )
    print(f"{folder}: step {meta['step']} of {checkpoint.parents[1]} as a Llama")


if __name__ == "__main__":
    cli.run(main, required=["workdir"])
