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

    config.model.update(layers=8, query_heads=6, kv_heads=2, head_dim=64, hidden=384)
    config.model.update(mlp_width=1024, vocabulary=8_192, tied_embeddings=True, prefix="always")
    config.memory.update(layers=4, reference_length=128, kept_tokens=8, chunk_length=64)
    config.memory.update(window=5, per_prompt_chunk=5)
    config.writer.batch_references = 64
    config.text.update(vocabulary=8_192, validation_share=0.05)
    config.retrieval.update(dimension=1024, shift=chosen["shift"])
    config.data.update(sequence_length=512, batch_size=4, threads=2)
    config.evaluation.batch_size = 8
    config.optimizer.update(learning_rate=1e-3, lr_warmup_steps=50, lr_decay_share=0.4)
    config.train.update(steps=600, checkpoint_every=100, evaluate_every=100)

    if config.stage != "warmup":
        config.memory.source = chosen["memories"]
    if config.stage == "continual":
        config.optimizer.update(learning_rate=5e-4, lr_warmup_steps=10, lr_decay_share=0.8)
        config.train.update(steps=200, checkpoint_every=50, evaluate_every=50)
    if config.stage in ("sft", "dpo"):
        m3jax.config.use_alignment_settings(config)
        config.data.batch_size = 8
        config.train.update(checkpoint_every=50, evaluate_every=50)
    return m3jax.config.validate(config)
