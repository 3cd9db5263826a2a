"""The train step compiled for a TPU slice that is not there: what it holds and exchanges."""

import json
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[2]
CONFIG = "configs/memory3.py"
# Four layers of the real widths on 16 chips, half of them memory layers.
SMALL = ("model.layers=4", "memory.layers=2", "model.vocabulary=4096", "text.vocabulary=4096")
MESH = ("data.batch_size=32", "mesh.data=2", "mesh.fsdp=8")

# A fifth of the time; partitions, collectives and their order of size are what they are without it.
LITTLE_EFFORT = {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1", "JAX_MEMORY_FITTING_EFFORT": "-1"}


def compile_for(tmp_path, options, topology, *changes, program="train"):
    """Exit code, report and output of launch/compile.py."""
    path = tmp_path / "report.json"
    command = [
        "python",
        str(ROOT / "launch" / "compile.py"),
        f"--config={ROOT / CONFIG}{options}",
        f"--topology={topology}",
        f"--program={program}",
        f"--json={path}",
        *(f"--config.{change}" for change in changes),
    ]
    environment = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", **LITTLE_EFFORT}
    done = processes.call(command, env=environment)
    return done, json.loads(path.read_text()) if path.exists() else None


@pytest.mark.slow
@pytest.mark.parity
def test_layers_exchange_parts_of_weights_only(tmp_path, require):
    """Gradients leave in reduce-scatters; no whole weight is all-reduced, nothing is permuted."""
    require("libtpu")
    done, found = compile_for(tmp_path, ":stage=continual", "v5e:4x4", *SMALL, *MESH)
    assert done.returncode == 0, done.stderr[-3000:]
    assert found["fits"] and found["chips"] == 16
    assert 1e9 < found["peak_bytes_per_chip"] < 16e9
    assert found["peak_bytes_per_chip"] >= found["memory"]["arguments"]
    layers = [one for one in found["exchanges"] if one["depth"]]
    whole = 3200 * 3200 * 4
    assert {one["kind"] for one in layers} == {"all-gather", "reduce-scatter", "all-reduce"}
    scattered = [one for one in layers if one["kind"] == "reduce-scatter"]
    assert {one["dtype"] for one in scattered} == {"f32"}  # config.train.reduce_dtype
    # Seven matrices of each layer, of which two are (3200, 8 · 80) and five (3200, 3200).
    assert sum(one["operand_bytes"] * one["times"] for one in scattered) >= 4 * 5.4 * whole
    for one in layers:
        if one["kind"] == "all-reduce":  # over `data`: eighths of weights, combined, and norms
            assert one["group"] == 2 or one["operand_bytes"] < 1e6
            assert one["operand_bytes"] <= 7 * whole / 8
    # What the tables' gradients exchange beside their scatters is small.
    sent = sum(row["bytes"] for row in found["collectives"].values())
    assert found["collectives"].get("collective-permute", {"bytes": 0})["bytes"] < 0.01 * sent
    assert 1.2 < found["flops"]["executed_over_useful"] < 1.45
    assert "fits" in done.stdout and "reduce-scatter" in done.stdout


@pytest.mark.slow
@pytest.mark.parity
def test_what_does_not_fit_says_what_to_change(tmp_path, require):
    require("libtpu")
    changes = (*SMALL, "data.batch_size=512", "mesh.data=2", "mesh.fsdp=8", "model.remat=none")
    done, found = compile_for(tmp_path, "", "v5e:4x4", *changes)
    assert done.returncode == 1
    assert not found["fits"] and found["peak_bytes_per_chip"] > 16e9
    for word in ("train.microbatches (now 1)", "mesh.fsdp (now 8)", "model.remat = 'full'"):
        assert word in done.stderr


@pytest.mark.slow
@pytest.mark.parity
def test_the_writer_compiles(tmp_path, require):
    require("libtpu")
    changes = (*SMALL, *MESH, "writer.batch_references=256")
    done, found = compile_for(tmp_path, "", "v5e:4x4", *changes, program="writer")
    assert done.returncode == 0, done.stderr[-3000:]
    assert found["program"] == "writer"
    assert set(found["collectives"]) == {"all-gather"}  # weights; memories stay where they are
    # The writer also computes the whole squares of its short references.
    assert 1.0 < found["flops"]["executed_over_useful"] < 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "message"), [("v5e", "chips: v4, v5e, v5p, v6e"), ("v5e:4x4x4", "as in v5e:4x4")]
)
def test_names_that_are_no_slice(tmp_path, topology, message):
    done, found = compile_for(tmp_path, "", topology)
    assert done.returncode == 2 and found is None
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("mesh.data=3",), "does not divide the 16"),
        (("mesh.data=1", "mesh.tensor=16", "mesh.fsdp=1"), "model.kv_heads = 8"),
        (("data.batch_size=40", "mesh.data=2"), "use a multiple of 16 rows"),
    ],
)
def test_meshes_that_cannot_work(tmp_path, changes, message, require):
    require("libtpu")
    done, found = compile_for(tmp_path, "", "v5e:4x4", *changes)
    assert done.returncode == 2 and found is None
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parity
def test_decode_exchanges_no_weights(tmp_path, require):
    """On a mesh of key-value heads: sums of two outputs a layer, and the logits of a token."""
    require("libtpu")
    shape = (*SMALL, "mesh.tensor=8")
    done, found = compile_for(tmp_path, ":stage=continual", "v5e:2x4", *shape, program="decode")
    assert done.returncode == 0, done.stderr[-3000:]
    assert found["fits"] and found["mesh"]["tensor"] == 8 and found["mesh"]["fsdp"] == 1
    assert set(found["collectives"]) == {"all-reduce", "all-gather"}
    rows, D, V = 32, 3200, 4096
    for one in found["exchanges"]:
        assert one["operand_bytes"] <= max(rows * D * 4, rows * V * 4)
    assert found["flops"]["executed_over_useful"] == pytest.approx(1, rel=0.02)
