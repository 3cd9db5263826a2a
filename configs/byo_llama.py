"""Bring your own Llama: any downloaded model as a memory model, by continual train alone.

    python launch/convert.py from_hf --config=configs/byo_llama.py:model=LLAMA --workdir=DIR \\
        --model=LLAMA
    python launch/prepare.py    --config=configs/byo_llama.py:model=LLAMA --workdir=DIR \\
        --documents=articles.jsonl.gz
    python launch/write_bank.py --config=configs/byo_llama.py:model=LLAMA --workdir=DIR
    python launch/train.py      --config=configs/byo_llama.py:model=LLAMA,stage=continual \\
        --workdir=DIR --init_from=DIR/warmup
    python launch/evaluate.py losses --config=configs/byo_llama.py:model=LLAMA,stage=continual \\
        --workdir=DIR

Options: model=PATH takes the shape from a model of a family that docs/llama.md lists: a folder with
config.json, a GGUF file, or a wheel with one (without it the shape is that of a tiny Llama of
260 000 parameters); stage=warmup (the imported model as it is) or continual;
layers=first|middle|all, where the memory layers are: the first half, 25–75 % of the depth, or
everywhere (`memory.heads` names single layers and heads); memories=precomputed|online.

Sizes other than the shape are for the small model and a CPU, and fields as any other: for a large
one raise `--config.data.sequence_length`, `data.batch_size`, `memory.reference_length` and
`train.steps`. docs/llama.md goes through it step by step, with what was measured.

Reproduces Memory³ §7 "converting an existing pretrained transformer with a little finetuning",
which the paper named and did not do. Hardware and time: the small model trains 2000 steps in
minutes on one CPU core.
"""

from ml_collections import ConfigDict

import m3jax.config
from m3jax.errors import ConfigError
from m3jax.places import FILE_OR_FOLDER, read_path
from m3jax.train.hf_checkpoint import read_model_fields

OPTIONS = {
    "stage": ("warmup", "continual"),
    "layers": ("first", "middle", "all"),
    "memories": ("precomputed", "online"),
}
SMALL = {
    **{"layers": 4, "query_heads": 4, "kv_heads": 4, "head_dim": 16, "hidden": 64},
    **{"mlp_width": 172, "vocabulary": 512, "tied_embeddings": True},
}


def get_config(options: str = "") -> ConfigDict:
    """Builds the config of `--config=configs/byo_llama.py:OPTIONS`."""
    words = [word.strip() for word in options.split(",")]
    models = [word.removeprefix("model=") for word in words if word.startswith("model=")]
    chosen = m3jax.config.parse_options(
        ",".join(word for word in words if not word.startswith("model=")), **OPTIONS
    )
    config = m3jax.config.default()
    config.name = "byo_llama"
    config.stage = chosen["stage"]

    if models:
        folder = read_path(f"model={models[-1]}", models[-1], FILE_OR_FOLDER, ConfigError)
        config.model.update(read_model_fields(folder))
    else:
        config.model.update(SMALL)
    config.text.vocabulary = min(config.text.vocabulary, config.model.vocabulary)
    layers = config.model.layers
    config.memory.layers = layers if chosen["layers"] == "all" else max(1, layers // 2)
    spare = layers - config.memory.layers
    config.memory.first_layer = spare // 2 if chosen["layers"] == "middle" else 0

    config.memory.update(reference_length=64, kept_tokens=8, chunk_length=16, window=8)
    config.memory.dtype = config.model.compute_dtype
    config.text.validation_share = 0.1
    config.retrieval.shift = 1
    config.data.update(sequence_length=128, batch_size=32, threads=2)
    config.evaluation.update(batch_size=32, batches=32)
    config.optimizer.update(learning_rate=1e-3, lr_warmup_steps=50, lr_decay_share=0.5)
    config.train.update(steps=2000, checkpoint_every=500, evaluate_every=500)
    if config.stage == "continual":
        config.memory.update(source=chosen["memories"], dropout=0.15)
    return m3jax.config.validate(config)
