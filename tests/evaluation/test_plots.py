"""Pictures are written, whatever modes there are."""

from pathlib import Path

from m3jax.evaluation.plots import speed_bars


def test_speeds_become_a_picture(tmp_path: Path) -> None:
    speeds = {"none": 24.7, "explicit": 26.5, "rag": 19.4, "hf": 24.0}
    path = tmp_path / "speed.png"
    speed_bars(path, speeds, {"none": 2.0, "explicit": 2.0, "rag": 10.0}, "128 in, 128 out")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    before = path.read_bytes()
    speed_bars(path, {"rag": 19.4}, {}, "128 in, 128 out")
    assert path.read_bytes() != before
