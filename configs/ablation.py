"""Variations of the other configs, one at a time (Memory³ §3.3, §5 and §7).

    python launch/train.py --config=configs/ablation.py:base=wiki_small,stage=continual,kept=4 ...
    python launch/train.py --config=configs/ablation.py:base=memory3_2b,shape=64x32x80 ...

Options; `as_base` leaves what the base config has:

    base      quickstart|wiki_small|memory3_0p9b|memory3_2b
    stage     warmup|continual
    memories  precomputed|online|stop_gradient
                                        in continual train: from the bank, or encoded in the step,
                                        with gradient or without
    distractors  2|4                    wrong memories beside the right one of a chunk, which then
                                        reads no earlier chunks' memories, as a prompt does
    layers    first|middle              memory layers begin at layer 0, or are centred
    kept      4|8|16                    tokens kept per layer and key-value head
    weight    exact|approximate         token weight of the writer
    shift     0|1                       retrieval by a chunk's own text, or the previous chunk's
    init      -0.6|-0.75                weights start with standard deviation fan_in ** this
    decay     0.2|0.4                   weight decay
    z_loss    0.0001|0.001              factor of the squared logarithm of the softmax normaliser
    qk_norm   True|False                RMSNorm of queries and keys
    shape     LxNxH                     layers, query heads and head dim of memory3_2b, at 2.1–2.4B
                                        parameters; the first half of the layers has memories

`init` and `decay` are what Memory³ §7 advises and did not try (smaller initial weights, larger
weight decay), `z_loss` and `qk_norm` what others do against loss spikes (docs/stability.md).

What to expect: of the shapes the paper found L:N near 1 to learn fastest, and head dims up to 64 to
spike more often. For the others it gives no figures. Which shapes it compared, it does not say:
these are ours.

Hardware and time: those of the base config. None of these runs has been done yet.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

import m3jax.config

AS_BASE = "as_base"

# Options that are a config field.
FIELDS = {
    "kept": ("memory", "kept_tokens"),
    "weight": ("memory", "selection"),
    "shift": ("retrieval", "shift"),
    "init": ("model", "init_exponent"),
    "decay": ("optimizer", "weight_decay"),
    "z_loss": ("train", "z_loss"),
    "qk_norm": ("model", "qk_norm"),
}

# Layers x query heads x head dim: L:N from 0.6 to 2.0, head dims of 64 to 128.
SHAPES = ("64x32x80", "64x40x64", "44x32x96", "42x24x128", "44x48x64", "30x48x80")

# File, and its option, of every base.
BASES = {
    "quickstart": ("quickstart", ""),
    "wiki_small": ("wiki_small", ""),
    "memory3_0p9b": ("memory3", ",shape=0p9b"),
    "memory3_2b": ("memory3", ",shape=2b"),
}

OPTIONS = {
    "base": tuple(BASES),
    "stage": ("warmup", "continual"),
    "memories": (AS_BASE, "precomputed", "online", "stop_gradient"),
    "distractors": (AS_BASE, 2, 4),
    "layers": (AS_BASE, "first", "middle"),
    "kept": (AS_BASE, 4, 8, 16),
    "weight": (AS_BASE, "exact", "approximate"),
    "shift": (AS_BASE, 0, 1),
    "init": (AS_BASE, -0.6, -0.75),
    "decay": (AS_BASE, 0.2, 0.4),
    "z_loss": (AS_BASE, 1e-4, 1e-3),
    "qk_norm": (AS_BASE, True, False),
    "shape": (AS_BASE, *SHAPES),
}


def get_config(options: str = "") -> ConfigDict:
    """Builds the config of `--config=configs/ablation.py:OPTIONS`."""
    chosen = m3jax.config.parse_options(options, **OPTIONS)
    config = _base(chosen["base"], chosen["stage"])
    if config.memory.source == "none":
        chosen["memories"] = chosen["distractors"] = AS_BASE  # warmup reads none
    varied = [
        f"{option}-{value}"
        for option, value in chosen.items()
        if option not in ("base", "stage") and value != AS_BASE
    ]
    config.name = "-".join([chosen["base"], *varied])
    if chosen["memories"] != AS_BASE:
        config.memory.source = chosen["memories"]
    if chosen["distractors"] != AS_BASE:
        count = chosen["distractors"]
        config.memory.update(per_chunk=1 + count, distractors=count, window=1)
    if chosen["shape"] != AS_BASE:
        _set_shape(config, chosen["base"], chosen["shape"])
    if chosen["layers"] != AS_BASE:
        spare = config.model.layers - config.memory.layers
        config.memory.first_layer = spare // 2 if chosen["layers"] == "middle" else 0
    for option, (section, field) in FIELDS.items():
        if chosen[option] != AS_BASE:
            config[section][field] = chosen[option]
    return m3jax.config.validate(config)


def _base(name: str, stage: str) -> ConfigDict:
    """Builds a config of this folder, which is no package: config files are loaded by path."""
    stem, shape = BASES[name]
    file = runpy.run_path(str(Path(__file__).with_name(f"{stem}.py")))
    return file["get_config"](f"stage={stage}{shape}")


def _set_shape(config: ConfigDict, base: str, shape: str) -> None:
    if base != "memory3_2b":
        raise m3jax.errors.ConfigError(
            f"config option 'shape={shape}' is a variant of base=memory3_2b, not of base={base};"
            " choose that base or leave shape out"
        )
    layers, heads, head_dim = (int(part) for part in shape.split("x"))
    width = heads * head_dim
    config.model.update(layers=layers, query_heads=heads, head_dim=head_dim)
    config.model.update(hidden=width, mlp_width=width)
    config.memory.layers = layers // 2
