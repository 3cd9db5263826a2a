"""Numbers of a config: each override is refused by name, or a training step with it is finite.

`M3JAX_SEEDS=5000 pytest tests/test_numbers.py -m slow` draws more overrides than the 1 000.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from train.tiny import SyntheticPipeline, tiny_config

from m3jax.config import flatten, validate
from m3jax.config.fields import FIELDS
from m3jax.errors import ConfigError
from m3jax.mesh import host_rows, make_mesh
from m3jax.train.loss import place_batch
from m3jax.train.state import Program
from m3jax.train.step import make_step

SEEDS = int(os.environ.get("M3JAX_SEEDS", "1000"))
NUMBERS = [path for path, (_, _, accepted) in FIELDS.items() if isinstance(accepted, str)]
SOURCES = ("none", "precomputed", "online")
# Sections that a step reads, and the most of a size with which a test has the memory to run one.
READ, LARGEST = ("", "model", "memory", "optimizer", "train", "data"), 64
TOGETHER = 24  # overrides of a step; after a step that is not finite each has one of its own
# Fields that are read with others only.
NEEDS: Mapping[str, Mapping[str, Any]] = {
    "model.previous_token_head": {"model.attention_bias": True},
    "model.rope_factor": {"model.rope_scaling": "linear"},
    "model.rope_low_rotations": {"model.rope_scaling": "llama3", "model.rope_factor": 2.0},
    "model.rope_high_rotations": {"model.rope_scaling": "yarn", "model.rope_factor": 2.0},
    "model.rope_magnitude": {"model.rope_scaling": "yarn", "model.rope_factor": 2.0},
    "optimizer.muon_learning_rate": {"optimizer.name": "muon"},
    "optimizer.min_lr_ratio": {"optimizer.schedule": "cosine"},
    "memory.key_scale": {"memory.each": 1, "memory.selection": "reconstruction"},
}


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    config = config.copy_and_resolve_references()
    for path, value in values.items():
        section, _, field = path.rpartition(".")
        (config[section] if section else config)[field] = value
    return config


tiny = functools.cache(tiny_config)


def override(seed: int) -> tuple[str, Any]:
    """A field, and a value at an end of its interval, beside it, or of another size entirely."""
    rng = np.random.default_rng([seed])
    path = NUMBERS[rng.integers(len(NUMBERS))]
    initial, _, interval = FIELDS[path]
    low, high = map(float, interval[1:-1].split(","))
    if isinstance(initial, int):
        ends = [
            int(low),
            int(low) - 1,
            int(low) + 1,
            *(int(high) - i for i in (0, 1) if high < 1e9),
        ]
        return path, [*ends, 2, 3, 5, 8, 16, 64, 2**31 - 1, 2**31, 2**40, 2**63, 2**64][
            rng.integers(len(ends) + 11)
        ]
    values = [low, high, np.nextafter(low, np.inf), np.nextafter(high, -np.inf), 0.0, 1.0, -1.0]
    values += [1 - 1e-9, 1e-46, 1e-40, 2e-38, 1e-20, 1e20, 3e38, 1e39, 1e300, np.nan, np.inf]
    values += [1e-3, 10 ** rng.uniform(-12, 12)]
    return path, float(values[rng.integers(len(values))])


def accepted(values: Mapping[str, Any], source: str) -> ConfigDict | None:
    """The config with `values`, or None if it is refused; the refusal must name a field."""
    config = with_values(tiny(source), values)
    try:
        return validate(config)
    except ConfigError as error:
        named = [path for path in FIELDS if f"config.{path}" in str(error)]
        assert named and "\n" not in str(error) and len(str(error)) < 400, str(error)
    return None


def is_finite(config: ConfigDict) -> bool:
    """Runs one step; whether its metrics and the state after it are finite."""
    mesh = make_mesh(config)
    program, rows = Program(config, mesh), host_rows(mesh, config.data.batch_size)
    batch = place_batch(mesh, SyntheticPipeline(config).batch(0), rows)
    state, metrics = make_step(program)(program.init(), batch)
    leaves = map(np.asarray, jax.tree.leaves(jax.device_get((state, metrics))))
    return all(np.isfinite(x.astype(np.float64)).all() for x in leaves)


def steps(seeds: range) -> Iterator[dict[str, Any]]:
    """Accepted overrides of what a step reads, `TOGETHER` at a time, none twice for a field."""
    waiting: dict[str, Any] = {}
    source = SOURCES[seeds.start % 3]
    for seed in seeds:
        path, value = override(seed)
        size = isinstance(value, int) and value > LARGEST and path != "seed"
        section = path.rpartition(".")[0]
        if section not in READ or size or path in waiting:
            continue
        added = {**waiting, **NEEDS.get(path, {}), path: value}
        if accepted({path: value}, source) and accepted(added, source):
            waiting = added
            if len(waiting) >= TOGETHER:
                yield waiting
                waiting = {}
    yield waiting


def check_steps(seeds: range) -> None:
    source = SOURCES[seeds.start % 3]
    for values in steps(seeds):
        if not is_finite(with_values(tiny(source), values)):
            for path, value in values.items():
                alone = with_values(tiny(source), {**NEEDS.get(path, {}), path: value})
                assert is_finite(alone), f"config.{path} = {value!r} with {source}"


def test_every_override_is_valid_or_refused_by_name() -> None:
    seen = set()
    for seed in range(SEEDS):
        path, value = override(seed)
        config = accepted({**NEEDS.get(path, {}), path: value}, SOURCES[seed % 3])
        seen.add((type(FIELDS[path][0]), config is None))
        if config is not None and isinstance(FIELDS[path][0], float):
            used = np.float32(flatten(config)[path])
            assert np.isfinite(used) and (used != 0) == (value != 0), (path, value)
        if config is not None and isinstance(value, int) and path != "seed":
            assert value < 2**31 or path.endswith("bytes"), (path, value)
    assert len(seen) == 4  # floats and integers, refused and accepted


@pytest.mark.slow
@pytest.mark.parametrize("part", range(6))
def test_steps_with_accepted_overrides_are_finite(part: int) -> None:
    check_steps(range(part, SEEDS, 6))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizer.epsilon", 1e-50),
        ("model.norm_epsilon", 1e-40),
        ("optimizer.beta2", 1 - 1e-12),
        ("memory.dropout", 1 - 1e-12),
        ("optimizer.learning_rate", 1e300),
        ("model.rope_base", 1e-30),
        ("model.hidden", 2**31),
        ("train.steps", 2**40),
        ("data.batch_size", 2**28),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_their_name(path: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"config.{path} = "):
        validate(with_values(tiny(), {path: value}))
