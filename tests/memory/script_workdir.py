"""A workdir with references and a tiny checkpoint for launch/write_bank.py, and its start."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import processes
from memory.memory_tiny import tiny_config, tiny_params
from ml_collections import ConfigDict

from m3jax.memory.binding import writer_fingerprint
from m3jax.mesh import make_mesh
from m3jax.text.documents import Document
from m3jax.text.references import write_references
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


def script_config() -> ConfigDict:
    """The config of `CONFIG`."""
    return tiny_config(model__vocabulary=300, memory__reference_length=9)


def make_workdir(workdir: Path, documents: int = 20, config_file: str = CONFIG) -> str:
    """Config file, references and the stages `warmup` and, reading its memories, `continual`.

    Returns:
      Fingerprint of the writer, the weights of `warmup`.
    """
    workdir.mkdir()
    (workdir / "config.py").write_text(config_file)
    texts = [f"person {i} lives in town {i * i}, near river {i}." for i in range(documents)]
    tokenizer = Tokenizer.train(texts, vocabulary=280, min_frequency=2)
    write_references(
        [Document(id=str(i), title="", text=text) for i, text in enumerate(texts)],
        tokenizer,
        workdir / "references",
        9,
    )
    config = script_config()
    one = config.copy_and_resolve_references()
    with one.unlocked():
        one.mesh.fsdp = 1
    optimizer, mesh = make_optimizer(config), make_mesh(one, jax.devices()[:1])
    written = {name: tiny_params(config, seed) for seed, name in enumerate(("warmup", "continual"))}
    fingerprint = writer_fingerprint(written["warmup"], config.memory)
    writer = {"hash": fingerprint, "path": "/somewhere/else/warmup", "step": 3}
    with jax.set_mesh(mesh):
        for name, params in written.items():
            recorded = writer if name == "continual" else None
            checkpoints = Checkpoints(workdir / name, config, tokenizer.fingerprint, recorded)
            checkpoints.save(new_state(jax.tree.map(jnp.asarray, params), optimizer), 3)
            checkpoints.close()
    return fingerprint


def start(workdir: Path, *flags: str, devices: int = 1, **environment: str) -> Any:
    """Starts launch/write_bank.py on a workdir with some CPU devices."""
    command = ["python", "launch/write_bank.py", f"--workdir={workdir}"]
    command += [f"--config={workdir}/config.py", *flags]
    return processes.start(command, devices, env=environment)
