"""Damage that is read is refused by name, with a remedy that loses nothing, or changes no result.

Every file of a workdir is damaged in every way, and everything that reads a workdir reads it.
"""

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from damaged_workdir import (
    CONFIG,
    Told,
    build,
    damages,
    files,
    outcome,
    readers,
    restore,
    write,
)

from m3jax.knowledge.maintain import repair

SAMPLE = 14  # cases of the fast test


class Workdir(NamedTuple):
    folder: Path
    whole: dict[str, bytes]  # content of every file
    other: dict[str, bytes]  # of another workdir
    readers: dict[str, Any]
    expected: dict[str, Any]  # what every reader reads


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workdir]:
    inputs, folder = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("whole") / "run"
    other = tmp_path_factory.mktemp("other") / "run"
    build(other, inputs, seed=1)
    foreign = files(other)
    build(folder, inputs)
    whole, each = files(folder), readers(inputs)
    expected = {name: outcome(read, folder) for name, read in each.items()}
    assert all(isinstance(result, str) for result in expected.values()), expected
    restore(folder, whole)
    assert {name: outcome(read, folder) for name, read in each.items()} == expected
    restore(folder, whole)
    yield Workdir(folder, whole, foreign, each, expected)
    shutil.rmtree(folder)


def problems(
    workdir: Workdir, changed: dict[str, bytes | None], names: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Damages files, lets readers read, and undoes it.

    Returns what is wrong with how they take it, and the readers that do not read what they did.
    """
    wrong, noticed = [], []
    for path, data in changed.items():
        file = workdir.folder / path
        file.unlink() if data is None else file.write_bytes(data)
    for name in names:
        try:
            result = outcome(workdir.readers[name], workdir.folder)
        except Exception as error:
            result, told = None, [f"a traceback, {error!r:.300}"]
        else:
            told = ["another result without a word"]
            if not isinstance(result, str):
                told = [f"{what}: {result}" for what in faults(str(result), changed)]
        if result != workdir.expected[name]:
            noticed.append(name)
            wrong += [f"{name}: {what}" for what in told]
    restore(workdir.folder, workdir.whole)
    return wrong, noticed


def walk(workdir: Workdir, name: str) -> tuple[int, list[str]]:
    """Damages a file in every way; returns how often, and what is wrong.

    Those readers that notice if it is missing or empty read it; if none does, all read it.
    """
    ways = damages(name, workdir.whole, workdir.other, seed=0)
    wrong: list[str] = []
    reading: set[str] = set()
    for way in sorted(ways, key=lambda way: way not in ("removed", "emptied")):
        every = way in ("removed", "emptied")
        those = [n for n in workdir.readers if every or not reading or n in reading]
        bad, noticed = problems(workdir, ways[way], those)
        reading |= set(noticed) if every else set()
        wrong += [f"{name} {way}: {what}" for what in bad]
    return len(ways), wrong


def faults(message: str, changed: dict[str, bytes | None]) -> list[str]:
    """What is wrong with a message about damaged files."""
    parts = {part for path in changed for part in path.split("/") if len(part) > 3 or "." in part}
    return [
        what
        for what, bad in {
            "several lines": "\n" in message,
            "names nothing of it": not any(part in message for part in parts),
            "loses data": bool(re.search(r"\b([Dd]elete|[Rr]emove|rm)\b", message)),
        }.items()
        if bad
    ]


def cases(workdir: Workdir) -> list[tuple[str, str, dict[str, bytes | None]]]:
    """Every damage of every file: file, way, new contents."""
    return [
        (name, way, changed)
        for name in workdir.whole
        for way, changed in damages(name, workdir.whole, workdir.other, seed=0).items()
    ]


@pytest.mark.slow
def test_a_sample_of_damages(workdir: Workdir) -> None:
    every = cases(workdir)
    chosen = np.random.default_rng(4).choice(len(every), SAMPLE, replace=False)
    for name, way, changed in (every[i] for i in sorted(chosen.tolist())):
        assert problems(workdir, changed, workdir.readers)[0] == [], (name, way)


@pytest.mark.every
def test_every_damage(workdir: Workdir) -> None:
    results = [walk(workdir, name) for name in workdir.whole]
    print(f"{sum(count for count, _ in results)} damages of {len(results)} files")
    wrong = [what for _, bad in results for what in bad]
    assert not wrong, "\n".join(wrong)


@pytest.mark.every
def test_repair_does_what_messages_say(workdir: Workdir) -> None:
    """Every file of an index or bank of the current version is mended, to the same bytes."""
    mended = [
        name
        for name in workdir.whole
        if re.match(r"(versions/000001/)?(index|bank)/", name) and not name.endswith("zarr.json")
    ]
    assert len(mended) > 15
    for name in mended:
        ways = damages(name, workdir.whole, {}, seed=1, flips=1)
        for way in [way for way in ways if way.startswith(("bit", "removed"))]:
            for path, data in ways[way].items():
                file = workdir.folder / path
                file.unlink() if data is None else file.write_bytes(data)
            done = repair(CONFIG, workdir.folder, write=write)
            noticed = outcome(workdir.readers["verify"], workdir.folder)
            assert noticed == workdir.expected["verify"], (name, way, done)
            read = outcome(workdir.readers["knowledge"], workdir.folder)
            assert read == workdir.expected["knowledge"], (name, way, done)
            restore(workdir.folder, workdir.whole)


def test_faults_of_messages() -> None:
    changed: dict[str, bytes | None] = {"references/tokens.bin": None}
    assert faults("references/tokens.bin is damaged; restore it", changed) == []
    assert faults("it is damaged; delete it", changed) == ["names nothing of it", "loses data"]
    assert isinstance(Told("lost"), Exception)
