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
# names
# of strangers are told apart: with half as many, one seed of three answered 0.92 instead of 0.98.
WORLD = {"names": 512, "people": 4000, "unseen": 144, "values": 16, "facts": 2}


def get_config(options: str = "") -> m3jax.config.ConfigDict:
    """Builds the config of `--config=configs/quickstart.py:OPTIONS`."""
    chosen = m3jax.config.parse_options(options, **OPTIONS)
    config = m3jax.config.default()
    config.name = "quickstart"
    config.stage = chosen["stage"]

    config.model.layers = 4
    config.model.query_heads = 4
    config.model.kv_heads = 4
    config.model.head_dim = 64  # wider than hidden / heads: telling names apart takes width
    config.model.hidden = 128
    config.model.mlp_width = 256
    config.model.vocabulary = 1152
    config.model.rope_base = 1000.0
    config.model.tied_embeddings = True
    config.model.embedding_scale = 6.0
    config.model.attention_bias = True
    config.model.previous_token_head = 4.0
    config.model.attention = "naive"
    config.model.prefix = "always"

    config.memory.layers = 2
    config.memory.reference_length = 32  # a gap between the 9 tokens and the context (RoPE)
    config.memory.kept_tokens = 8
    config.memory.chunk_length = 10
    config.memory.dtype = "float32"

    config.text.vocabulary = 1152
    config.text.shards = 1
    config.text.validation_share = 0.01
    config.retrieval.ids = "stored"
    config.retrieval.overlap_evaluation = 1.0  # the answer's own reference is what is asked for

    config.data.sequence_length = 60
    config.data.packing = "document"
    config.data.batch_size = 16
    config.data.threads = 2

    config.optimizer.learning_rate = 3e-3
    config.optimizer.lr_warmup_steps = 50
    config.optimizer.lr_decay_share = 0.4
    config.optimizer.beta2 = 0.98
    config.optimizer.weight_decay = 0.0
    config.train.steps = 1600
    config.train.checkpoint_every = 400
    config.train.evaluate_every = 400
    if config.stage != "warmup":
        config.memory.source = "precomputed"
        config.memory.dropout = 0.15
        config.optimizer.learning_rate = 1.5e-3
        config.optimizer.lr_decay_share = 0.8
        config.train.steps = 800
        config.train.checkpoint_every = 200
        config.train.evaluate_every = 200
    if config.stage in ("sft", "dpo"):
        m3jax.config.use_alignment_settings(config)
        config.chat.user, config.chat.assistant, config.chat.system = "\nQ", "\nA", "\nS"
        config.data.batch_size = 16
        config.text.validation_share = 0.05
        # A model of 0.6M parameters moves little at the paper's rates.
        config.optimizer.weight_decay = 0.0
        config.optimizer.learning_rate = 5e-4 if config.stage == "sft" else 5e-5
        config.memory.dropout = 0.15 if config.stage == "sft" else 0.0
        config.train.epochs = 1.0
        config.train.checkpoint_every = config.train.evaluate_every = 100
    if config.stage == "scratch":
        config.memory.source = "online"
        config.optimizer.learning_rate = 3e-3
        config.optimizer.lr_decay_share = 0.1
    return m3jax.config.validate(config)
