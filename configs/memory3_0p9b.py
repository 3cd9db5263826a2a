"""The 0.9B shape with which Memory³ (arXiv 2407.01178, §5) showed that two stages are needed.

    python launch/train.py --config=configs/memory3_0p9b.py --workdir=DIR
    python launch/train.py --config=configs/memory3_0p9b.py:stage=continual --workdir=DIR \\
        --init_from=DIR/warmup
    python launch/train.py --config=configs/memory3_0p9b.py:stage=continual,memories=online ...

Options: stage=warmup|continual|sft|dpo, memories=precomputed|online (in all but warmup: from the
bank, or encoded in the step with gradient, as the paper did). SFT and DPO have the settings of the
paper (§7) in rows of several chats; DPO's batch and its one epoch are ours.

0.923e9 parameters without embeddings. What to expect: trained with memories from the start, the
loss is that of a model without; started from a warmup checkpoint it drops visibly below.

Hardware and time: never run. Counted useful work of a step is 3.06e16 FLOP (warmup), 3.06e16
(precomputed), 5.32e16 (online): 0.61, 0.61 and 1.06 s at the peak of 256 TPU v5e chips.

The paper does not state the length and learning rates of this experiment; those are ours.
"""

from ml_collections import ConfigDict

import m3jax.config

OPTIONS = {"stage": ("warmup", "continual", "sft", "dpo"), "memories": ("precomputed", "online")}


def get_config(options: str = "") -> ConfigDict:
    """The config; `options` is the text after the colon of `--config=configs/memory3_0p9b.py:…`."""
    chosen = m3jax.config.parse_options(options, **OPTIONS)
    config = m3jax.config.default()
    config.name = "memory3_0p9b"
    config.stage = chosen["stage"]

    config.model.layers = 40
    config.model.query_heads = 32
    config.model.kv_heads = 8
    config.model.head_dim = 64
    config.model.hidden = 2048
    config.model.mlp_width = 2048
    config.model.vocabulary = 60_416  # 60 299 entries, rounded up to a multiple of 128
    config.model.param_dtype = "bfloat16"
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.model.attention = "auto"

    config.memory.first_layer = 0
    config.memory.layers = 20
    config.memory.reference_length = 128
    config.memory.kept_tokens = 8
    config.memory.chunk_length = 64
    config.memory.per_chunk = 1
    config.memory.window = 5
    config.memory.per_prompt_chunk = 5

    config.writer.batch_references = 4096
    config.text.vocabulary = 60_299
    config.text.shards = 256

    config.data.sequence_length = 2048
    config.data.batch_size = 2048
    config.data.threads = 16
    config.evaluation.batch_size = 256

    config.optimizer.learning_rate = 6e-4
    config.optimizer.lr_warmup_steps = 1000
    config.optimizer.schedule = "wsd"
    config.optimizer.weight_decay = 0.1

    config.train.steps = 12_000  # 50B tokens
    config.train.checkpoint_every = 500
    config.train.keep_every = 2000
    config.train.evaluate_every = 500
    config.guard.on = True  # the paper's runs diverged, and were restarted by hand
    config.guard.skip_after = 50  # of about 4M tokens each
    config.mesh.data = 8
    config.mesh.fsdp = -1

    if config.stage == "continual":
        config.memory.source = chosen["memories"]
        config.optimizer.learning_rate = 2e-4
        config.optimizer.lr_warmup_steps = 100
        config.train.steps = 2400  # 10B tokens
    if config.stage in ("sft", "dpo"):
        m3jax.config.use_alignment_settings(config)
        config.memory.source = chosen["memories"]
        config.data.batch_size = 512
        config.train.checkpoint_every = 100
        config.train.keep_every = 0
        config.train.evaluate_every = 100
    return m3jax.config.validate(config)
