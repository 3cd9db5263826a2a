"""The whole demonstration, too short to learn anything: every part is there and says what it is."""

import json

import numpy as np
import pytest
from tolerance import close

from configs import quickstart
from m3jax.memory.bank import Bank
from m3jax.quickstart import run as run_module
from m3jax.quickstart.run import LABELS, Demonstration, run
from m3jax.text.references import References

WORLD = {"names": 12, "people": 60, "unseen": 24, "values": 4, "facts": 2}


def short_config(options):
    config = quickstart.get_config(options)
    with config.unlocked():
        config.train.steps, config.train.checkpoint_every, config.train.evaluate_every = 4, 2, 2
        config.optimizer.lr_warmup_steps = 1
        config.data.batch_size = config.evaluation.batch_size = 8
        config.evaluation.batches = 1
        config.mesh.fsdp = 1
        config.text.validation_share = 0.4
        config.model.layers, config.memory.layers = 2, 1
        config.model.hidden, config.model.head_dim, config.model.mlp_width = 16, 4, 24
    return config


@pytest.mark.slow
def test_the_picture_of_attention_shows_the_slots_of_every_head(tmp_path, monkeypatch):
    """What is kept, counted by hand, and attention on nothing else."""
    drawn, counts = [], (0, 1, 3, 8)

    def config_of(options):
        config = short_config(options)
        config.memory.counts = "0:" + "+".join(map(str, counts))
        return config

    monkeypatch.setattr(run_module, "attention_map", lambda path, reads, title: drawn.extend(reads))
    run(Demonstration(config_of, tmp_path, WORLD, seed=2))
    assert len(drawn) == 4
    for read in drawn:
        for tokens, mass, kept in zip(read.references, read.mass, read.kept, strict=True):
            expected = sum(min(count, len(tokens)) for count in counts) / 4
            close(kept.sum(), expected)
            assert (mass[kept > 0] > 0).all() and not mass[kept == 0].any()
        assert sum(mass.sum() for mass in read.mass) < 1


@pytest.mark.slow
def test_the_demonstration_writes_its_report_and_edits_only_what_it_says(tmp_path):
    demonstration = Demonstration(short_config, tmp_path, WORLD, seed=2)
    summary = run(demonstration, compare_from_scratch=True)
    assert summary == json.loads((tmp_path / "report" / "summary.json").read_text())
    assert set(summary["accuracy"]) == set(LABELS)
    assert {"memory", "none", "wrong", "edited", "deleted", "distractors"} <= set(LABELS)
    assert summary["chance"] == 0.25 and summary["seed"] == 2 and summary["questions"] == 48
    assert {"continual_loss_memory", "scratch_loss_memory"} <= set(summary["from_scratch"])
    for name in ("accuracy", "attention", "loss"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report" / "README.md").read_text()
    assert all(f"{value:.3f}" in text for value in summary["accuracy"].values())
    for name in ("scratch_loss_memory", "continual_loss_memory"):
        assert f"{summary['from_scratch'][name]:.3f}" in text

    old, new = Bank.open(tmp_path / "bank"), Bank.open(tmp_path / "edited" / "bank")
    gone = References(tmp_path / "deleted" / "references")
    assert len(gone) == 60 and not any(key.startswith("unseen") for key in gone.live_keys())
    before, after = old.read(np.arange(84)).values, new.read(np.arange(84)).values
    same = (before == after).all(axis=(0, *range(2, before.ndim)))  # of each memory
    assert same[:60].all() and not same[60:].any()
    assert old.binding.writer == new.binding.writer

    again = run(demonstration)
    assert again["accuracy"] == summary["accuracy"]
