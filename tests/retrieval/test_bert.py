"""The encoder equals a slow loop from BERT's definition, and Hugging Face's models."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from retrieval.encoders import (
    EPSILON,
    HEADS,
    LAYERS,
    POSITIONS,
    D,
    F,
    make_tokenizer,
    write_encoder,
    write_settings,
)
from tolerance import close

from m3jax.retrieval import bert
from m3jax.retrieval.neural import NeuralEmbedder
from m3jax.retrieval.pretrained import read_pretrained

FAMILIES = ("bert", "xlm-roberta")
# Of 1 to far more tokens than the 60 that are read; two that hold special tokens.
TEXTS = [
    "bado",
    "kelo minu, sopa!",
    "Tiru gafe bado kelo",
    "tiru <pad> gafe [PAD] bado",
    " ".join(["minu", "sopa tiru"] * 4),
    " ".join(["gafe"] * 23),
    " ".join(["kelo bado x7"] * 40),
]


# -- the definition, one number at a time ----------------------------------------------------------
def _slow_norm(x, tensors, name):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    scale, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    root = math.sqrt(variance + EPSILON)
    return np.array([(v - mean) / root * s + b for v, s, b in zip(x, scale, bias, strict=True)])


def _slow_dense(x, tensors, name):
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return np.array([sum(row * x) + b for row, b in zip(weight, bias, strict=True)])


def _slow_attention(rows, tensors, start):
    q, k, v = (
        [_slow_dense(x, tensors, f"{start}attention.self.{name}") for x in rows]
        for name in ("query", "key", "value")
    )
    attended = []
    for query in q:
        heads = []
        for n in range(HEADS):
            part = slice(n * D // HEADS, (n + 1) * D // HEADS)
            scores = [sum(query[part] * key[part]) / math.sqrt(D // HEADS) for key in k]
            weights = [math.exp(score) for score in scores]
            heads.append(sum(w * x[part] for w, x in zip(weights, v, strict=True)) / sum(weights))
        attended.append(np.concatenate(heads))
    return attended


def _slow_encode(tensors, tokens, first_position, pooling):
    """One text by the definition, in float64; no padding, so no mask."""
    tensors = {name: values.astype(np.float64) for name, values in tensors.items()}
    word, position, kind = (
        tensors[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type")
    )
    rows = [
        _slow_norm(
            word[t] + position[first_position + i] + kind[0], tensors, "embeddings.LayerNorm"
        )
        for i, t in enumerate(tokens)
    ]
    for layer in range(LAYERS):
        start = f"encoder.layer.{layer}."
        attended = _slow_attention(rows, tensors, start)
        for i, x in enumerate(rows):
            out = _slow_dense(attended[i], tensors, f"{start}attention.output.dense")
            h = _slow_norm(x + out, tensors, f"{start}attention.output.LayerNorm")
            up = _slow_dense(h, tensors, f"{start}intermediate.dense")
            up = np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in up])
            down = _slow_dense(up, tensors, f"{start}output.dense")
            rows[i] = _slow_norm(h + down, tensors, f"{start}output.LayerNorm")
    pooled = rows[0] if pooling == "cls" else sum(rows) / len(rows)
    return pooled / math.sqrt(sum(pooled**2))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_the_plain_loop(family, pooling, tmp_path):
    tensors = write_encoder(tmp_path, family)
    texts = ["bado", "kelo minu, sopa!", "gafe " * 9, "tiru x7 " * 60]
    found = NeuralEmbedder(tmp_path, pooling).embed(texts)
    tokenizer = make_tokenizer(family)
    tokenizer.no_padding()
    tokenizer.enable_truncation(60)
    for text, row in zip(texts, found, strict=True):
        tokens = tokenizer.encode(text.strip()).ids
        assert len(tokens) == 60 or len(tokens) < 40
        first_position = 0 if family == "bert" else 2
        expected = _slow_encode(tensors, tokens, first_position, pooling)
        close(row, expected)


# -- properties ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def read(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    write_encoder(folder)
    return read_pretrained(folder, "auto")


def _encode(read, tokens, lengths, pooling="mean"):
    params = jax.tree.map(jnp.asarray, read.params)
    return np.asarray(bert.encode(read.architecture, pooling, params, tokens, lengths))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_has_no_influence(read, pooling):
    tokens = np.random.default_rng(0).integers(4, 90, (4, 40)).astype(np.int32)
    lengths = jnp.array([1, 7, 23, 39], jnp.int32)
    first = _encode(read, jnp.array(tokens), lengths, pooling)
    for row, length in enumerate(lengths):
        tokens[row, length:] = 5 + row
    np.testing.assert_array_equal(_encode(read, jnp.array(tokens), lengths, pooling), first)
    tokens[2, 22] += 1  # the last real one has
    changed = np.abs(_encode(read, jnp.array(tokens), lengths, pooling) - first).max(axis=1)
    assert changed[2] > 1e-3 and not changed[[0, 1, 3]].any()


def test_empty_rows_are_finite(read):
    rows = _encode(read, jnp.zeros((2, 16), jnp.int32), jnp.zeros(2, jnp.int32))
    assert np.isfinite(rows).all()


def test_queries_in_blocks_change_nothing(read, monkeypatch):
    tokens = jnp.array(np.random.default_rng(1).integers(4, 90, (2, 64)), jnp.int32)
    lengths = jnp.array([64, 33], jnp.int32)
    whole = _encode(read, tokens, lengths)
    monkeypatch.setattr(bert, "QUERY_BLOCK", 16)
    params = jax.tree.map(jnp.asarray, read.params)
    traced = jax.make_jaxpr(lambda t: bert.encode(read.architecture, "mean", params, t, lengths))
    text = str(traced(tokens))
    assert "2,4,16,64" in text and "2,4,64,64" not in text  # scores (B, N, T, S)
    close(_encode(read, tokens, lengths), whole)


@pytest.mark.slow
def test_bfloat16_is_near_float32(tmp_path):
    write_encoder(tmp_path)
    exact = NeuralEmbedder(tmp_path).embed(TEXTS)
    rough = NeuralEmbedder(tmp_path, dtype="bfloat16").embed(TEXTS)
    assert 1e-4 < np.linalg.norm(rough - exact, axis=1).max() < 2e-2
    close(np.linalg.norm(rough, axis=1), 1)


# -- Hugging Face's models -------------------------------------------------------------------------
def _save_theirs(folder: Path, family: str, torch: ModuleType, transformers: ModuleType) -> None:
    kinds = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
    config = getattr(transformers, f"{kinds[family]}Config")(
        vocab_size=make_tokenizer("bert" if family == "bert" else "xlm-roberta").get_vocab_size(),
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=F,
        max_position_embeddings=POSITIONS,
        type_vocab_size=2 if family == "bert" else 1,
        pad_token_id=0 if family == "bert" else 1,
        layer_norm_eps=EPSILON,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kinds[family]}Model")(config).eval()
    for name, values in model.named_parameters():
        if "Norm" in name or "bias" in name:  # ones and zeros would hide what is left out
            values.data.add_(0.2 * torch.randn_like(values))
    model.save_pretrained(folder)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_embeddings_equal_transformers(
    require: Callable[[str], ModuleType], family: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        torch, transformers = require("torch"), require("transformers")
        _save_theirs(tmp_path, family, torch, transformers)
        write_settings(tmp_path, "bert" if family == "bert" else "xlm-roberta")
        model = transformers.AutoModel.from_pretrained(tmp_path).eval()
        special = {"bert": "[PAD]"}.get(family, "<pad>")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token=special
        )
        batch = tokenizer(
            TEXTS,
            padding=True,
            truncation=True,
            max_length=60,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        real = batch["attention_mask"][:, :, None].float()
        mean = (states * real).sum(1) / real.sum(1)
        lengths = real.sum((1, 2))
        assert lengths.min() < 8 and lengths.max() == 60
    for pooling, pooled in (("mean", mean), ("cls", states[:, 0])):
        expected = torch.nn.functional.normalize(pooled).numpy()
        found = NeuralEmbedder(tmp_path, pooling).embed(TEXTS)
        close(found, expected)
        assert np.abs(expected[0] - expected[1]).max() > 0.01
