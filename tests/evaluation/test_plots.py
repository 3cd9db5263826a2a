"""Pictures are written, whatever modes there are."""

from pathlib import Path

import numpy as np

from m3jax.evaluation.plots import Read, attention_map, head_map, speed_bars, sweep_dots


def test_speeds_become_a_picture(tmp_path: Path) -> None:
    speeds = {"none": 24.7, "explicit": 26.5, "rag": 19.4, "hf": 24.0}
    path = tmp_path / "speed.png"
    speed_bars(path, speeds, {"none": 2.0, "explicit": 2.0, "rag": 10.0}, "128 in, 128 out")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    before = path.read_bytes()
    speed_bars(path, {"rag": 19.4}, {}, "128 in, 128 out")
    assert path.read_bytes() != before


def test_heads_become_a_map(tmp_path: Path) -> None:
    """Few with their figures, many without; frames and marks change the picture."""
    path, random = tmp_path / "heads.png", np.random.default_rng(0)
    pictures = []
    for shape, chosen, layers in (
        ((4, 4), [], ()),
        ((4, 4), [(1, 2)], ()),
        ((4, 4), [(1, 2)], range(2)),
        ((44, 40), [(3, 39)], range(22)),
    ):
        increase = random.normal(size=shape) * 1e-3
        head_map(path, increase, "One head at a time", chosen=chosen, layers=layers)
        pictures.append(path.read_bytes())
        assert pictures[-1].startswith(b"\x89PNG") and len(pictures[-1]) > 10_000
        random = np.random.default_rng(0)
    assert len(set(pictures)) == 4


def test_text_of_data_is_no_formula(tmp_path: Path) -> None:
    """Two dollars would begin a formula that cannot be set; warnings of missing letters fail."""
    evil, mass = "$x^^$ {\x1b\n", np.ones(2)
    read = Read(evil, evil, f"{evil}!", [[evil, "\x07"]], [mass], [np.array([1.0, 0.0])])
    attention_map(tmp_path / "attention.png", [read], "which token")
    sweep_dots(tmp_path / "sweep.png", [(evil, evil, [0.5], [0.1])], "share")
    for name in ("attention", "sweep"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
