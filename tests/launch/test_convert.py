"""launch/convert.py: a Llama becomes a checkpoint that all later steps take, and one again."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from data.data_workdir import write_text
from launch.test_commands import SMALL, call, succeed
from ml_collections import ConfigDict
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from m3jax.checkpoint import read_model
from m3jax.config import PREFIX_TOKENS, default
from m3jax.make_model import make_model
from m3jax.model.hf import read_params, write_folder
from m3jax.text import tokenizer as text

NAMED = ("<|pad|>", "<|begin|>", "<|extra|>", "<|end|>")


def small(vocabulary: int = 700) -> ConfigDict:
    """The shape of `SMALL`."""
    config = default()
    config.model.update(
        {"layers": 2, "hidden": 16, "head_dim": 8, "mlp_width": 24, "query_heads": 2}
    )
    config.model.kv_heads, config.memory.layers = 2, 1
    config.model.vocabulary = vocabulary
    return config


def random_params(config: ConfigDict) -> dict:
    random = np.random.default_rng(0)
    shapes = make_model(config, PREFIX_TOKENS).abstract()[0]
    return jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)


def equal(a: dict, b: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def foreign_tokenizer(path: Path) -> Tokenizer:
    """A byte-level BPE whose special tokens come last, as Llama 3 has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        ["pet of Tiru: otter", "town of Kelo: Bado"] * 3,
        trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in NAMED[::-1]])
    tokenizer.save(str(path))
    return tokenizer


@pytest.mark.slow
def test_a_llama_goes_through_all_later_steps(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL)
    documents, knowledge = write_text(tmp_path)
    workdir, llama = tmp_path / "run", tmp_path / "llama"
    warmup, continual = (f"--config={tmp_path}/small.py:{s}" for s in ("warmup", "continual"))
    run = f"--workdir={workdir}"
    succeed("prepare", warmup, run, f"--documents={documents}", f"--knowledge={knowledge}")
    config = small()
    params = random_params(config)
    content = (workdir / "tokenizer" / "tokenizer.json").read_text()
    write_folder(llama, config.model, config.memory, params, tokenizer=content)

    wrong = call(
        "convert from_hf", warmup, run, f"--model={llama}", "--config.model.rope_base=50.0"
    )
    assert wrong.returncode == 2 and "config.model.rope_base = 10000.0" in wrong.stderr
    assert "Traceback" not in wrong.stderr and not (workdir / "warmup").exists()
    shown = succeed("convert from_hf", warmup, run, f"--model={llama}")
    assert "step 0" in shown and str(llama) in shown
    found = read_model(workdir / "warmup")
    assert found[3]["step"] == 0 and found[3]["writer"] is None
    equal(found[2], params)
    assert succeed("convert from_hf", warmup, run, f"--model={llama}") == shown  # the same model
    other = jax.tree.map(lambda x: x + 1, params)
    write_folder(tmp_path / "other", config.model, config.memory, other, tokenizer=content)
    again = call("convert from_hf", warmup, run, f"--model={tmp_path}/other")
    assert again.returncode == 2 and "has a checkpoint of something else already" in again.stderr

    assert "step 0" in succeed("write_bank", continual, run)
    succeed("train", continual, run, f"--init_from={workdir}/warmup")
    figures = tmp_path / "figures.json"
    succeed("evaluate losses", continual, run, f"--json={figures}")
    assert json.loads(figures.read_text())["step"] == 6
    assert "warmup: loss" in succeed("train", warmup, run)  # goes on from step 0

    exported = tmp_path / "exported"
    trained = f"--checkpoint={workdir}/continual"
    succeed("convert to_hf", f"--folder={exported}", run, trained)
    equal(read_params(exported, config.model, config.memory), read_model(workdir / "continual")[2])
    assert (exported / "tokenizer.json").read_text() == content
    written = json.loads((exported / "config.json").read_text())
    ids = {role: written[f"{role}_token_id"] for role in ("bos", "eos", "pad")}
    assert ids == {"bos": text.BOS, "eos": text.END, "pad": text.PAD}
    succeed("convert to_hf", f"--folder={exported}", run, trained)  # the same model
    twice = call("convert to_hf", f"--folder={exported}", run, f"--checkpoint={workdir}/warmup")
    assert twice.returncode == 2 and "holds another model" in twice.stderr


@pytest.mark.slow
def test_a_tokenizer_of_others_is_renumbered_with_the_rows(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL)
    workdir, llama = tmp_path / "run", tmp_path / "llama"
    config = small()
    params = random_params(config)
    write_folder(llama, config.model, config.memory, params)
    command = (
        *("convert from_hf", f"--config={tmp_path}/small.py:warmup"),
        *(f"--workdir={workdir}", f"--model={llama}"),
    )
    missing = call(*command)
    assert missing.returncode == 2 and "has a tokenizer; download" in missing.stderr
    theirs = foreign_tokenizer(llama / "tokenizer.json")
    wrong = call(*command, "--special_tokens=a,b,c,d")
    assert wrong.returncode == 2 and all(name in wrong.stderr for name in NAMED)
    assert not workdir.exists()
    succeed(*command, f"--special_tokens={','.join(NAMED)}")

    _, _, found, _, ours = read_model(workdir / "warmup")
    words = " pet of Kelo: otter <s>"
    ids = theirs.encode(words, add_special_tokens=False).ids
    np.testing.assert_array_equal(
        found["embedding"][ours.encode(words)], params["embedding"][np.array(ids)]
    )
    for place, name in enumerate(NAMED):
        row = params["head"][theirs.token_to_id(name)]
        np.testing.assert_array_equal(found["head"][place], row)

    # prepare does not train another tokenizer in its place
    documents, _ = write_text(tmp_path)
    done = call("prepare", command[1], command[2], f"--documents={documents}")
    assert text.Tokenizer.load(workdir / "tokenizer").fingerprint == ours.fingerprint
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_mistakes_end_with_one_message(tmp_path: Path) -> None:
    workdir, config = f"--workdir={tmp_path}/run", "--config=configs/wiki_small.py"
    at = f"--model={tmp_path}"
    cases = {
        ("convert from_hf", workdir, "--model=/nowhere"): "needs --config",
        ("convert to_hf", workdir, f"--folder={tmp_path}/b"): "there is no such folder",
        ("convert from_hf", workdir, config, at): "tokenizer",
        ("convert from_hf", workdir, f"{config}:stage=continual", at): "config.memory.source",
    }
    for arguments, words in cases.items():
        done = call(*arguments)
        assert done.returncode != 0 and words in done.stderr, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
