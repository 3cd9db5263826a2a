"""Uses of private APIs of libraries, and of the texts of their error messages.

A new version of a library may change them without notice: each function has a test in
`tests/test_private_apis.py`. Libraries are imported inside the functions.
"""

from __future__ import annotations

import functools
import glob
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


@functools.cache
def computable_mask() -> Any:
    """Returns the base class of masks that the splash kernel computes; made of (shape, function).

    A subclass sets `q_sequence` `(rows,)`, the codes of the queries that `function(code, key)`
    takes.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    return splash_attention_mask._ComputableMask


def with_query_codes(kernel: Any, codes: Any) -> Any:
    """Returns a splash kernel with computable masks whose codes of queries `(rows,)` are replaced
    by `codes`."""
    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    coded = [info._replace(q_sequence=codes) for info in infos]
    return type(kernel)(*coded, **kernel.kwargs)


def coordination_client() -> Any:
    """Returns JAX's client of the distributed coordination service; None if it is not running."""
    from jax._src import distributed

    return distributed.global_state.client


def detect_cluster(timeout: int) -> tuple[str | None, int | None, int | None, Any]:
    """Detects the cluster that runs this process (TPU pod, Slurm, …), as JAX does.

    Returns the coordinator's address, the number of processes, the index of this process and the
    ids of its devices, each None if it is not detected. `timeout` is in seconds.

    Raises:
      RuntimeError, OSError, ValueError, KeyError: a cluster was detected, but does not give them.
    """
    from jax._src import clusters

    return clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, timeout
    )


def delete_checkpoints_by(manager: Any, delete: Callable[[int], None]) -> None:
    """Makes an Orbax `CheckpointManager` delete a step by `delete(step)`, in all processes.

    Its own deletion of a step in a bucket removes objects in any order: a kill may leave one that
    looks whole.
    """
    assert callable(manager._checkpoint_deleter.delete)
    manager._checkpoint_deleter.delete = delete


def use_literal_checkpoint_paths() -> None:
    """Makes Orbax take the names of folders as they are, not as globs.

    It lists the files of a checkpoint with globs in which the checkpoint's own path is a part of
    the pattern, so that in a folder called `run[1]` it saves no arrays, without a word.
    """
    from etils.epath import gpath

    original = gpath.PosixGPath.glob

    def literal(self: Any, pattern: str) -> Any:
        path = str(self)
        return original(type(self)(glob.escape(path) if "://" not in path else path), pattern)

    if original.__module__ != __name__:
        gpath.PosixGPath.glob = literal


def limit_checkpoint_retries(retries: Mapping[str, Any]) -> None:
    """Makes Orbax give up on a bucket after these `gcs_request_retries` of TensorStore.

    Its default takes a quarter of an hour, and it has no option for it.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils

    tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT["gcs_request_retries"] = dict(retries)


@functools.cache
def quiet_failed_checkpoints() -> None:
    """Drops what Orbax, asyncio and TensorStore print of every array of a save or restore that
    fails.

    The failure itself is raised where the save or restore is waited for.
    """
    from absl import logging as absl_logging

    def of_others(record: logging.LogRecord) -> bool:
        return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)

    def unraisable(given: Any) -> None:
        if str(given.exc_value) != "Event loop is closed":
            before(given)

    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook
    sys.unraisablehook = unraisable
    absl_logging.get_absl_logger().addFilter(of_others)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def is_missing(error: Exception) -> bool:
    """Returns whether an error of TensorStore says that a file is missing."""
    return "NOT_FOUND" in str(error)


def is_damaged(error: Exception) -> bool:
    """Returns whether an error of TensorStore says that a checksum differs."""
    return "igest" in str(error)


def is_disk_full(error: Exception) -> bool:
    """Returns whether an error of TensorStore says that the disk is full."""
    return "No space left" in str(error) or "quota exceeded" in str(error)


def reason_of(error: Exception) -> str:
    """Returns the text of an error of TensorStore without the location in TensorStore's source."""
    return str(error).partition(" [")[0]


def needed_bytes(message: str) -> float | None:
    """Returns the largest size in bytes that an out-of-memory error of the compiler mentions.

    Returns NaN if it mentions no size, and None if the message is of another error.
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = re.findall(r"([\d.]+)([KMGT])i?B?\b", message)
    return max((float(size) * units[unit] for size, unit in sizes), default=float("nan"))
