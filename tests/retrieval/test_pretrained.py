"""Folders of encoders: the variants that are read, and one clear error for each that is not."""

import json

import ml_dtypes
import numpy as np
import pytest
from retrieval.encoders import change_json, make_tokenizer, write_encoder, write_json
from safetensors.numpy import save_file

from m3jax.errors import HuggingFaceError
from m3jax.retrieval.pretrained import read_pretrained

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    write_encoder(tmp_path)
    return tmp_path


@pytest.fixture
def tensors(folder):
    return write_encoder(folder)


def equal(a, b):
    for group in ("embedding", "layers"):
        assert a.params[group].keys() == b.params[group].keys()
        for name, values in a.params[group].items():
            np.testing.assert_array_equal(values, b.params[group][name])


def refused(folder, *parts, pooling="auto"):
    with pytest.raises(HuggingFaceError) as caught:
        read_pretrained(folder, pooling)
    for part in parts:
        assert part in str(caught.value)


# -- variants --------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ["bert.", "model.bert."])
def test_weights_under_a_prefix_with_others_and_old_names(folder, tensors, prefix):
    expected = read_pretrained(folder, "auto")
    renamed = {}
    for name, values in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        renamed[prefix + name.replace("LayerNorm.bias", "LayerNorm.beta")] = values
    save_file({**renamed, "cls.bias": np.zeros(3, np.float32)}, folder / WEIGHTS)
    equal(read_pretrained(folder, "auto"), expected)


def test_weights_in_several_files(folder, tensors):
    expected = read_pretrained(folder, "auto")
    (folder / WEIGHTS).unlink()
    names, places = sorted(tensors), {}
    for i, part in enumerate((names[:20], names[20:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        places.update(dict.fromkeys(part, file))
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})
    equal(read_pretrained(folder, "auto"), expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors is missing", "download it again")
    write_json(folder / "model.safetensors.index.json", {})
    refused(folder, "model.safetensors.index.json names no files", "download it again")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_of_half_width(folder, tensors, dtype):
    save_file({name: values.astype(dtype) for name, values in tensors.items()}, folder / WEIGHTS)
    found = read_pretrained(folder, "auto").params["embedding"]["words"]
    assert found.dtype == np.float32
    expected = tensors["embeddings.word_embeddings.weight"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls", "embedding_dimension": 32}, "cls"),
    ],
)
def test_pooling_is_what_the_folder_says_unless_chosen(folder, content, expected):
    write_json(folder / "1_Pooling" / "config.json", content)
    assert read_pretrained(folder, "auto").pooling == expected
    assert read_pretrained(folder, "mean").pooling == "mean"
    assert read_pretrained(folder, "cls").pooling == "cls"


def test_only_three_files_are_needed(folder):
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        (folder / name).unlink()
    assert read_pretrained(folder, "mean").max_length == 72
    refused(folder, "1_Pooling/config.json is missing", "config.retrieval.pooling to 'mean'")


# -- what is refused -------------------------------------------------------------------------------
def test_no_folder(tmp_path):
    refused(tmp_path / "none", f"no folder {tmp_path / 'none'}", "set config.retrieval.encoder")


def test_no_or_damaged_config(folder):
    (folder / "config.json").write_text('{"model_type": "be')
    refused(folder, "config.json is missing or damaged", "name the folder of a downloaded")
    (folder / "config.json").write_text("[]")
    refused(folder, "damaged (no JSON object)", "name the folder")
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing or damaged", "name the folder of a downloaded")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "modernbert"}, ("'modernbert' is not supported", "bert, roberta, xlm-")),
        ({"model_type": None}, ("model_type = None is not supported",)),
        ({"hidden_act": "relu"}, ("hidden_act = 'relu'", "only 'gelu'")),
        ({"position_embedding_type": "relative_key"}, ("'relative_key'", "only 'absolute'")),
        ({"hidden_size": None}, ("hidden_size", "published with")),
        ({"hidden_size": "wide"}, ("'wide'", "published with")),
        ({"num_attention_heads": 5}, ("5 heads do not divide hidden_size = 32",)),
        ({"num_hidden_layers": 0}, ("a size is 0",)),
        ({"num_hidden_layers": 4}, ("encoder.layer.3.", "is missing", "from one download")),
        ({"vocab_size": 100}, ("tokens up to", "has only 100", "from one download")),
    ],
)
def test_configs_that_do_not_fit(folder, changes, parts):
    change_json(folder / "config.json", **changes)
    refused(folder, *parts)


def test_no_weights(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    refused(folder, f"{folder / WEIGHTS} is missing or damaged", "download it again, or convert")


def test_missing_tensor(folder, tensors):
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, folder / WEIGHTS)
    refused(folder, WEIGHTS, "encoder.layer.1.output.dense.bias is missing", "from one download")


def test_tensor_of_another_shape_or_dtype(folder, tensors):
    name = "encoder.layer.0.intermediate.dense.weight"
    save_file({**tensors, name: tensors[name].T.copy()}, folder / WEIGHTS)
    refused(folder, name, "F32 of shape (32, 48)", "needs shape (48, 32)", "from one download")
    save_file({**tensors, name: tensors[name].astype(np.int8)}, folder / WEIGHTS)
    refused(folder, name, "I8 of shape (48, 32)", "one of F32, F16, BF16")


@pytest.mark.parametrize("kept", [0, 5, 400, -1])
def test_truncated_weights(folder, kept):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:kept])
    refused(folder, f"{folder / WEIGHTS} is missing or damaged", "download it again")


def test_no_or_damaged_tokenizer(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])
    refused(folder, "tokenizer.json is missing or damaged", "download it again")
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer.json is missing or damaged", "AutoTokenizer")


def test_tokenizer_of_another_encoder(folder):
    tokenizer = make_tokenizer("bert")
    tokenizer.add_tokens(["another"])
    tokenizer.save(str(folder / "tokenizer.json"))
    refused(folder, "tokenizer.json has tokens up to", "from one download")


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "mean and cls"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({}, "nothing"),
    ],
)
def test_other_poolings(folder, content, shown):
    write_json(folder / "1_Pooling" / "config.json", content)
    refused(folder, f"asks for {shown}", "set config.retrieval.pooling")


def test_modules_after_the_pooling(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"type": "sentence_transformers.models.Dense"})
    write_json(folder / "modules.json", modules)
    refused(folder, "modules.json", "'Dense'", "choose an encoder with Transformer, Pooling")
    write_json(folder / "modules.json", [{"path": ""}])
    refused(folder, "modules.json is damaged", "download it again")


def test_texts_of_no_length(folder):
    change_json(folder / "sentence_bert_config.json", max_seq_length=2)
    refused(folder, "texts of 2 tokens", "correct max_seq_length")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("1_Pooling/config.json", "set config.retrieval.pooling"), ("tokenizer_config.json", "again")],
)
def test_a_damaged_file_says_what_to_do_with_it(folder, name, remedy):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{")
    refused(folder, name, "damaged", remedy)
