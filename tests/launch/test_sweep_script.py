"""launch/sweep.py as a user calls it: shared stages, entries that fail, a kill in the middle."""

import json
import signal
from pathlib import Path
from typing import Any

import processes
import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """
from configs import quickstart


def get_config(options=""):
    config = quickstart.get_config(options)
    with config.unlocked():
        config.train.steps, config.train.checkpoint_every, config.train.evaluate_every = 4, 2, 4
        config.train.log_every, config.optimizer.lr_warmup_steps = 1, 1
        config.data.batch_size = config.evaluation.batch_size = 8
        config.text.validation_share = 0.4
        config.model.layers, config.memory.layers = 2, 1
        config.model.hidden, config.model.head_dim, config.model.mlp_width = 16, 4, 24
    return config
"""
SWEEP = """
import time

from m3jax.quickstart import sweep_data
from m3jax.sweep.spec import Entry, Sweep

WORLD = {{"names": 12, "people": 60, "unseen": 24, "values": 4, "facts": 2}}


def prepare(config, folder, knowledge):
    sweep_data.prepare(config, folder, knowledge, WORLD)


def get_sweep():
    return Sweep(
        config={config!r},
        entries=[
            Entry("base", group="both"),
            Entry("impossible", {{"memory.kept_tokens": 99}}, "both"),
            Entry("broken", knowledge="nowhere"),
            Entry("kept", {{"memory.kept_tokens": 2, "continual:train.steps": {steps}}}, "both"),
            Entry("together", {{"writer.document_context": True}}, knowledge="documents"),
        ],
        prepare=prepare,
        questions=sweep_data.QUESTIONS,
        in_context=sweep_data.IN_CONTEXT,
    )
"""


def start(folder: Path, *flags: str) -> Any:
    command = ["python", "launch/sweep.py", f"--sweep={folder}/sweep.py"]
    return processes.start([*command, f"--workdir={folder}/run", *flags], devices=1)


def call(folder: Path, *flags: str) -> tuple[int, str, str]:
    done = processes.finish(start(folder, *flags))
    return done.returncode, done.stdout, done.stderr


def write(folder: Path, steps: int = 4) -> None:
    (folder / "config.py").write_text(CONFIG)
    text = SWEEP.format(config=str(folder / "config.py"), steps=steps)
    (folder / "sweep.py").write_text(text)


def result(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "run" / "results" / f"{name}-seed-0.json").read_bytes())


def trained_steps(folder: Path, stage: str) -> dict[str, list[int]]:
    """Steps that the metrics of every folder of a stage have, and when it was begun."""
    found = {}
    for path in (folder / "run" / "stages").glob(f"{stage}-*/{stage}/metrics.jsonl"):
        whole = path.read_text().rpartition("\n")[0]  # the last line may be half written
        lines = [json.loads(line) for line in whole.splitlines()]
        found[path.parts[-3]] = [line["step"] for line in lines if "loss" in line]
    return found


@pytest.mark.slow
def test_a_sweep_is_killed_and_goes_on(tmp_path: Path) -> None:
    write(tmp_path, steps=120)
    results = tmp_path / "run" / "results"
    process = start(tmp_path)
    # Killed in the middle of `kept`, when it has a checkpoint and steps after that.
    processes.wait_until(
        lambda: any(len(s) > 20 for s in trained_steps(tmp_path, "continual").values()),
        process,
    )
    process.send_signal(signal.SIGKILL)
    shown, _ = process.communicate()
    assert "impossible@0: refused: config.memory.kept_tokens = 99" in shown.splitlines()[0]
    assert not (results / "kept-seed-0.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert set(before) == {"base-seed-0.json", "broken-seed-0.json"}
    done = trained_steps(tmp_path, "continual")

    code, shown, errors = call(tmp_path)
    assert code == 1 and not errors.strip()  # two entries have failed
    after = {path.name: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"kept-seed-0.json", "together-seed-0.json"}
    assert list(trained_steps(tmp_path, "warmup").values()) == [[1, 2, 3, 4]]  # once, for all
    continued = trained_steps(tmp_path, "continual")
    assert sorted(map(len, continued.values())) == [4, 4, 120]
    assert all(steps == continued[name][: len(steps)] for name, steps in done.items())
    log = (results / "kept-seed-0.log").read_text()
    assert "continual: continuing from step" in log and log.count("starting from step 4 of") == 1

    rows = {line.split(" | ")[0][2:]: line for line in shown.splitlines() if line[:2] == "| "}
    for name in ("base", "kept", "together"):
        figures = result(tmp_path, name)["figures"]
        assert f"{figures['right_memory']:.3f} | {figures['right_none']:.3f}" in rows[name]
        assert figures["questions"] == 48 and figures["flops"] > 0
        assert {"loss_memory", "loss_wrong", "right_in_context"} <= set(figures)
    assert rows["impossible"].endswith("| failed |") and rows["broken"].endswith("| failed |")
    assert "* broken, seed 0: TextError: knowledge = 'nowhere'" in shown
    assert result(tmp_path, "kept")["figures"]["memory_bytes"] == 2 * 1 * 4 * 2 * 4 * 4
    # The same references, each alone: the rows that both read are the same.
    base, other = (result(tmp_path, name)["figures"] for name in ("base", "together"))
    assert base["loss_none"] != 0 and base["memory_bytes"] == other["memory_bytes"]

    write(tmp_path)  # `kept` has changed: it is run again, and only it
    code, shown, _ = call(tmp_path, "--entries=base,kept")
    assert code == 0 and "[2/2] kept@0" in shown and "base@0" not in shown
    assert sorted(map(len, trained_steps(tmp_path, "continual").values())) == [4, 4, 4, 120]
    assert result(tmp_path, "kept")["figures"]["steps"] == 4


@pytest.mark.slow
def test_a_dry_run_prints_and_makes_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    code, shown, errors = call(tmp_path, "--dry_run", "--entries=base,kept", "--seeds=0")
    lines = shown.splitlines()
    assert code == 0 and not errors and not (tmp_path / "run").exists()
    own = f"launch/sweep.py --sweep={tmp_path}/sweep.py --workdir={tmp_path}/run"
    assert lines[0] == f"python {own} --entries=base,kept --seeds=0 --prepare_only"
    assert lines[-1] == f"python {own} --entries=base,kept --seeds=0"
    assert len(lines) == 7  # a warmup, two banks, two stages
    assert all(line.startswith("bash launch/tpu_vm.sh watch --run=") for line in lines[1:-1])
    unknown = call(tmp_path, "--dry_run", "--entries=nobody")
    assert unknown[0] == 2 and "no entry or seed 'nobody'" in unknown[2]
    assert "Traceback" not in unknown[2]
