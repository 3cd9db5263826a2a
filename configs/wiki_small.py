"""A small model for real text, to go through the whole chain on a CPU or one GPU.

    python launch/prepare.py --config=configs/wiki_small.py --workdir=DIR --documents=a.jsonl.gz
    python launch/train.py --config=configs/wiki_small.py --workdir=DIR
    python launch/write_bank.py --config=configs/wiki_small.py --workdir=DIR
    python launch/train.py --config=configs/wiki_small.py:stage=continual --workdir=DIR \\
        --init_from=DIR/warmup
    python launch/evaluate.py losses --config=configs/wiki_small.py:stage=continual \\
        --workdir=DIR

Options: stage=warmup|continual|sft|dpo, memories=precomputed|online (in all but warmup; sft and dpo
after launch/prepare.py chats, with the paper's settings at batches of 8), shift=0|1 (whose text
retrieves a training chunk's reference: its own, or the previous chunk's).

15.7M parameters, 12.6M without the embedding, at rows of 512 tokens. It reproduces no figure of the
paper. The steps are a demonstration (1.6M tokens): on a GPU raise `--config.train.steps` and
`--config.data.batch_size`. What it measured on Wikipedia is in the README.

Hardware and time: two CPU cores, 780 tokens/s in warmup and 810 in continual train where nothing
else ran: 26 and 8 minutes at that rate; 20 098 memories written in 5 minutes. Counted useful work
of a warmup step is 0.21 TFLOP.
"""

from ml_collections import ConfigDict

import m3jax.config

OPTIONS = {
    "stage": ("warmup", "continual", "sft", "dpo"),
    "memories": ("precomputed", "online"),
    "shift": (0, 1),
}


def get_config(options: str = "") -> ConfigDict:
    """Builds the config of `--config=configs/wiki_small.py:OPTIONS`."""
    chosen = m3jax.config.parse_options(options, **OPTIONS)
    config = m3jax.config.default()
    config.name = "wiki_small"
    config.stage = chosen["stage"]

    config.model.layers = 8
    config.model.query_heads = 6
    config.model.kv_heads = 2
    config.model.head_dim = 64
    config.model.hidden = 384
    config.model.mlp_width = 1024
    config.model.vocabulary = 8_192
    config.model.tied_embeddings = True
    config.model.prefix = "always"

    config.memory.first_layer = 0
    config.memory.layers = 4
    config.memory.reference_length = 128
    config.memory.kept_tokens = 8
    config.memory.chunk_length = 64
    config.memory.window = 5
    config.memory.per_prompt_chunk = 5

    config.writer.batch_references = 64
    config.text.vocabulary = 8_192
    config.text.validation_share = 0.05
    config.retrieval.dimension = 1024
    config.retrieval.shift = chosen["shift"]

    config.data.sequence_length = 512
    config.data.batch_size = 4
    config.data.threads = 2
    config.evaluation.batch_size = 8

    config.optimizer.learning_rate = 1e-3
    config.optimizer.lr_warmup_steps = 50
    config.optimizer.lr_decay_share = 0.4
    config.train.steps = 600
    config.train.checkpoint_every = 100
    config.train.evaluate_every = 100

    if config.stage == "continual":
        config.memory.source = chosen["memories"]
        config.optimizer.learning_rate = 5e-4
        config.optimizer.lr_warmup_steps = 10
        config.optimizer.lr_decay_share = 0.8
        config.train.steps = 200
        config.train.checkpoint_every = 50
        config.train.evaluate_every = 50
    if config.stage in ("sft", "dpo"):
        m3jax.config.use_alignment_settings(config)
        config.memory.source = chosen["memories"]
        config.data.batch_size = 8
        config.train.checkpoint_every = config.train.evaluate_every = 50
    return m3jax.config.validate(config)
