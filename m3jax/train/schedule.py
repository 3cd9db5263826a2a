"""Learning rate as a function of the step."""

from __future__ import annotations

import optax
from ml_collections import ConfigDict


def lr_schedule(config: ConfigDict, peak: float | None = None) -> optax.Schedule:
    """Makes the config's schedule: a linear rise, then wsd or cosine.

    Steps count from 0: step s makes the update s + 1. The rise reaches the peak at step
    `lr_warmup_steps − 1`; the fall would reach `min_lr_ratio · peak` at step `train.steps`.

    Args:
      config: a validated config.
      peak: peak learning rate; default `optimizer.learning_rate`.
    """
    optimizer, steps = config.optimizer, config.train.steps
    peak = optimizer.learning_rate if peak is None else peak
    rise, final = optimizer.lr_warmup_steps, optimizer.min_lr_ratio * peak
    pieces: list[tuple[int, optax.Schedule]] = []  # (first step, schedule)
    if rise:
        climb = optax.linear_schedule(peak / rise, peak, rise - 1) if rise > 1 else None
        pieces.append((0, climb or optax.constant_schedule(peak)))
    if optimizer.schedule == "cosine":
        length = max(1, steps - rise)
        cosine = optax.cosine_decay_schedule(peak, length, alpha=optimizer.min_lr_ratio)
        pieces.append((rise, cosine))
    else:
        fall = min(round(optimizer.lr_decay_share * steps), steps - rise)
        pieces.append((rise, optax.constant_schedule(peak)))
        if fall:
            pieces.append((steps - fall, optax.linear_schedule(peak, final, fall)))
    starts, schedules = zip(*pieces, strict=True)
    return optax.join_schedules(schedules, starts[1:])
