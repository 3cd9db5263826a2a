"""Small random encoders in folders as Hugging Face writes them, made without its libraries."""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

# model_type → special tokens in the order of their ids: first of a text, padding, last, unknown.
SPECIALS = {
    "bert": {"[CLS]": 1, "[PAD]": 0, "[SEP]": 2, "[UNK]": 3},
    "xlm-roberta": {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3},
}
LAYERS, HEADS, D, F, POSITIONS = 3, 4, 32, 48, 72
EPSILON = 0.01  # of the norms: so large that it is seen


def make_tokenizer(family: str) -> tokenizers.Tokenizer:
    """WordPiece of syllables, or byte-level BPE; pads to a fixed length, as some files do."""
    specials = SPECIALS[family]
    names = sorted(specials, key=specials.__getitem__)
    first, padding, last, unknown = specials
    if family == "bert":
        pieces = [a + b for a in string.ascii_lowercase for b in "aeiou"]
        pieces += string.ascii_lowercase + string.digits
        words = [*names, *pieces, *(f"##{piece}" for piece in pieces)]
        vocabulary = {word: i for i, word in enumerate(words)}
        tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.add_special_tokens(names)
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=names, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(["bado kelo minu sopa tiru gafe"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B {last}",
        special_tokens=[(first, specials[first]), (last, specials[last])],
    )
    tokenizer.enable_padding(length=24, pad_id=specials[padding], pad_token=padding)
    tokenizer.enable_truncation(20)
    return tokenizer


def make_tensors(family: str, vocabulary: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by the names of `BertModel`'s state dict; norms and biases are random too."""
    rng = np.random.default_rng(seed)
    types = 2 if family == "bert" else 1
    shapes = {
        "embeddings.word_embeddings.weight": (vocabulary, D),
        "embeddings.position_embeddings.weight": (POSITIONS, D),
        "embeddings.token_type_embeddings.weight": (types, D),
        "embeddings.LayerNorm": (D,),
    }
    for i in range(LAYERS):
        start = f"encoder.layer.{i}."
        for name in ("query", "key", "value"):
            shapes[f"{start}attention.self.{name}"] = (D, D)
        shapes[f"{start}attention.output.dense"] = (D, D)
        shapes[f"{start}attention.output.LayerNorm"] = (D,)
        shapes[f"{start}intermediate.dense"] = (F, D)
        shapes[f"{start}output.dense"] = (D, F)
        shapes[f"{start}output.LayerNorm"] = (D,)
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) * (1.0 if len(shape) == 1 else 0.4)
        if name.endswith(".weight"):
            tensors[name] = values
        else:
            tensors[f"{name}.weight"] = 1 + 0.2 * values if len(shape) == 1 else values
            tensors[f"{name}.bias"] = 0.3 * rng.standard_normal(shape[0])
    return {name: values.astype(np.float32) for name, values in tensors.items()}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def change_json(path: Path, **changes: Any) -> None:
    """Changes entries of a JSON object; None removes one."""
    content = json.loads(path.read_text()) | changes
    write_json(path, {key: value for key, value in content.items() if value is not None})


def write_settings(folder: Path, family: str) -> None:
    """Everything but config and weights."""
    make_tokenizer(family).save(str(folder / "tokenizer.json"))
    cls = family != "bert"
    modes = {"pooling_mode_cls_token": cls, "pooling_mode_mean_tokens": not cls}
    sizes = {"word_embedding_dimension": D, "pooling_mode_max_tokens": False}
    write_json(folder / "1_Pooling" / "config.json", {**sizes, **modes, "include_prompt": True})
    kinds = ("models.Transformer", "models.Pooling", "models.Normalize")
    entries = [{"idx": i, "type": f"sentence_transformers.{k}"} for i, k in enumerate(kinds)]
    write_json(folder / "modules.json", entries)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 60})


def write_encoder(folder: Path, family: str = "bert", seed: int = 0) -> dict[str, np.ndarray]:
    """Writes a whole encoder; returns its weights."""
    vocabulary = make_tokenizer(family).get_vocab_size()
    tensors = make_tensors(family, vocabulary, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": family,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_size": D,
        "intermediate_size": F,
        "vocab_size": vocabulary,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2 if family == "bert" else 1,
        "layer_norm_eps": EPSILON,
        "hidden_act": "gelu",
        "pad_token_id": 0 if family == "bert" else 1,
    }
    write_json(folder / "config.json", config)
    write_settings(folder, family)
    return tensors
