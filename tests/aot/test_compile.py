"""Choosing among compiled programs, and their table; compiling is faked here."""

from typing import Any

import pytest
from data.data_workdir import tiny_config

from m3jax.aot import compile
from m3jax.aot.compile import best_report, on_path, search_meshes
from m3jax.aot.report import compile_table, search_text
from m3jax.errors import ConfigError


def fake_report(**changes: Any) -> dict[str, Any]:
    found = {
        "name": "tiny",
        "program": "train",
        "source": "none",
        "topology": "v5e:4x4",
        "chips": 16,
        "mesh": {"slice": 1, "data": 2, "fsdp": 8, "tensor": 1},
        "microbatches": 1,
        "remat": "full",
        "peak_bytes_per_chip": 12e9,
        "memory": {"peak": 12e9},
        "chip_bytes": 16e9,
        "fits": True,
        "collectives": {"all-gather": {"count": 4, "bytes": 2.5e9}},
        "exchanges": [],
        "flops": {"useful": 3e15, "executed": 4e15, "executed_over_useful": 4 / 3},
        "seconds": {"compute": 1.0, "memory": 0.1, "interconnect": 0.2},
        "mfu_ceiling": 0.75,
        "compile_seconds": 90.0,
    }
    return {**found, **changes}


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `search` compiles on 16 chips; full remat fits in two microbatches, no other at all."""
    found: list[Any] = []

    def fake(config: Any, topology: str) -> dict[str, Any]:
        parts, remat = config.train.microbatches, config.model.remat
        if config.mesh.fsdp == 16:
            raise ConfigError("no such mesh")
        found.append((config.mesh.data, config.mesh.fsdp, remat, parts))
        return fake_report(microbatches=parts, fits=remat == "full" and parts >= 2)

    monkeypatch.setattr(compile, "devices_of", lambda topology: [None] * 16)
    monkeypatch.setattr(compile, "compile_report", fake)
    return found


def test_search_tries_each_until_it_fits(tried: list[Any]) -> None:
    config = tiny_config(mesh__data=1)
    found = list(search_meshes(config, "v5e:4x4", (8, 16, 4), (1, 2, 4), ("dots", "full")))
    expected = [
        *((2, 8, "dots", parts) for parts in (1, 2, 4)),
        *((2, 8, "full", parts) for parts in (1, 2)),
        *((4, 4, "dots", parts) for parts in (1, 2, 4)),
        *((4, 4, "full", parts) for parts in (1, 2)),
    ]
    assert tried == expected and len(found) == len(expected)
    chosen = best_report(found)
    assert chosen is not None and chosen["fits"]


def test_search_leaves_no_chips_idle(tried: list[Any]) -> None:
    config = tiny_config(mesh__data=1)
    with pytest.raises(ConfigError, match="do not divide the 16 chips of v5e:4x4"):
        list(search_meshes(config, "v5e:4x4", (3, 32)))
    assert tried == []


def test_best_has_the_least_bounds_of_those_that_fit() -> None:
    slow = fake_report()
    fast = fake_report(remat="dots", seconds={"compute": 0.8, "memory": 0.1, "interconnect": 0.3})
    sends = fake_report(seconds={"compute": 0.8, "memory": 0.1, "interconnect": 0.5})
    large = fake_report(fits=False, seconds={"compute": 0.1, "memory": 0.1, "interconnect": 0.1})
    assert best_report([slow, fast, sends, large]) is fast
    assert best_report([large]) is None
    line = search_text([slow, fast])
    assert "--config.model.remat=dots" in line and "--config.mesh.fsdp=8" in line
    assert search_text([large]) == "none of the meshes fits"


def test_table_compares_paths_with_the_warmup_of_their_slice() -> None:
    work = {"useful": 3e15, "executed": 5e15, "executed_over_useful": 5 / 3}
    other = {"useful": 3e15, "executed": 1e15, "executed_over_useful": 1 / 3}
    reports = [
        fake_report(),
        fake_report(source="online", flops=work, fits=False, peak_bytes_per_chip=17e9),
        fake_report(topology="v6e:4x4", flops=other),
        fake_report(topology="v5p:2x2x2"),
    ]
    head, rule, *rows = (line.strip("|").split("|") for line in compile_table(reports).splitlines())
    assert {len(row) for row in (head, rule, *rows)} == {12}
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[0] for row in cells] == ["v5e:4x4", "v5e:4x4", "v6e:4x4", "v5p:2x2x2"]
    assert [row[7] for row in cells] == ["1.000", "1.250", "1.000", "1.000"]
    assert cells[1][1] == "online memories" and cells[1][5] == "17.0 of 16: does not fit"
    assert cells[0][5] == "12.0 of 16" and cells[0][8] == "2.5"


@pytest.mark.parametrize("path", ["warmup", "precomputed", "online"])
def test_paths_change_what_is_read_alone(path: str) -> None:
    config = tiny_config(memory__source="precomputed")
    changed = on_path(config, path)
    assert changed.memory.source == ("none" if path == "warmup" else path)
    assert changed.model == config.model and changed.train == config.train
    assert config.memory.source == "precomputed"
