"""Memory3-2B: the shape and training settings of Memory³ (arXiv 2407.01178, §3 and §5).

    python launch/train.py --config=configs/memory3_2b.py --workdir=DIR
    python launch/train.py --config=configs/memory3_2b.py:stage=continual --workdir=DIR \\
        --init_from=DIR/warmup
    python launch/train.py --config=configs/memory3_2b.py:stage=continual,memories=online ...

Options: stage=warmup|continual|sft|dpo, memories=precomputed|online (in all but warmup: from the
bank, or encoded in the step with gradient, as the paper did). SFT and DPO have the settings of the
paper (§7) in rows of several chats; DPO's batch and its one epoch are ours.

2.433e9 parameters without embeddings, steps of 4.19M tokens. The paper planned 4T tokens of warmup
(it ended at 3.1T, before a divergence) and used 120B of continual train. The average of its seven
tasks after fine-tuning was 63.31 with memory and 60.80 without.

Hardware and time: made for a TPU v5e-256; compiled for one (launch/compile.py: 11.4 GB a chip in
warmup, 11.7 GB with precomputed memories, 13.4 GB with online ones in two microbatches), but never
run. Counted useful work of a step is 7.34e16 FLOP (warmup), 7.35e16 (precomputed), 1.33e17
(online): 1.45, 1.46 and 2.64 s at peak.

The paper does not state learning rates, rise and Adam settings of the two stages; those are ours.
"""

from ml_collections import ConfigDict

import m3jax.config

OPTIONS = {"stage": ("warmup", "continual", "sft", "dpo"), "memories": ("precomputed", "online")}


def get_config(options: str = "") -> ConfigDict:
    """The config; `options` is the text after the colon of `--config=configs/memory3_2b.py:…`."""
    chosen = m3jax.config.parse_options(options, **OPTIONS)
    config = m3jax.config.default()
    config.name = "memory3_2b"
    config.stage = chosen["stage"]

    config.model.layers = 44
    config.model.query_heads = 40
    config.model.kv_heads = 8
    config.model.head_dim = 80
    config.model.hidden = 3200
    config.model.mlp_width = 3200
    config.model.vocabulary = 60_416  # 60 299 entries, rounded up to a multiple of 128
    config.model.param_dtype = "bfloat16"
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.model.attention = "auto"

    config.memory.first_layer = 0
    config.memory.layers = 22
    config.memory.reference_length = 128
    config.memory.kept_tokens = 8
    config.memory.chunk_length = 64
    config.memory.per_chunk = 1
    config.memory.window = 5
    config.memory.per_prompt_chunk = 5

    config.writer.batch_references = 4096
    config.text.vocabulary = 60_299
    config.text.shards = 1024

    config.data.sequence_length = 2048
    config.data.batch_size = 2048
    config.data.threads = 16
    config.evaluation.batch_size = 256

    config.optimizer.learning_rate = 4e-4
    config.optimizer.lr_warmup_steps = 2000
    config.optimizer.schedule = "wsd"
    config.optimizer.weight_decay = 0.1

    config.train.steps = 953_674  # 4T tokens
    config.train.checkpoint_every = 1000
    config.train.keep_every = 10_000  # the guard may have to go back further
    config.train.evaluate_every = 1000
    config.guard.on = True  # the paper's runs diverged, and were restarted by hand
    config.guard.skip_after = 50  # of about 4M tokens each
    # Eight shards: no gradient of a layer is padded when it is scattered (launch/compile.py).
    config.mesh.data = 32
    config.mesh.fsdp = -1

    if config.stage == "continual":
        config.memory.source = chosen["memories"]
        config.train.microbatches = 2 if chosen["memories"] == "online" else 1
        config.optimizer.learning_rate = 1e-4
        config.optimizer.lr_warmup_steps = 500
        config.train.steps = 28_610  # 120B tokens
    if config.stage in ("sft", "dpo"):
        m3jax.config.use_alignment_settings(config)
        config.memory.source = chosen["memories"]
        config.data.batch_size = 512
        config.train.checkpoint_every = 100
        config.train.keep_every = 0
        config.train.evaluate_every = 100
    return m3jax.config.validate(config)
