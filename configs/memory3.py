"""Memory³ (arXiv 2407.01178): its 2.4B model, and the 0.9B with which it showed the two stages.

    python launch/train.py --config=configs/memory3.py --workdir=DIR
    python launch/train.py --config=configs/memory3.py:stage=continual --workdir=DIR \\
        --init_from=DIR/warmup
    python launch/train.py --config=configs/memory3.py:shape=0p9b,memories=online …

Options: shape=2b|0p9b; stage=warmup|continual|sft|dpo; memories=precomputed|online (in all but
warmup: from the bank, or encoded in the step with gradient, as the paper did). SFT and DPO have the
settings of the paper (§7) in rows of several chats; DPO's batch and its one epoch are ours. Steps
are of 4.19M tokens.

2b (§3): 2.433e9 parameters without embeddings. The paper planned 4T tokens of warmup (it ended at
3.1T, before a divergence) and used 120B of continual train. The average of its seven tasks after
fine-tuning was 63.31 with memory and 60.80 without. Hardware and time: made for a TPU v5e-256;
compiled for one (launch/compile.py: 11.4 GB a chip in warmup, 11.7 GB with precomputed memories,
13.4 GB with online ones in two microbatches), but never run. Counted useful work of a step is
7.34e16 FLOP (warmup), 7.35e16 (precomputed), 1.33e17 (online): 1.45, 1.46 and 2.64 s at peak.

0p9b (§5): 0.923e9 parameters without embeddings. What to expect: trained with memories from the
start, the loss is that of a model without; started from a warmup checkpoint it drops visibly below.
Hardware and time: never run. Counted useful work of a step is 3.06e16 FLOP (warmup), 3.06e16
(precomputed), 5.32e16 (online): 0.61, 0.61 and 1.06 s at the peak of 256 TPU v5e chips.

The paper does not state learning rates, rise and Adam settings of the stages, nor the length of the
0.9B runs; those are ours.
"""

from ml_collections import ConfigDict

import m3jax.config

OPTIONS = {
    "shape": ("2b", "0p9b"),
    "stage": ("warmup", "continual", "sft", "dpo"),
    "memories": ("precomputed", "online"),
}


def get_config(options: str = "") -> ConfigDict:
    """Builds the config of `--config=configs/memory3.py:OPTIONS`."""
    chosen = m3jax.config.parse_options(options, **OPTIONS)
    config = m3jax.config.default()
    config.name = f"memory3_{chosen['shape']}"
    config.stage = chosen["stage"]

    # The tokenizer's 60 299 entries are rounded up to a multiple of 128.
    config.model.update(kv_heads=8, vocabulary=60_416, remat="full", attention="auto")
    config.model.update(param_dtype="bfloat16", compute_dtype="bfloat16")
    config.memory.update(first_layer=0, reference_length=128, kept_tokens=8, chunk_length=64)
    config.memory.update(per_chunk=1, window=5, per_prompt_chunk=5)
    config.writer.batch_references = 4096
    config.text.vocabulary = 60_299
    config.data.update(sequence_length=2048, batch_size=2048, threads=16)
    config.evaluation.batch_size = 256
    config.optimizer.update(schedule="wsd", weight_decay=0.1)
    # The paper's runs diverged, and were restarted by hand. Batches are of about 4M tokens.
    config.guard.update(on=True, skip_after=50)
    config.mesh.fsdp = -1

    if config.stage != "warmup":
        config.memory.source = chosen["memories"]
    (_set_2b if chosen["shape"] == "2b" else _set_0p9b)(config)
    if config.stage in ("sft", "dpo"):
        m3jax.config.use_alignment_settings(config)
        config.train.update(checkpoint_every=100, keep_every=0, evaluate_every=100)
    return m3jax.config.validate(config)


def _set_2b(config: ConfigDict) -> None:
    config.model.update(layers=44, query_heads=40, head_dim=80, hidden=3200, mlp_width=3200)
    config.memory.layers = 22
    config.text.shards = 1024
    config.optimizer.update(learning_rate=4e-4, lr_warmup_steps=2000)
    config.train.update(checkpoint_every=1000, evaluate_every=1000)
    config.train.keep_every = 10_000  # the guard may have to go back further
    config.train.steps = 953_674  # 4T tokens
    # Eight shards: no gradient of a layer is padded when it is scattered (launch/compile.py).
    config.mesh.data = 32
    if config.stage == "continual":
        config.train.microbatches = 2 if config.memory.source == "online" else 1
        config.optimizer.update(learning_rate=1e-4, lr_warmup_steps=500)
        config.train.steps = 28_610  # 120B tokens


def _set_0p9b(config: ConfigDict) -> None:
    config.model.update(layers=40, query_heads=32, head_dim=64, hidden=2048, mlp_width=2048)
    config.memory.layers = 20
    config.text.shards = 256
    config.optimizer.update(learning_rate=6e-4, lr_warmup_steps=1000)
    config.train.update(checkpoint_every=500, keep_every=2000, evaluate_every=500)
    config.train.steps = 12_000  # 50B tokens
    config.mesh.data = 8
    if config.stage == "continual":
        config.optimizer.update(learning_rate=2e-4, lr_warmup_steps=100)
        config.train.steps = 2400  # 10B tokens
