"""A small model that learns to read five memories, four of them wrong."""

import numpy as np
import pytest

from configs import quickstart
from m3jax import config as config_lib
from m3jax.checkpoint import restore_params
from m3jax.config import PREFIX_TOKENS
from m3jax.data.pipeline import open_pipeline
from m3jax.knowledge.memory_writer import MemoryWriter
from m3jax.make_model import make_model
from m3jax.quickstart import people
from m3jax.quickstart.run import prepare_people
from m3jax.text.references import References
from m3jax.train.evaluator import LossEvaluator
from m3jax.train.stage import train_stage

WORLD = {"names": 48, "people": 384, "unseen": 8, "values": 8, "facts": 2}


def config_of(stage, distractors=4, name=None):
    """The quickstart at a tenth of its size; a query reads the memories of its own chunk alone."""
    config = quickstart.get_config(f"stage={stage}")
    with config.unlocked():
        config.stage = name or stage
        config.model.update(layers=3, hidden=64, head_dim=32, query_heads=2, kv_heads=2)
        config.model.mlp_width = 128
        config.memory.update(first_layer=1, layers=1, window=1, dropout=0.0)
        config.memory.update(per_chunk=1 + distractors, distractors=distractors)
        steps = 400 if stage == "warmup" else 200
        config.train.update(steps=steps, checkpoint_every=steps, evaluate_every=0, log_every=100)
        config.data.batch_size = 8
        config.mesh.fsdp, config.text.validation_share = 1, 0.05
        config.retrieval.overlap_train = 1.0
    return config_lib.validate(config)


@pytest.mark.slow
def test_with_distractors_a_model_learns_which_of_five_memories_it_needs(tmp_path):
    config = config_of("continual")
    prepare_people(config_of("warmup"), tmp_path, people.make_world(0, **WORLD))
    train_stage(config_of("warmup"), tmp_path)
    MemoryWriter(config, tmp_path, tmp_path / "warmup")(
        References(tmp_path / "references"), tmp_path / "bank"
    )
    train_stage(config, tmp_path, init_from=tmp_path / "warmup")
    train_stage(config_of("continual", 0, "own"), tmp_path, init_from=tmp_path / "warmup")

    held_out, training = (
        open_pipeline(config, tmp_path, split="validation"),
        open_pipeline(config, tmp_path),
    )
    held_out.retriever, held_out._live = training.retriever, training._live
    evaluate = LossEvaluator(config, held_out)

    def losses(stage):
        params, _ = restore_params(tmp_path / stage, make_model(config, PREFIX_TOKENS))
        measured = []
        for distractors in (0, 4):
            held_out.distractors = distractors
            measured.append(evaluate(params)["loss_memory"])
        return np.array([*measured, evaluate(params)["loss_none"]])

    (one, five, none), own = losses("continual"), losses("own")
    print(f"with distractors: {one:.3f} {five:.3f} {none:.3f}; without: {own}")
    assert one < five < none - 0.2
    # Four wrong ones take less than a quarter of what the right one is worth, else more than half.
    assert five - one < 0.25 * (none - one)
    assert own[1] - own[0] > 0.5 * (own[2] - own[0])
