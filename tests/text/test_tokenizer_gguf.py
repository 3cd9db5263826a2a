"""Tokenizers of GGUF files equal those that their content describes."""

import json
from typing import Any

import pytest
from text.test_byte_fallback import WORDS, byte_fallback_tokenizer
from text.test_tokenizer_import import OURS, TEXTS, train_tokenizer
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

from m3jax.errors import TextError
from m3jax.text.documents import Document
from m3jax.text.reference_splitter import cut_references
from m3jax.text.tokenizer import Tokenizer as OurTokenizer
from m3jax.text.tokenizer_gguf import gguf_tokenizer
from m3jax.text.tokenizer_import import adopt_tokenizer

# As the tokenizer.json of Llama 3 and of Qwen2 have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
MORE = ["I'LL see 12345 mats;\n\n  no?\r\n\tx+=1 ...\n", "a  b\u00a0c 'tis"]


def split_by(pattern: str) -> Any:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])


def metadata_of(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """The metadata of a GGUF file with this tokenizer."""
    content = json.loads(tokenizer.to_str())
    added = {token["content"]: 3 if token["special"] else 4 for token in content["added_tokens"]}
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    found = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [added.get(token, 1) for token in tokens],
        "merges": [" ".join(pair) for pair in content["model"]["merges"]],
    }
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


@pytest.mark.parametrize(
    ("pre", "splitter"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (
            "smollm",
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
        ),
        ("llama-bpe", split_by(LLAMA3)),
        ("qwen2", split_by(QWEN2)),
    ],
)
def test_tokens_are_those_of_the_tokenizer(pre: str, splitter: Any) -> None:
    tokenizer = train_tokenizer(["<|endoftext|>"], ["<|im_end|>"])
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    found = Tokenizer.from_str(gguf_tokenizer(metadata_of(tokenizer, pre)))
    assert found.get_vocab() == tokenizer.get_vocab()
    for text in (*TEXTS, *MORE, "<tool><|im_end|> x"):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert found.encode(text, add_special_tokens=False).ids == expected
    ours = OurTokenizer(adopt_tokenizer(found.to_str(), None, OURS).text)
    for text in (*TEXTS, *MORE):
        assert ours.decode(ours.encode(text)) == text


def test_tokens_with_byte_fallback_are_those_of_the_tokenizer() -> None:
    theirs = byte_fallback_tokenizer(False)
    merges = json.loads(theirs.to_str())["model"]["merges"]
    ranks = {"".join(pair): place for place, pair in reversed([*enumerate(merges)])}
    tokens = [theirs.id_to_token(i) for i in range(theirs.get_vocab_size())]
    found = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3, *(6 for _ in range(256)), *(1 for _ in tokens[259:])],
        "scores": [-float(ranks.get(token, 1e6)) for token in tokens],
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    content, order, _ = adopt_tokenizer(gguf_tokenizer(metadata), None, OURS, "</s>")
    expected, same, _ = adopt_tokenizer(theirs.to_str(), None, OURS, "</s>")
    assert order.tolist() == same.tolist()
    for text in (*TEXTS, *MORE, *WORDS):
        ids = OurTokenizer(content).encode(text)
        assert ids.tolist() == OurTokenizer(expected).encode(text).tolist()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": None}, ("tokenizer.ggml.model = None", "--tokenizer")),
        ({"model": "t5"}, ("tokenizer.ggml.model = 't5'", "byte-level BPE")),
        ({"pre": "jais"}, ("tokenizer.ggml.pre = 'jais'", "smollm", "--tokenizer")),
        ({"merges": ["no merge"]}, ("damaged",)),
        ({"tokens": None}, ("damaged",)),
    ],
)
def test_other_tokenizers_are_refused(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    metadata = metadata_of(train_tokenizer(), "gpt-2")
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(TextError) as caught:
        gguf_tokenizer(metadata)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_references_of_tokens_across_white_space_are_tokens_of_their_texts() -> None:
    """The pattern of Llama 3 joins a full stop with the line feed behind it."""
    tokenizer = train_tokenizer(["<|endoftext|>"], ["<|im_end|>"])
    metadata = metadata_of(tokenizer, "llama-bpe")
    metadata["tokenizer.ggml.tokens"].append(".\u010a")
    metadata["tokenizer.ggml.token_type"].append(1)
    metadata["tokenizer.ggml.merges"].append(". \u010a")
    ours = OurTokenizer(adopt_tokenizer(gguf_tokenizer(metadata), None, OURS).text)
    text = "otter.\nKelo reads. the words.\n the otter.\n\n" * 4
    assert len(ours.encode(".\n")) == 1
    for piece in cut_references(Document("a", text), ours, 20):
        assert piece.tokens.tolist() == ours.encode(piece.text).tolist()
        assert ours.decode(piece.tokens) == piece.text
