"""Bring your own Llama, by its scripts: a downloaded folder becomes a memory model."""

import json
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from data.data_workdir import write_text
from launch.test_commands import ROOT, call, succeed
from ml_collections import ConfigDict
from text.test_tokenizer_import import train_tokenizer

from m3jax import config as config_lib
from m3jax.config import PREFIX_TOKENS
from m3jax.errors import HuggingFaceError
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.memory.storage import MANIFEST
from m3jax.model.hf import write_folder

CONFIG = ROOT / "configs" / "byo_llama.py"
SMALL = (  # besides the shape
    *("--config.evaluation.batches=2", "--config.evaluation.batch_size=8"),
    *("--config.train.steps=4", "--config.train.evaluate_every=0", "--config.data.batch_size=8"),
    *("--config.optimizer.lr_warmup_steps=1", "--config.writer.batch_references=32"),
)


def build(options: str) -> ConfigDict:
    return runpy.run_path(str(CONFIG))["get_config"](options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers with a tokenizer that has no reserved token."""
    folder = tmp_path_factory.mktemp("llama") / "folder"
    tokenizer = train_tokenizer((), ["<|begin_of_text|>", "<|endoftext|>"])
    config = config_lib.default()
    shape = {"layers": 3, "query_heads": 4, "kv_heads": 2, "head_dim": 4, "hidden": 16}
    config.model.update({**shape, "mlp_width": 20, "vocabulary": tokenizer.get_vocab_size()})
    config.model.tied_embeddings = True
    random = np.random.default_rng(0)
    shapes = make_model(config, PREFIX_TOKENS).abstract()[0]
    params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32) * 0.3, shapes)
    write_folder(folder, config.model, config.memory, params, tokenizer=tokenizer.to_str())
    return folder


def vocabulary(llama: Path) -> int:
    return json.loads((llama / "config.json").read_text())["vocab_size"]


def test_the_shape_is_that_of_the_folder(llama: Path) -> None:
    config = build(f"model={llama},stage=continual,layers=middle")
    model, memory = config.model, config.memory
    assert (model.layers, model.kv_heads, model.hidden) == (3, 2, 16)
    assert (
        model.vocabulary == vocabulary(llama) + 2
    )  # padding and the mark of a reference are added
    assert (memory.first_layer, memory.layers, memory.source) == (1, 1, "precomputed")
    assert str(llama) not in config_lib.to_json(config)
    assert build(f"layers=all,model={llama}").memory.layers == 3
    with pytest.raises(HuggingFaceError, match=r"/nowhere/config.json"):
        build("model=/nowhere")


@pytest.mark.slow
def test_a_llama_becomes_a_memory_model(llama: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    at = f"--workdir={workdir}"
    warmup, continual = (
        f"--config={CONFIG}:model={llama},layers=all,stage={stage}"
        for stage in ("warmup", "continual")
    )
    documents, knowledge = write_text(tmp_path)
    shown = succeed("convert from_hf", warmup, at, f"--model={llama}")
    assert f"; {vocabulary(llama) + 2} tokens" in shown
    succeed("prepare", warmup, at, f"--documents={documents}", f"--knowledge={knowledge}")
    succeed("write_bank", continual, at, *SMALL)
    succeed("train", continual, at, f"--init_from={workdir}/warmup", *SMALL)

    ranked = succeed("select_memory heads", continual, at, *SMALL, "--hide=memory", "--keep=0.5")
    heads = re.search(r"--config.memory.heads=(\S+)", ranked)[1]
    figures = json.loads((workdir / "report" / "heads-memory-kv.json").read_text())
    assert figures["memory_heads"] == heads and len(figures["heads"]) == 6
    assert (workdir / "report" / "heads-memory-kv.png").read_bytes().startswith(b"\x89PNG")
    some = f"--config.memory.heads={heads}"
    unfit = call("evaluate losses", continual, at, *SMALL, some)
    assert unfit.returncode == 2 and "written with counts = '', here '" in unfit.stderr
    small = f"--bank={tmp_path}/some"
    succeed("write_bank", continual, at, *SMALL, some, small)
    assert 2 * Bank.open(tmp_path / "some").bytes == Bank.open(workdir / "bank").bytes
    layout = json.loads((tmp_path / "some" / MANIFEST).read_bytes())["binding"]["layout"]
    counts = (part.split(":") for part in layout["counts"].split(","))
    rows = {layer: [i for i, n in enumerate(row.split("+")) if n != "0"] for layer, row in counts}
    assert heads == ",".join(f"{layer}:{'+'.join(map(str, row))}" for layer, row in rows.items())
    assert "with memory" in succeed("evaluate losses", continual, at, *SMALL, some, small)
