"""One stage through each caller of `train_stage`, on four devices: the same numbers."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from data.data_workdir import make_workdir, tiny_config
from train.tiny import deterministic_lines

from m3jax import cli
from m3jax.checkpoint import read_meta
from m3jax.config import ConfigDict
from m3jax.errors import ConfigError
from m3jax.knowledge.memory_writer import MemoryWriter
from m3jax.memory.bank import Bank
from m3jax.quickstart import chat, run
from m3jax.sweep import entry
from m3jax.sweep.spec import SweepData, SweepStage
from m3jax.text.references import References
from m3jax.train.metrics import read_metrics
from m3jax.train.stage import _tell_version, train_stage

ROOT = Path(__file__).parents[2]
CONFIG_FILE = """
from train.test_stage import stage_config


def get_config(options):
    return stage_config(options.removeprefix("stage="))
"""


def stage_config(stage: str) -> ConfigDict:
    """Parameters over four devices; of `warmup` random ones, after which all stages are equal."""
    return tiny_config(
        stage=stage,
        mesh__fsdp=4,
        data__batch_size=8,
        train__steps=2,
        train__log_every=1,
        train__evaluate_every=1,
        evaluation__batches=1,
        memory__source="none" if stage == "warmup" else "precomputed",
    )


class Done(Exception):
    """Ends a caller after its stage."""


def stop(*_: Any, **__: Any) -> None:
    raise Done


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with a trained warmup that has written the bank."""
    workdir = make_workdir(tmp_path_factory.mktemp("prepared"), stage_config("continual"))
    shutil.rmtree(workdir / "bank")
    train_stage(stage_config("warmup"), workdir)
    write = MemoryWriter(stage_config("continual"), workdir)
    write(References(workdir / "references"), workdir / "bank")
    return workdir


def launch(workdir: Path, patch: pytest.MonkeyPatch) -> str:
    """launch/train.py."""
    (workdir / "config.py").write_text(CONFIG_FILE)
    spec = importlib.util.spec_from_file_location("launch_train", ROOT / "launch" / "train.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    words = [
        f"--config={workdir}/config.py:stage=continual",
        f"--workdir={workdir}",
        f"--init_from={workdir}/warmup",
    ]
    values = flags.FlagValues()
    cli.parse(script.__doc__, script.COMMANDS, ["train.py", *words], values)
    script.main(values)
    return "continual"


def quickstart(workdir: Path, patch: pytest.MonkeyPatch) -> str:
    """The second stage of the quickstart; the first is there."""
    patch.setattr(run, "prepare_people", lambda *_: None)
    patch.setattr(run, "_write", lambda *_: None)
    patch.setattr(run, "_rewrite", stop)
    with pytest.raises(Done):
        run.run(demonstration(workdir))
    return "continual"


def chat_quickstart(workdir: Path, patch: pytest.MonkeyPatch) -> str:
    """The first stage of the chat quickstart, which begins with `continual`."""
    (workdir / "warmup").rename(workdir / "continual")
    patch.setattr(chat, "prepare_chats", lambda *_: [{}])

    def only_sft(config: ConfigDict, *args: Any, **options: Any) -> Any:
        return train_stage(config, *args, **options) if config.stage == "sft" else stop()

    patch.setattr(chat, "train_stage", only_sft)
    with pytest.raises(Done):
        chat.run(demonstration(workdir), chats=1, pairs=1)
    return "sft"


def demonstration(workdir: Path) -> run.Demonstration:
    world = {"names": 12, "people": 60, "unseen": 24, "values": 4, "facts": 2}
    get_config = lambda options: stage_config(options.removeprefix("stage="))  # noqa: E731
    return run.Demonstration(get_config, workdir, world, seed=0)


def sweep(workdir: Path, patch: pytest.MonkeyPatch) -> str:
    """The second stage of an entry of a sweep."""
    data = SweepData(workdir, None, "")
    first = SweepStage(workdir, stage_config("warmup"), data, None, None)
    entry._train(SweepStage(workdir, stage_config("continual"), data, first, workdir / "bank"))
    assert (workdir / entry.FINISHED).exists()
    return "continual"


@pytest.fixture(scope="module")
def expected(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The lines of `train_stage` itself."""
    workdir = shutil.copytree(prepared, tmp_path_factory.mktemp("expected") / "run")
    config = stage_config("continual")
    summary = train_stage(config, workdir, init_from=workdir / "warmup")
    lines = deterministic_lines(config, workdir)
    assert summary.evaluation == lines[-2]["evaluation"]
    assert summary.evaluation.keys() > {"loss_memory", "loss_none", "loss_wrong"}
    assert f"loss_memory: {summary.evaluation['loss_memory']:.4f}\n" in str(summary)
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("caller", [launch, quickstart, chat_quickstart, sweep])
def test_every_caller_trains_and_evaluates_alike(
    caller: Callable[[Path, pytest.MonkeyPatch], str],
    prepared: Path,
    expected: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workdir = Path(shutil.copytree(prepared, tmp_path / "run"))
    stage = caller(workdir, monkeypatch)
    assert deterministic_lines(stage_config(stage), workdir) == expected
    assert [line["step"] for line in read_metrics(workdir / stage) if "evaluation" in line] == [
        1,
        2,
    ]
    meta = read_meta(workdir / stage / "checkpoints" / "2")
    assert meta["knowledge"] == 0
    assert meta["writer"]["hash"] == Bank.open(workdir / "bank").binding.writer


def test_a_run_that_goes_on_with_an_old_version_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stage_config("continual")
    (tmp_path / config.stage / "checkpoints" / "1").mkdir(parents=True)
    monkeypatch.setattr("m3jax.train.stage.read_current", lambda workdir: {"version": 3})
    _tell_version(config, tmp_path, 3)
    assert capsys.readouterr().out == ""
    _tell_version(config, tmp_path, 2)
    assert "goes on with version 2 of the knowledge, which it" in capsys.readouterr().out
    with config.unlocked():
        config.train.refresh_every = 1
    _tell_version(config, tmp_path, 2)  # it refreshes the bank first
    assert capsys.readouterr().out == ""


def test_a_bank_of_its_own_cannot_be_refreshed(prepared: Path) -> None:
    config = stage_config("continual")
    with config.unlocked():
        config.train.refresh_every = config.train.keep_every = config.train.checkpoint_every = 1
    with pytest.raises(ConfigError, match="refresh_every = 1 refreshes .* leave out --bank"):
        train_stage(config, prepared, bank=prepared / "bank")
