"""The picture of a run."""

import struct

import pytest

from m3jax.train.metrics import Metrics
from m3jax.train.plots import plot_stages


def write_stage(folder, steps, names):
    metrics = Metrics(folder, 0)
    for step in range(1, steps + 1):
        line = {"step": step, "tokens": step * 128, "loss": 5 / step, "learning_rate": 1e-3}
        metrics.write(line)
    metrics.write({"step": steps, "evaluation": dict.fromkeys(names, 2.0)})
    metrics.close()


def test_stages_are_drawn_into_one_png(tmp_path):
    write_stage(tmp_path / "warmup", 30, ["loss_none", "accuracy_none"])
    write_stage(tmp_path / "continual", 2, ["loss_memory", "loss_none", "loss_of_another_kind"])
    path = tmp_path / "report" / "loss.png"
    plot_stages([tmp_path / "warmup", tmp_path / "continual", tmp_path / "absent"], path)
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert width >= 1200 and height >= 700
    assert [entry.name for entry in path.parent.iterdir()] == ["loss.png"]


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no training metrics in .*absent"):
        plot_stages([tmp_path / "absent"], tmp_path / "loss.png")
