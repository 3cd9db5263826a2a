"""Two processes write a bank together, also after one of them was killed: that of one process."""

import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import jax
import processes
import pytest
from memory.memory_tiny import shard_files
from memory.script_workdir import CONFIG, make_workdir, script_config, start

from m3jax.config import PREFIX_TOKENS
from m3jax.knowledge.memory_writer import restore_writer
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.memory.write import write_bank
from m3jax.mesh import make_mesh
from m3jax.text.references import References
from m3jax.watch import PROCESS_LOST

# References come slowly, so that a process can be killed on its way.
SLOW = (
    CONFIG
    + """

import os
import time
from m3jax.text.references import References

_tokens = References.tokens


def tokens(self, ids):
    time.sleep(float(os.environ["PAUSE"]))
    return _tokens(self, ids)


References.tokens = tokens
"""
)


def _pair(workdir: Path, pause: float) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        address = f"--coordinator=localhost:{probe.getsockname()[1]}"
    flags = [address, "--processes=2", "--join_timeout=600", "--heartbeat_timeout=20"]
    environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PAUSE": str(pause)}
    return [start(workdir, *flags, f"--process_id={i}", devices=2, **environment) for i in range(2)]


def _outputs(pair: list[Any]) -> list[str]:
    ended = [processes.finish(process) for process in pair]
    return [done.stdout + done.stderr for done in ended]


def _written(workdir: Path) -> int:
    return len(list((workdir / "bank").glob("memories.zarr/c/*/0/0/0/0/0")))


@pytest.mark.slow
def test_two_processes_write_the_bank_of_one(tmp_path: Path) -> None:
    workdir, alone = tmp_path / "run", tmp_path / "alone"
    make_workdir(workdir, documents=300, config_file=SLOW)
    config, references = script_config(), References(workdir / "references")
    model = make_model(config, PREFIX_TOKENS, make_mesh(config, jax.devices()[:2]))
    tokenizer = references.tokenizer_fingerprint
    writer = restore_writer(workdir / "warmup", model, tokenizer)

    def write_alone(folder: Path) -> int:
        report = write_bank(
            config,
            model,
            writer.params,
            references,
            folder,
            writer_path=str(writer.folder),
            writer_step=writer.step,
            writer_run=writer.run,
            progress=False,
        )
        return int(report["encoded"])

    assert write_alone(alone) == len(references) > 400
    shards = len(shard_files(alone))

    pair = _pair(workdir, pause=0.2)
    processes.wait_until(lambda: _written(workdir) >= 6, *pair)
    pair[1].send_signal(signal.SIGKILL)
    first, _ = _outputs(pair)
    assert [process.returncode for process in pair] == [PROCESS_LOST, -signal.SIGKILL], first
    assert "no sign of life from process 1 for 20 seconds" in first and "same command" in first
    kept = _written(workdir)
    assert 6 <= kept < shards and not (workdir / "bank" / "COMPLETE").exists()
    by_one = Path(shutil.copytree(workdir / "bank", tmp_path / "by_one"))

    pair = _pair(workdir, pause=0.0)
    outputs = _outputs(pair)
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert f"bank {workdir / 'bank'}: {len(references)} memories" in outputs[0]
    assert "there before" in outputs[0] and "there before" not in outputs[1]
    assert 0 < write_alone(by_one) < len(references)
    for folder in (workdir / "bank", by_one):
        assert _files(folder) == _files(alone)
        assert Bank.open(folder).verify() == []


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
