"""Configuration fields of training: optimizer, steps, stability guard, validation, devices."""

from __future__ import annotations

from typing import Any

DTYPES = ("float32", "bfloat16")

# One entry per field: (default, meaning and unit, accepted values or None).
# Accepted values are a tuple of choices, or a (low, high) pair written as a string interval.
Fields = dict[str, tuple[Any, str, Any]]

OPTIMIZER: Fields = {
    "name": ("adamw", "update rule; muon for matrices and adamw for the rest", ("adamw", "muon")),
    "learning_rate": (1e-3, "peak learning rate", "(0, 1000]"),
    "muon_learning_rate": (0.01, "peak learning rate of Muon's matrices", "(0, 1000]"),
    "schedule": (
        "wsd",
        "learning rate: linear warmup, constant, fast decay (warmup-stable-decay), or cosine",
        ("wsd", "cosine"),
    ),
    "lr_warmup_steps": (100, "steps of the linear learning-rate warmup", "[0, inf)"),
    "lr_warmup_share": (
        0.0,
        "learning-rate warmup as a share of all steps, with train.epochs; 0 = lr_warmup_steps",
        "[0, 1]",
    ),
    "lr_decay_share": (0.1, "share of all steps in which wsd decays", "[0, 1]"),
    "min_lr_ratio": (0.0, "last learning rate over the peak", "[0, 1]"),
    "beta1": (0.9, "decay of the first moment", "[0, 1)"),
    "beta2": (0.95, "decay of the second moment", "[0, 1)"),
    "epsilon": (1e-8, "Adam's epsilon", "(0, 1)"),
    "weight_decay": (0.1, "decoupled weight decay; none for norms and biases", "[0, 1000]"),
    "clip_norm": (1.0, "global gradient norm to which larger ones are scaled down", "(0, inf)"),
}
TRAIN: Fields = {
    "steps": (1000, "optimizer steps of the stage", "[1, inf)"),
    "epochs": (0.0, "passes over the rows, which give the steps; 0 = train.steps", "[0, inf)"),
    "microbatches": (1, "parts of a batch whose gradients are added up", "[1, inf)"),
    "reduce_dtype": (
        "float32",
        "dtype in which devices add up gradients: bfloat16 halves their traffic, but sums of"
        " many devices lose low bits (8 bits of mantissa)",
        DTYPES,
    ),
    "loss_block": (256, "tokens of a row whose logits exist at a time", "[1, inf)"),
    "z_loss": (
        0.0,
        "factor of the squared log of the softmax normaliser in the minimised loss (PaLM, arXiv"
        " 2204.02311, §5: 1e-4), so that logits do not drift; the reported loss is without it",
        "[0, 1000]",
    ),
    "log_every": (10, "steps between two lines of metrics", "[1, inf)"),
    "checkpoint_every": (500, "steps between two checkpoints", "[1, inf)"),
    "keep_last": (2, "newest checkpoints kept", "[1, inf)"),
    "keep_every": (
        0,
        "checkpoints at multiples of this step are kept forever; 0 = none",
        "[0, inf)",
    ),
    "refresh_every": (
        0,
        "steps between rewrites of the bank's memories with the run's own weights, each a"
        " version of the knowledge; 0 = never",
        "[0, inf)",
    ),
    "evaluate_every": (500, "steps between two evaluations; 0 = never", "[0, inf)"),
}
GUARD: Fields = {
    "on": (
        False,
        "stability guard: a run whose loss is not finite, spikes or rises goes back to an earlier"
        " checkpoint, lowers the learning rate, leaves out the batches around it and goes on"
        " (docs/stability.md)",
        None,
    ),
    "window": (
        128,
        "last steps whose median and median absolute deviation (MAD) define normal",
        "[16, 100000]",
    ),
    "loss_deviations": (
        6.0,
        "deviations (1.4826 · MAD) above the median loss from which a step is bad",
        "(0, inf)",
    ),
    "norm_deviations": (
        8.0,
        "the same of the log gradient norm, where the loss is above its median, too",
        "(0, inf)",
    ),
    "least_deviation": (0.02, "least size of a deviation; nats of loss or log norm", "(0, inf)"),
    "patience": (3, "bad steps, among twice as many in a row, that make a spike", "[1, 10000]"),
    "rise_deviations": (
        5.0,
        "slow divergence: deviations of the median loss of the window's last quarter above its"
        " lowest value of the run",
        "(0, inf)",
    ),
    "factor": (0.5, "factor on the learning rate, each time the run goes back", "(0, 1]"),
    "skip_before": (2, "batches left out before the first bad step", "[0, inf)"),
    "skip_after": (8, "batches left out after the last bad step", "[0, inf)"),
    "tries": (8, "times that a run goes back before it ends with an error", "[0, 1000]"),
}
EVALUATION: Fields = {
    "batches": (8, "validation batches of an evaluation", "[1, inf)"),
    "batch_size": (16, "rows of a batch; `wrong` memories are those of another row", "[2, inf)"),
    "shift": (1, "retrieval shift of reported losses", (0, 1)),
}
MESH: Fields = {
    "slice": (1, "slices of a multi-slice run; replicas over the slow network", "[1, inf)"),
    "data": (1, "data-parallel replicas in a slice", "[1, inf)"),
    "fsdp": (-1, "devices over which parameters are sharded; -1 = all that are left", "[-1, inf)"),
    "tensor": (1, "devices over which heads and MLP width are split", "[1, inf)"),
}
