"""Texts that a checkpoint makes up: documents to train on, and the references that they go on from.

    python launch/make_texts.py --config=configs/byo_llama.py --workdir=runs/llama \\
        --texts=runs/llama/texts --count=8000 --tokens=128 --split=64

For a model whose own text or tokenizer is not at hand. Every text is drawn from the model; its
first --split tokens go to knowledge.jsonl, what follows to documents.jsonl, with the key of its
reference. launch/prepare.py takes both (--documents, --knowledge) with the config fields
retrieval.ids = "stored" and data.packing = "document".

The script prints what the model itself, with a text's first part in its context, loses on the rest
of the texts that are held out: at temperature 1 no reader can lose less on average.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from m3jax import cli

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file of the checkpoint's stage, one without memory."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, with tokenizer and checkpoint.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Stage folder, or checkpoints/STEP in it; default WORKDIR/<config.stage>."
)
_TEXTS = flags.DEFINE_string("texts", None, "Folder to write; finished files are kept.")
_COUNT = flags.DEFINE_integer("count", 8000, "Texts to draw.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 128, "Most tokens of a text.", lower_bound=2)
_SPLIT = flags.DEFINE_integer("split", 64, "Tokens of the first part.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "Of the draws; 1 is the model's own distribution."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
_BATCH = flags.DEFINE_integer("batch", 256, "Texts drawn together.", lower_bound=1)
cli.define_cache_flag()
flags.adopt_module_key_flags(cli)  # --help shows them


def main(argv: list[str]) -> None:
    """Draws, writes, and prints the counts."""
    cli.use_compilation_cache()
    from m3jax.config import validate
    from m3jax.errors import ConfigError
    from m3jax.evaluation.sampled_texts import make_texts
    from m3jax.inference.session import Session

    config = validate(_CONFIG.value)
    if config.memory.source != "none":
        raise ConfigError(
            f"config.memory.source = {config.memory.source!r}: texts are made up by a model without"
            " memories; use the config of the warmup stage"
        )
    session = Session(config, str(_WORKDIR.value), checkpoint=_CHECKPOINT.value)
    folder = Path(str(_TEXTS.value))
    report = make_texts(
        session,
        folder,
        count=_COUNT.value,
        tokens=_TOKENS.value,
        split=_SPLIT.value,
        temperature=_TEMPERATURE.value,
        seed=_SEED.value,
        batch=_BATCH.value,
    )
    print(f"{folder}: {report['kept']} of {report['texts']} texts are longer than their first part")
    if report["held_out"]:
        print(
            f"loss of the whole text's reader: {report['loss_whole']:.4f} nats a token, on"
            f" {report['held_out']} held-out tokens"
        )


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir", "texts"])
