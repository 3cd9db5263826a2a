"""One of several processes that train on a prepared workdir; the process tests start it."""

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
from data.data_workdir import tiny_config

# The fifth batch is bad; see `Recorded`.
GUARDED = {
    "guarded": {"memory__source": "none", "memory__dropout": 0.0, "guard__on": True},
}
STAGES = {
    "warmup": {"memory__source": "none", "memory__dropout": 0.0},
    "precomputed": {"memory__source": "precomputed", "mesh__data": 2, "memory__dropout": 0.25},
    "online": {"memory__source": "online"},
}


def stage_config(stage, **changes):
    """Eight devices, each step logged; `precomputed` on a mesh of 2 × 4, the others of 1 × 8.

    One layer is enough here, and compiles soonest.
    """
    return tiny_config(
        stage=stage,
        model__layers=1,
        data__batch_size=8,
        evaluation__batch_size=8,
        train__steps=9,
        train__log_every=1,
        train__checkpoint_every=3,
        train__evaluate_every=9,
        **{**STAGES, **GUARDED}[stage],
        **changes,
    )


class Recorded:
    """A pipeline that writes down a hash of every row that it hands out.

    A row of the batches with the numbers in `bad` has weights of NaN.
    """

    def __init__(self, pipeline, path, pause=0.0, bad=()):
        self.pipeline, self.path, self.pause, self.bad = pipeline, path, pause, bad

    def batches(self, first_step, rows):
        with open(self.path, "a") as file:
            for step, batch in enumerate(self.pipeline.batches(first_step, rows), first_step + 1):
                numbers = [int(row) for row in rows]
                file.write(
                    json.dumps(
                        {"step": step, "rows": dict(zip(numbers, hashes(batch), strict=True))}
                    )
                )
                file.write("\n")
                file.flush()
                time.sleep(self.pause)
                if step - 1 in self.bad and 0 in numbers:  # one process alone has it
                    weights = np.array(batch.weights)
                    weights[numbers.index(0)] = np.nan
                    batch = batch._replace(weights=weights)
                yield batch

    dequantize = None  # batches hold memories

    def report(self):
        return self.pipeline.report()


def hashes(batch):
    """One for each row: of its tokens, targets, weights and references."""
    read = (batch.reference_ids, batch.targets, batch.tokens, batch.weights)
    arrays = [array for array in read if array is not None]
    for row in range(len(batch.tokens)):
        yield hashlib.sha256(b"".join(array[row].tobytes() for array in arrays)).hexdigest()


def run_stage(config, workdir, runs, order, pause=0.0):
    """Trains `config.stage` in `runs` on the data of `workdir`."""
    from m3jax.data.pipeline import open_pipeline
    from m3jax.mesh import make_mesh
    from m3jax.train.evaluator import evaluator
    from m3jax.train.loop import train
    from m3jax.train.run import StageData

    pipeline = open_pipeline(config, workdir)
    evaluate = None
    if config.stage == "warmup":  # one stage shows that evaluations agree
        evaluate = evaluator(config, workdir, mesh=make_mesh(config))
    data = StageData(
        Recorded(pipeline, order, pause, (4,) if config.guard.on else ()),
        evaluate,
        None if pipeline.bank is None else pipeline.bank.writer,
    )
    fingerprint = pipeline.tokenizer.fingerprint
    return train(config, runs, data, tokenizer_fingerprint=fingerprint)


def main(argv):
    import jax

    from m3jax import cli
    from m3jax.distributed import joined
    from m3jax.watch import Processes

    workdir, runs, tag, address, index, stages, pause = argv[1:]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_disable_most_optimizations", True)
    configs = [stage_config(stage) for stage in stages.split(",")]
    processes = Processes(address, 2, int(index), join_timeout=600, heartbeat_timeout=20)
    with joined(processes, configs[0], cli.show_error):
        for config in configs:
            order = Path(runs) / f"{config.stage}-{tag}-{index}.jsonl"
            run_stage(config, workdir, runs, order, float(pause))
            print(f"{config.stage} finished", flush=True)


if __name__ == "__main__":
    main(sys.argv)
