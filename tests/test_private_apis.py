"""Hooks into libraries: what a new version of one must still have."""

import errno
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from absl import logging as absl_logging
from orbax.checkpoint._src.serialization import tensorstore_utils

from m3jax import private_apis
from m3jax.model.attention_mask import Packing
from m3jax.model.splash import make_kernel
from m3jax.model.splash_mask import PackedMask, RowMask, packed_codes, plan


def test_masks_are_computed_in_the_kernel() -> None:
    base = private_apis.computable_mask()
    assert issubclass(RowMask, base) and issubclass(PackedMask, base)
    mask = base((8, 8), lambda q, k: q >= k)
    assert mask.q_sequence.shape == (8,) and mask.shape == (8, 8)
    np.testing.assert_array_equal(mask[:, :], np.tri(8, dtype=bool))


def test_codes_of_a_kernel_are_replaced() -> None:
    none = {"prefix": 0, "chunks": 0, "chunk_slots": 0, "chunk_length": 64, "window": 1}
    layout = plan(128, 1, **none, block=128, kv_block=128, packed=True)
    kernel = make_kernel(layout, 1, interpret=True)
    starts = np.repeat([0, 40], [40, 88])[None].astype(np.int32)
    packing = Packing(jnp.asarray(starts), jnp.zeros_like(starts))
    codes = packed_codes(layout, packing)[0]
    coded = private_apis.with_query_codes(kernel, codes)
    assert type(coded) is type(kernel) and coded.kwargs == kernel.kwargs
    for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
        np.testing.assert_array_equal(getattr(coded, name).q_sequence, codes)


def test_checkpoints_of_a_folder_with_brackets_are_read(tmp_path: Path) -> None:
    """Orbax globs the whole path; if this passes without the function, it may go."""
    private_apis.use_literal_checkpoint_paths()
    folder, array = tmp_path / "run[1]*?" / "1", {"a": jnp.arange(3)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, array)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(folder)
    np.testing.assert_array_equal(restored["a"], array["a"])


def test_checkpoints_are_tried_again_as_often_as_we_say(monkeypatch) -> None:
    """Orbax has no option for it."""
    context = dict(tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT)
    monkeypatch.setattr(tensorstore_utils, "_DEFAULT_OCDBT_TS_CONTEXT", context)
    private_apis.limit_checkpoint_retries({"max_retries": 3})
    context = tensorstore_utils.get_ts_context(use_ocdbt=True)
    assert context["gcs_request_retries"].to_json()["max_retries"] == 3


def test_one_process_has_no_client() -> None:
    assert private_apis.coordination_client() is None


def test_no_cluster_is_detected() -> None:
    address, count, index, _ = private_apis.detect_cluster(1)
    assert (address, count, index) == (None, None, None)


def test_errors_of_tensorstore(tmp_path) -> None:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{tmp_path}/"},
        "metadata": {
            "shape": [4],
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4]}},
            "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
        },
        "fill_missing_data_reads": False,
        "recheck_cached_data": "open",
    }
    array = ts.open(spec, create=True).result()
    with pytest.raises(ValueError) as missing:
        array.read().result()
    assert private_apis.is_missing(missing.value) and not private_apis.is_damaged(missing.value)
    array.write(np.arange(4, dtype=np.uint8)).result()
    (chunk,) = (path for path in tmp_path.rglob("0") if path.is_file())
    chunk.write_bytes(b"\x07" + chunk.read_bytes()[1:])
    with pytest.raises(ValueError) as damaged:
        ts.open(spec, open=True).result().read().result()
    assert private_apis.is_damaged(damaged.value) and not private_apis.is_missing(damaged.value)
    placed = ValueError(f"{damaged.value} [source locations='a.cc:1']")
    assert private_apis.reason_of(placed) == str(damaged.value)
    full = OSError(errno.ENOSPC, "No space left on device")
    assert private_apis.is_disk_full(full) and not private_apis.is_disk_full(damaged.value)


def test_what_libraries_print_of_a_failed_save() -> None:
    from orbax.checkpoint._src.futures import future  # its threads log what they raise

    private_apis.quiet_failed_checkpoints()
    logger, failed = absl_logging.get_absl_logger(), (ValueError, ValueError("full"), None)
    for path, exception, kept in (
        (future.__file__, failed, False),
        (future.__file__, None, True),
        (__file__, failed, True),
    ):
        record = logger.makeRecord("absl", 40, path, 1, "no", (), exception)
        assert bool(logger.filter(record)) == kept
    closed = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    assert sys.unraisablehook(closed) is None  # type: ignore[arg-type]


def test_a_compiler_without_memory() -> None:
    message = "RESOURCE_EXHAUSTED: Ran out of memory. Used 17.53G of 15.75G hbm."
    assert private_apis.needed_bytes(message) == 17.53 * 2**30
    assert private_apis.needed_bytes("INTERNAL: Mosaic failed") is None
    assert np.isnan(private_apis.needed_bytes("out of memory"))
    assert hasattr(jax.errors, "JaxRuntimeError")


def test_checkpoints_are_deleted_by_what_we_say(tmp_path: Path) -> None:
    deleted: list[int] = []
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(tmp_path / "checkpoints", options=options) as manager:
        private_apis.delete_checkpoints_by(manager, deleted.append)
        for step in (1, 2):
            manager.save(step, args=ocp.args.StandardSave({"a": jnp.arange(3)}))
            manager.wait_until_finished()
    assert deleted == [1]
