"""launch/write_bank.py: the writer's weights, found from a checkpoint that reads its memories."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory.memory_tiny import tiny_config, tiny_params

from m3jax.memory.bank import Bank, writer_fingerprint
from m3jax.mesh import make_mesh
from m3jax.text.documents import Document
from m3jax.text.references import References, write_references
from m3jax.text.tokenizer import Tokenizer
from m3jax.train.checkpoints import Checkpoints
from m3jax.train.optimizer import make_optimizer
from m3jax.train.state import new_state

ROOT = Path(__file__).parents[2]
CONFIG = """
from memory.memory_tiny import tiny_config


def get_config():
    return tiny_config(model__vocabulary=300, memory__reference_length=9)
"""


def _script(workdir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, str(ROOT / "launch" / "write_bank.py"), f"--workdir={workdir}"]
    command += [f"--config={workdir}/config.py", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_memories_are_written_by_the_recorded_writer(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.py").write_text(CONFIG)
    texts = [f"person {i} lives in town {i * i}, near river {i}." for i in range(20)]
    documents = [Document(id=str(i), title="", text=text) for i, text in enumerate(texts)]
    tokenizer = Tokenizer.train(texts, vocabulary=280, min_frequency=2)
    write_references(documents, tokenizer, workdir / "references", 9)

    config = tiny_config(model__vocabulary=300, memory__reference_length=9)
    optimizer, mesh = make_optimizer(config), make_mesh(_one_device(config), jax.devices()[:1])
    written = {name: tiny_params(config, seed) for seed, name in enumerate(("warmup", "continual"))}
    fingerprint = writer_fingerprint(written["warmup"], config)
    writer = {"hash": fingerprint, "path": "/somewhere/else/warmup", "step": 3}
    with jax.set_mesh(mesh):
        for name, params in written.items():
            recorded = writer if name == "continual" else None
            checkpoints = Checkpoints(workdir / name, config, tokenizer.fingerprint, recorded)
            checkpoints.save(new_state(jax.tree.map(jnp.asarray, params), optimizer), 3)
            checkpoints.close()

    # The continual checkpoint's own weights are others; its writer lies beside it.
    done = _script(workdir, f"--checkpoint={workdir / 'continual'}")
    assert done.returncode == 0, done.stderr
    bank, references = Bank.open(workdir / "bank"), References.open(workdir / "references")
    assert bank.writer == {"hash": fingerprint, "path": str(workdir / "warmup"), "step": 3}
    assert bank.binding.references == references.fingerprint
    assert bank.size == len(references) > 20 and f"{bank.size} encoded" in done.stdout
    np.testing.assert_array_equal(bank.lengths, np.minimum(references.lengths, 4))

    # The default checkpoint is the warmup stage, which wrote this bank: nothing is left to do.
    done = _script(workdir)
    assert done.returncode == 0, done.stderr
    assert f"0 encoded, 0 copied, {bank.size} there before" in done.stdout

    shutil.rmtree(workdir / "warmup")
    done = _script(workdir, f"--checkpoint={workdir / 'continual'}", f"--bank={tmp_path / 'b2'}")
    assert done.returncode == 2
    assert "writer" in done.stderr and "/somewhere/else/warmup" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "b2").exists()


def _one_device(config):
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh.fsdp = 1
    return config
