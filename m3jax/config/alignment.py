"""Settings of the paper for SFT and DPO."""

from __future__ import annotations

from ml_collections import ConfigDict


def use_alignment_settings(config: ConfigDict) -> None:
    """Sets the fields of SFT and DPO that Memory³ states, by `config.stage`, sft or dpo.

    Cosine with a linear rise over 10 %, weight decay 0.1, batches of 512 rows; SFT has a peak of
    5e-5 and 3 epochs, DPO one of 4e-6 and β = 0.01. Of DPO the paper gives no more; its batch,
    rise, decay and one epoch are ours.
    """
    sft = config.stage == "sft"
    config.data.packing = "chats" if sft else "pairs"
    config.data.batch_size = 512
    config.preference.beta = 0.01
    config.optimizer.schedule = "cosine"
    config.optimizer.learning_rate = 5e-5 if sft else 4e-6
    config.optimizer.lr_warmup_share, config.optimizer.lr_warmup_steps = 0.1, 0
    config.optimizer.weight_decay = 0.1
    config.train.epochs = 3.0 if sft else 1.0
    config.train.microbatches = 1
