"""A tiny run on synthetic batches; as a script, the process that the kill tests start and kill."""

import hashlib
import sys
import time
from pathlib import Path

import jax
import numpy as np
from memory_axes import layers_first

from m3jax import config as config_lib
from m3jax.data.batch import Batch
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.slots import SlotLayout

FINGERPRINT = "0123456789abcdef"
TIMES = (
    "tokens_per_second",
    "flops_per_second",
    "mfu",
    "data_wait_share",
    "seconds",
    "time",
    "goodput",
    "since_first_start",
    "started",
    "retrieval",
)


def tiny_config(source="none", **changes):
    """Two layers, D = 16; `changes` are paths with double underscores, `train__steps=3`."""
    config = config_lib.default()
    settings = {
        "memory.source": source,
        "model.layers": 2,
        "model.query_heads": 4,
        "model.kv_heads": 2,
        "model.head_dim": 8,
        "model.hidden": 16,
        "model.mlp_width": 32,
        "model.vocabulary": 264,
        "text.vocabulary": 264,
        "memory.layers": 1,
        "memory.reference_length": 6,
        "memory.kept_tokens": 2,
        "memory.chunk_length": 4,
        "memory.window": 2,
        "data.sequence_length": 16,
        "data.batch_size": 8,
        "optimizer.lr_warmup_steps": 2,
        "train.steps": 12,
        "train.log_every": 2,
        "train.checkpoint_every": 5,
        "train.evaluate_every": 4,
        "mesh.fsdp": 1,
    }
    settings |= {path.replace("__", "."): value for path, value in changes.items()}
    for path, value in settings.items():
        node = config
        *sections, field = path.split(".")
        for section in sections:
            node = node[section]
        node[field] = value
    return config_lib.validate(config)


class SyntheticPipeline:
    """Batches from (seed, step) alone; `before(step)` may kill the process or raise."""

    def __init__(self, config, before=lambda step: None):
        self.config, self.before = config, before

    def batch(self, step):
        config = self.config
        memory, model, T = config.memory, config.model, config.data.sequence_length
        B, C, M = config.data.batch_size, T // memory.chunk_length, memory.per_chunk
        rng = np.random.default_rng([config.seed, step])
        tokens = rng.integers(4, 24, (B, T + 1), dtype=np.int32)
        tokens[:, 1::2] = tokens[:, :-1:2] + 20  # every second token can be learned
        batch = Batch(
            tokens[:, :-1],
            tokens[:, 1:],
            rng.integers(0, 2, (B, T)).astype(np.float32),
            reference_ids=rng.integers(-1, 9, (B, C, M), dtype=np.int32),
        )
        if memory.source == "precomputed":
            slots = SlotLayout.of(model, memory)
            shape = (B, C, M, *slots.item_shape, model.head_dim)
            keys, values = rng.standard_normal((2, *shape), np.float32)
            length = rng.integers(0, slots.largest + 1, (B, C, M), dtype=np.int32)
            batch = batch._replace(memory=layers_first(ExplicitMemory(keys, values, length)))
        if memory.source in config_lib.IN_STEP:
            shape = (B, C, M, memory.reference_length)
            tokens = rng.integers(4, 44, shape, dtype=np.int32)
            batch = batch._replace(reference_tokens=tokens)
        return batch

    def batches(self, first_step, rows):
        for step in range(first_step, 1 << 30):
            self.before(step)
            batch = self.batch(step)
            yield jax.tree.map(lambda x, axis: np.take(x, rows, axis), batch, batch.row_axes())

    dequantize = None  # batches hold memories

    def report(self):
        return {"chunks": 1}


def evaluate(params):
    """A deterministic function of the parameters."""
    return {"loss_none": float(np.abs(np.asarray(params["embedding"], np.float64)).sum())}


def digest_of(tree):
    """Hash of all bytes of a tree of arrays."""
    import jax

    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def saved_state(config, workdir):
    """The newest checkpoint's whole state."""
    from m3jax.mesh import make_mesh
    from m3jax.train.checkpoints import Checkpoints
    from m3jax.train.state import Program

    checkpoints = Checkpoints(Path(workdir) / config.stage, config, FINGERPRINT)
    try:
        return checkpoints.restore(Program(config, make_mesh(config)).abstract)
    finally:
        checkpoints.close()


def deterministic_lines(config, workdir):
    """The metrics without what a clock has measured."""
    from m3jax.train.metrics import read_metrics

    lines = read_metrics(Path(workdir) / config.stage)
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def process_config():
    """What the script trains: long enough to be killed in many places."""
    return tiny_config(
        "online",
        train__steps=60,
        train__checkpoint_every=7,
        train__log_every=3,
        train__evaluate_every=20,
    )


def main(workdir, pause):
    from m3jax.train.loop import train
    from m3jax.train.run import StageData

    config = process_config()
    pipeline = SyntheticPipeline(config, before=lambda step: time.sleep(pause))
    train(config, workdir, StageData(pipeline, evaluate), tokenizer_fingerprint=FINGERPRINT)
    print(digest_of(saved_state(config, workdir)))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
