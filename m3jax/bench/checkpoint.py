"""Benchmark `checkpoint`: what saving and restoring a stage's state cost, and their checksums."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m3jax.bench.made import configured, section
from m3jax.bench.rounds import Rounds
from m3jax.checkpoint import checkpoint_folder, seal, verify
from m3jax.mesh import make_mesh
from m3jax.train.checkpoints import Checkpoints
from m3jax.train.state import Program


def checkpoint(hidden: int = 512) -> Rounds:
    """Saves, verifies and restores a state of random numbers in turn; zeros would be compressed.

    Args:
      hidden: width of the model of 8 layers; 512 makes a state of 0.46 GB.

    Yields:
      `ratios` of CPU time: `checksums_over_save`, computing the checksums over the rest of the
      save, and `verify_over_restore`, comparing them over the rest of the restore. `cpu_seconds` of
      the four; `seconds` that a save is `blocking` its caller and that it `ends` after.
    """
    model = section("model", layers=8, hidden=hidden, mlp_width=3 * hidden, vocabulary=16 * hidden)
    heads = section("model", query_heads=4, kv_heads=4, head_dim=max(hidden // 4, 8))
    config = configured(model | heads, section("train", keep_last=1))
    program = Program(config, make_mesh(config))
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: _random(random, leaf), program.init())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with tempfile.TemporaryDirectory() as name:
        checkpoints = Checkpoints(name, config, "made")
        step = 0
        while True:
            step, begin, cpu = step + 1, time.perf_counter(), time.process_time()
            checkpoints.save(state, step)
            blocking = time.perf_counter() - begin
            checkpoints.wait()
            ends, saved = time.perf_counter() - begin, time.process_time() - cpu
            folder = checkpoint_folder(name)
            checksums, verified = _cpu(seal, folder), _cpu(verify, folder)
            restored = _cpu(lambda: jax.block_until_ready(checkpoints.restore(program.abstract)))
            yield {
                "ratios": {
                    "checksums_over_save": checksums / (saved - checksums),
                    "verify_over_restore": verified / (restored - verified),
                },
                "cpu_seconds": {
                    "save": saved,
                    "checksums": checksums,
                    "restore": restored,
                    "verify": verified,
                },
                "seconds": {"blocking": blocking, "ends": ends},
                "GB": {"state": size / 1e9, "files": _size(folder) / 1e9},
            }


def _random(random: np.random.Generator, leaf: jax.Array) -> jax.Array:
    if leaf.dtype != np.float32 or not leaf.ndim:
        return leaf
    return jax.device_put(random.standard_normal(leaf.shape, np.float32), leaf.sharding)


def _cpu(function: Callable[..., Any], *arguments: Any) -> float:
    """Calls a function; returns the seconds of CPU that this process, all threads, spent."""
    begin = time.process_time()
    function(*arguments)
    return time.process_time() - begin


def _size(folder: Path) -> int:
    return int(np.sum([path.stat().st_size for path in folder.rglob("*") if path.is_file()]))
