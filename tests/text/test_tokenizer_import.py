"""Tokenizers of other models: renumbered ones read as before, others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from m3jax.errors import TextError
from m3jax.text.tokenizer import Tokenizer as OurTokenizer
from m3jax.text.tokenizer_import import adopt_tokenizer

OURS = ("<pad>", "<s>", "<reference>", "</s>")
NAMED = ["<|none|>", "<|begin|>", "<|extra|>", "<|end|>"]
TEXTS = [
    "the otter of Kelo\n\n  reads 12 naïve words",
    "",
    " <s> is <|begin|> no token",
    "火🙂\x00",
]


def train_tokenizer(first: Sequence[str] = (), last: Sequence[str] = NAMED) -> Tokenizer:
    """A byte-level BPE with special tokens in front (GPT-2, SmolLM) or at the end (Llama 3)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(first),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the otter of Kelo reads the words"] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in last])
    tokenizer.add_tokens(["<tool>"])
    begin = tokenizer.token_to_id("<|begin|>") or 0
    template = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return tokenizer


@pytest.mark.parametrize("front", [True, False])
def test_a_tokenizer_is_renumbered(front: bool) -> None:
    other = ["<|more|>", *NAMED[::-1]]
    theirs = train_tokenizer(other, ()) if front else train_tokenizer((), other)
    content, order, line_feed = adopt_tokenizer(theirs.to_str(), NAMED, OURS)
    assert line_feed == theirs.token_to_id("\u010a")
    ours = OurTokenizer(content)
    size = theirs.get_vocab_size()
    assert ours.size == size and sorted(order) == list(range(size))
    assert [theirs.id_to_token(i) for i in order[:4]] == NAMED
    theirs.encode_special_tokens = True
    for text in TEXTS:
        ids = ours.encode(text)
        expected = theirs.encode(text, add_special_tokens=False).ids
        np.testing.assert_array_equal(order[ids], np.array(expected, int))
        assert ours.decode(ids) == text
        spans = ours.encode_with_offsets(text)[1]
        assert "".join(text[a:b] for a, b in np.unique(spans, axis=0)) == text
    assert ours.decode(np.arange(4)) == ""
    decomposed = "e\u0301"  # left as it is
    assert ours.decode(ours.encode(decomposed)) == decomposed
    again, same, _ = adopt_tokenizer(content, None, OURS)
    assert again == content and list(same) == list(range(size))


def test_without_names_special_tokens_are_found_or_added() -> None:
    """Of a start and an end, but no reserved token, two tokens are added."""
    theirs = train_tokenizer((), ["<|begin|>", "<|endoftext|>", "<|begin_of_text|>"])
    content, order, _ = adopt_tokenizer(theirs.to_str(), None, OURS, "<|endoftext|>")
    ours, size = OurTokenizer(content), theirs.get_vocab_size()
    assert ours.size == size + 2 and order[[0, 2]].tolist() == [-1, -1]
    assert sorted(order)[2:] == list(range(size))
    assert [theirs.id_to_token(i) for i in order[[1, 3]]] == ["<|begin_of_text|>", "<|endoftext|>"]
    theirs.encode_special_tokens = True
    for text in TEXTS:
        ids = ours.encode(text)
        assert order[ids].tolist() == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text
    assert ours.decode(np.arange(4)) == ""


def test_bytes_without_tokens_are_left_out_and_counted() -> None:
    content = json.loads(train_tokenizer().to_str())
    vocabulary = content["model"]["vocab"]
    for place, character in enumerate("\u0104\u00f0\u00e6"):  # bytes 0x04, 0xf0 and 0xe6
        vocabulary[f"unused{place}"] = vocabulary.pop(character)
    theirs = Tokenizer.from_str(json.dumps(content))
    ours = OurTokenizer(adopt_tokenizer(json.dumps(content), NAMED, OURS).text)
    assert sorted(ours.lacking) == [0x04, 0xE6, 0xF0]
    text = "a\x04b \u6c34\U0001f642 \u00e6!"  # 3 of its characters have such a byte
    assert ours.lost(text) == 3 and ours.lost("a b \u00e6!") == 0
    ids, spans = ours.encode_with_offsets(text)
    assert ours.size == theirs.get_vocab_size()
    assert ours.decode(ids).replace("\ufffd", "") == "ab  \u00e6!"
    seen = [text[a:b] for a, b in np.unique(spans, axis=0)]
    assert "".join(seen) == text.replace("\x04", "")
    np.testing.assert_array_equal(ids, ours.encode(text))


def _change(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(changes)


def _change_model(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"].update(changes)


@pytest.mark.parametrize(
    ("change", "named", "parts"),
    [
        (None, NAMED[:3], ("4 different special tokens",)),
        (None, [*NAMED[:3], "<|none|>"], ("4 different special tokens",)),
        (None, [*NAMED[:3], "the"], ("'the' is not a special token", "<|end|>")),
        (_change(model={}), NAMED, ("damaged or no BPE tokenizer",)),
        (_change_model(type="Unigram"), NAMED, ("its model is Unigram", "only BPE of bytes")),
        (_change(normalizer={"type": "Lowercase"}), NAMED, ("it changes texts (Lowercase)",)),
        (_change(pre_tokenizer=None), NAMED, ("does not split texts into bytes",)),
        (
            _change(
                pre_tokenizer={
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                }
            ),
            NAMED,
            ("adds a space",),
        ),
        (
            lambda c: [c["model"]["vocab"].update(none=c["model"]["vocab"].pop("Z"))],
            NAMED,
            ("no tokens for 1 bytes",),
        ),
        (_change(decoder=None), NAMED, ("does not come back",)),
        (_change_model(merges=[["no", "merge"]]), NAMED, ("damaged",)),
        (lambda c: c["model"]["vocab"].update(more=999), NAMED, ("gaps",)),
        (lambda c: c["model"]["vocab"].pop("Z"), NAMED, ("gaps",)),
        (lambda c: c["added_tokens"][-1].update(lstrip=True), NAMED, ("takes the spaces",)),
        (lambda c: c["added_tokens"][-1].update(content="<s>"), NAMED, ("a token <s> besides",)),
    ],
)
def test_tokenizers_that_cannot_be_taken_are_refused(
    change: Callable[[dict[str, Any]], None] | None, named: list[str] | None, parts: tuple[str, ...]
) -> None:
    content = json.loads(train_tokenizer().to_str())
    if change is not None:
        change(content)
    with pytest.raises(TextError) as caught:
        adopt_tokenizer(json.dumps(content), named, OURS)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
