"""The quickstart: facts about invented people, two stages, minutes on a laptop CPU.

    bash launch/quickstart.sh

runs every step through the same code paths as a real run, with this config
(`configs/quickstart.py:stage=warmup`, then `stage=continual`). `stage=scratch` trains with (online)
memories from the start, for `launch/quickstart.py --compare_from_scratch` (Memory³ §6.1).
`stage=sft` and `stage=dpo` make the result a chat model: `launch/quickstart.py chat`.
"""

import m3jax.config

OPTIONS = {"stage": ("warmup", "continual", "scratch", "sft", "dpo")}

# The invented world (m3jax/quickstart/people.py). The more names training people have, the better
# names of strangers are told apart: with half as many, one seed of three answered 0.92, not 0.98.
WORLD = {"names": 512, "people": 4000, "unseen": 144, "values": 16, "facts": 2}


def get_config(options: str = "") -> m3jax.config.ConfigDict:
    """Builds the config of `--config=configs/quickstart.py:OPTIONS`."""
    chosen = m3jax.config.parse_options(options, **OPTIONS)
    config = m3jax.config.default()
    config.name = "quickstart"
    config.stage = chosen["stage"]

    # Heads are wider than hidden / heads: telling names apart takes width.
    config.model.update(layers=4, query_heads=4, kv_heads=4, head_dim=64, hidden=128, mlp_width=256)
    config.model.update(vocabulary=1152, tied_embeddings=True, embedding_scale=6.0)
    config.model.update(rope_base=1000.0, attention_bias=True, previous_token_head=4.0)
    config.model.update(attention="naive", prefix="always")
    # A reference has 9 tokens: the rest is a gap between it and the context (RoPE).
    config.memory.update(layers=2, reference_length=32, kept_tokens=8, chunk_length=10)
    config.memory.dtype = "float32"
    config.text.update(vocabulary=1152, shards=1, validation_share=0.01)
    # The answer's own reference is what is asked for: no overlap is too large.
    config.retrieval.update(ids="stored", overlap_evaluation=1.0)
    config.data.update(sequence_length=60, packing="document", batch_size=16, threads=2)
    config.optimizer.update(learning_rate=3e-3, lr_warmup_steps=50, lr_decay_share=0.4)
    config.optimizer.update(beta2=0.98, weight_decay=0.0)
    config.train.update(steps=1600, checkpoint_every=400, evaluate_every=400)
    if config.stage != "warmup":
        config.memory.update(source="precomputed", dropout=0.15)
        config.optimizer.update(learning_rate=1.5e-3, lr_decay_share=0.8)
        config.train.update(steps=800, checkpoint_every=200, evaluate_every=200)
    if config.stage in ("sft", "dpo"):
        m3jax.config.use_alignment_settings(config)
        config.chat.update(user="\nQ", assistant="\nA", system="\nS")
        config.data.batch_size = 16
        config.text.validation_share = 0.05
        # A model of 0.6M parameters moves little at the paper's rates.
        rate, dropout = (5e-4, 0.15) if config.stage == "sft" else (5e-5, 0.0)
        config.optimizer.update(learning_rate=rate, weight_decay=0.0)
        config.memory.dropout = dropout
        config.train.update(epochs=1.0, checkpoint_every=100, evaluate_every=100)
    if config.stage == "scratch":
        config.memory.source = "online"
        config.optimizer.update(learning_rate=3e-3, lr_decay_share=0.1)
    return m3jax.config.validate(config)
