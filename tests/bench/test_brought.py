"""Benchmarks of a brought model, on a tiny one of random weights."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from model.test_gguf_file import made, write_gguf
from quickstart.test_real_llama import demonstrated, get_config
from tolerance import close

from m3jax.bench.llama_cpp import write_half
from m3jax.bench.main import run
from m3jax.model.gguf_file import GGUFModel


@pytest.mark.slow
def test_brought_models_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demonstrated(tmp_path, monkeypatch, questions=1)
    about = {"config": get_config("stage=continual"), "workdir": tmp_path / "run"}
    about["checkpoint"] = str(tmp_path / "run" / "warmup")
    file, picture = tmp_path / "result.json", tmp_path / "speed.png"
    assert run("inference", "smallest", count=1, json=file, picture=picture, **about) == 0
    result = json.loads(file.read_text())
    modes = {"none", "memory", "text", "none_1", "memory_1", "text_1"}
    for section in ("tokens_per_second", "first_token_seconds", "milliseconds", "state_MB"):
        assert result[section].keys() == modes and min(result[section].values()) > 0
    state = result["state_MB"]
    assert state["none_1"] < state["memory_1"] and state["none_1"] < state["text_1"]
    times = result["milliseconds"]
    ratio = result["ratios"]["memory_over_none"]
    close(ratio, times["memory"] / times["none"])
    assert picture.stat().st_size > 500

    assert run("train", "smallest", count=1, json=file, **about) == 0
    result = json.loads(file.read_text())
    assert result["seconds"].keys() == {"memory", "none", "writing", "encoding"}
    seconds = result["seconds"]
    ratio = result["ratios"]["writing_over_encoding"]
    close(ratio, seconds["writing"] / seconds["encoding"])


def test_weights_are_written_in_half_precision(tmp_path: Path) -> None:
    made(tmp_path / "folder")
    source = tmp_path / "model.gguf"
    write_gguf(tmp_path / "folder", source, gguf.GGMLQuantizationType.Q8_0, tokens=["a", "b"])
    target = write_half(source, tmp_path / "half.gguf")
    theirs, ours = GGUFModel(source), GGUFModel(target)
    assert ours.names == theirs.names and ours.settings == theirs.settings
    counts = "GGUF.kv_count", "general.file_type"
    for key in theirs.metadata.keys() - set(counts):
        assert ours.metadata[key] == theirs.metadata[key]
    assert ours.metadata["tokens"] == ["a", "b"]
    for tensor in gguf.GGUFReader(target).tensors:
        assert tensor.data.dtype == (
            np.float32 if tensor.name.endswith("norm.weight") else np.float16
        )
    for name in theirs.names:
        wanted, found = theirs.read(name, None), ours.read(name, None)
        exact = wanted if wanted.ndim == 1 else wanted.astype(np.float16)
        np.testing.assert_array_equal(found, exact)
