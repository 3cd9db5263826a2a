"""One run of a sweep: the folders of its stages."""

import dataclasses
from pathlib import Path

import pytest
from data.data_workdir import tiny_config

from m3jax.errors import SweepError
from m3jax.sweep import entry
from m3jax.sweep.spec import Entry, Sweep, SweepData, SweepRun, SweepStage

CONFIG = tiny_config()


def test_a_link_to_another_bank_is_refused(tmp_path: Path) -> None:
    data = SweepData(tmp_path / "data", None, "")
    warmup = SweepStage(
        tmp_path / "stages" / "first", tiny_config(stage="warmup"), data, None, None
    )
    bank = tmp_path / "banks" / "new"
    stage = SweepStage(tmp_path / "stages" / "second", CONFIG, data, warmup, bank)
    run = SweepRun(Entry("a"), 0, tmp_path / "result.json", (warmup, stage))
    sweep = Sweep("config.py", [run.entry])
    for _ in range(2):  # made, and found again
        entry.prepare(sweep, run)
    link = stage.folder / "bank"
    assert link.resolve() == bank and link.readlink() == Path("../../banks/new")

    moved = tmp_path / "moved"
    moved.symlink_to(tmp_path)
    through = dataclasses.replace(stage, bank=moved / "banks" / "new")
    entry.prepare(sweep, dataclasses.replace(run, stages=(through,)))

    old = tmp_path / "banks" / "old"
    link.unlink()
    link.symlink_to("../../banks/old")
    with pytest.raises(SweepError) as refused:
        entry.prepare(sweep, run)
    for words in (f"{link} leads to {old}", f"reads {bank}", f"delete {stage.folder}"):
        assert words in str(refused.value)
    assert link.resolve() == old
