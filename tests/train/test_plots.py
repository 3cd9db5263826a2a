"""The picture of a run."""

import struct

import pytest

from m3jax.train import plots
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


def test_branches_that_were_left_are_drawn(tmp_path, monkeypatch):
    rollback = {"to": 10, "losses": [[11, 0.5], [12, 9.0], [13, None]]}
    monkeypatch.setattr(plots, "_draw_left", drawn := Drawn(plots._draw_left))
    write_stage(tmp_path / "warmup", 30, [])
    Metrics(tmp_path / "warmup", 30, rollbacks=[rollback]).close()
    write_stage(tmp_path / "continual", 20, [])
    Metrics(tmp_path / "continual", 20, rollbacks=[rollback, {**rollback, "to": 4}]).close()
    plot_stages([tmp_path / "warmup", tmp_path / "continual"], tmp_path / "loss.png")
    assert [call[1:] for call in drawn.calls] == [
        (0, rollback, "left again; the run went back to ▲"),
        (30, rollback, None),
        (30, {**rollback, "to": 4}, None),
    ]
    left, mark, *_ = drawn.lines
    assert left.get_xdata().tolist() == [11, 12] and left.get_ydata().tolist() == [0.5, 9.0]
    assert mark.get_xdata() == [10]


class Drawn:
    """Keeps the calls of a drawing function, and the lines that are new after the first."""

    def __init__(self, function):
        self.function, self.calls, self.lines = function, [], []

    def __call__(self, axes, *arguments):
        before = len(axes.lines)
        self.function(axes, *arguments)
        self.calls.append((axes, *arguments))
        self.lines += axes.lines[before:]


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no training metrics in .*absent"):
        plot_stages([tmp_path / "absent"], tmp_path / "loss.png")
