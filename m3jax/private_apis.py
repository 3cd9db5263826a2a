"""Hooks into libraries that are no public interface, and their error texts.

A new version of a library may change them without a word: each has a test in
`tests/test_private_apis.py`. Libraries are imported where they are used.
"""

from __future__ import annotations

import functools
import re
from typing import Any


@functools.cache
def computable_mask() -> Any:
    """Returns the base class of splash masks that the kernel computes: `(shape, function)`.

    A subclass sets `q_sequence` `(rows,)`, the codes of the queries that the function takes.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    return splash_attention_mask._ComputableMask


def with_query_codes(kernel: Any, codes: Any) -> Any:
    """Returns a splash kernel of computable masks with other codes of its queries `(rows,)`."""
    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    coded = [info._replace(q_sequence=codes) for info in infos]
    return type(kernel)(*coded, **kernel.kwargs)


def coordination_client() -> Any:
    """Returns JAX's client of the service that all processes share; None where there is none."""
    from jax._src import distributed

    return distributed.global_state.client


def detect_cluster(timeout: int) -> tuple[str | None, int | None, int | None, Any]:
    """Asks the cluster for address, number of processes, index of this one and its devices.

    Raises:
      RuntimeError, OSError, ValueError, KeyError: it is a cluster that gives none.
    """
    from jax._src import clusters

    return clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, timeout
    )


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
    """Returns the text of an error of TensorStore without the place in its source."""
    return str(error).partition(" [")[0]


def needed_bytes(message: str) -> float | None:
    """Returns the bytes of which the compiler's error says that a chip lacks them.

    NaN where it does not say how many; None for another error.
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = re.findall(r"([\d.]+)([KMGT])i?B?\b", message)
    return max((float(size) * units[unit] for size, unit in sizes), default=float("nan"))
