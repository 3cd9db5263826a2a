"""A tiny guarded run whose data go bad; as a script, the process that the kill tests start."""

import sys
import time

import numpy as np
from train.tiny import FINGERPRINT, SyntheticPipeline, digest_of, evaluate, saved_state, tiny_config

GUARD = {
    "guard__on": True,
    "guard__window": 16,
    "guard__patience": 2,
    "guard__loss_deviations": 4.0,
    "guard__skip_before": 1,
    "guard__skip_after": 1,
}


def guarded_config(source="none", **changes):
    """Checkpoints at 5, 10, …, the last three kept; 40 steps."""
    settings = {
        "train__steps": 40,
        "train__log_every": 1,
        "train__keep_last": 3,
        "train__evaluate_every": 10,
        "optimizer__learning_rate": 3e-3,
        **GUARD,
        **changes,
    }
    return tiny_config(source, **settings)


class Spoiled(SyntheticPipeline):
    """Batches of which some are bad, by number: `nan` weights, or `noise` for targets."""

    def __init__(self, config, bad, before=lambda step: None):
        super().__init__(config, before)
        self.bad, self.given = dict(bad), []

    def batch(self, step):
        batch, kind = super().batch(step), self.bad.get(step)
        batch = batch._replace(weights=np.ones_like(batch.weights))
        if kind == "nan":
            batch = batch._replace(weights=np.full_like(batch.weights, np.nan))
        if kind == "noise":  # tokens that are never right otherwise
            shape = batch.targets.shape
            targets = np.random.default_rng(step).integers(100, 264, shape, dtype=np.int32)
            batch = batch._replace(targets=targets)
        return batch

    def batches(self, first_step, rows):
        for step, batch in enumerate(super().batches(first_step, rows), first_step):
            self.given.append(step)
            yield batch


BAD = {13: "nan", **dict.fromkeys(range(29, 32), "noise")}  # a NaN, and later a spike


def guarded_run(config, workdir, bad, before=lambda step: None, **options):
    """Trains, and returns what `train` returns and the numbers of the batches it has read."""
    from m3jax.train.loop import train
    from m3jax.train.run import StageData

    pipeline = Spoiled(config, bad, before)
    data = StageData(pipeline, options.pop("evaluate", evaluate), options.pop("writer", None))
    summary = train(config, workdir, data, tokenizer_fingerprint=FINGERPRINT, **options)
    return summary, pipeline.given


def main(workdir, pause):
    config = guarded_config("online")
    guarded_run(config, workdir, BAD, before=lambda step: time.sleep(pause))
    print(digest_of(saved_state(config, workdir)))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
