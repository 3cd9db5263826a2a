"""Tokenizers with byte fallback: tokens of theirs, texts that come back, offsets."""

import json
from typing import Any

import numpy as np
import pytest
from text.test_tokenizer_import import OURS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import trainers as bpe_trainers

from m3jax.errors import TextError
from m3jax.text.documents import Document
from m3jax.text.reference_splitter import cut_references
from m3jax.text.tokenizer import Tokenizer as OurTokenizer
from m3jax.text.tokenizer_import import adopt_tokenizer

WORDS = ["the otter of Kelo reads the words\n", "the words of the otter, the  cat"] * 3
TEXTS = [
    "the otter of Kelo\n\n  reads 12 na\u00efve words",
    "otter",
    " the  end ",
    "\u6c34\U0001f642\x00\t<s> <0x0A> </s>",
]


def byte_fallback_tokenizer(metaspace: bool) -> Tokenizer:
    """As the tokenizer.json of Llama 2, or with `metaspace` as that of later Mistrals."""
    trainer = bpe_trainers.BpeTrainer(vocab_size=100, show_progress=False)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(WORDS, trainer)
    learned = json.loads(learner.to_str())["model"]
    special = ["<unk>", "<s>", "</s>"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocabulary = {name: place for place, name in enumerate(names)}
    pairs = [tuple(pair) for pair in learned["merges"]]
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, **options))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return tokenizer


@pytest.mark.parametrize("metaspace", [False, True])
def test_tokens_are_theirs_and_texts_come_back(metaspace: bool) -> None:
    theirs = byte_fallback_tokenizer(metaspace)
    content, order, line_feed = adopt_tokenizer(theirs.to_str(), None, OURS, "</s>")
    ours, size = OurTokenizer(content), theirs.get_vocab_size()
    assert ours.size == size + 1 and line_feed == theirs.token_to_id("<0x0A>")
    assert order[:4].tolist() == [0, 1, -1, 2] and sorted(order)[1:] == list(range(size))
    theirs.encode_special_tokens = True
    for text in TEXTS:
        if not (metaspace and text.startswith(" ")):  # theirs then puts no space in front
            expected = theirs.encode(text, add_special_tokens=False).ids
            assert order[ours.encode(" " + text)].tolist() == expected
        ids, spans = ours.encode_with_offsets(text)
        np.testing.assert_array_equal(ids, ours.encode(text))
        assert ours.decode(ids) == text and not ours.lost(text)
        assert "".join(text[a:b] for a, b in np.unique(spans, axis=0)) == text
        for token, (a, b) in zip(ids, spans, strict=True):
            alone = ours.decode([token])
            assert alone == text[a:b] or alone == "\ufffd" and b == a + 1
    ids = ours.encode(TEXTS[2])  # parts of a text come back as well
    assert "".join(ours.decode([token]) for token in ids) == TEXTS[2]
    assert ours.lost("a\u2581b c") == 1 and ours.decode(ours.encode("a\u2581b")) == "a b"


def test_references_are_tokens_of_their_texts() -> None:
    ours = OurTokenizer(adopt_tokenizer(byte_fallback_tokenizer(False).to_str(), None, OURS).text)
    text = "the otter of Kelo.\nreads the words  of the otter,\n the cat. " * 5
    pieces = cut_references(Document("a", text), ours, 12)
    assert len(pieces) > 5
    for piece in pieces:
        np.testing.assert_array_equal(piece.tokens, ours.encode(piece.text))
        assert ours.decode(piece.tokens) == piece.text == text[piece.start : piece.end]


def _without_byte(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["other"] = vocabulary.pop("<0x07>")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (_without_byte, "no tokens for 1 of the 256 bytes"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), r"changes texts \(Lowercase\)"),
        (lambda c: c.update(normalizer=None), "does not write spaces"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "splits texts by Whitespace"),
    ],
)
def test_those_that_change_texts_are_refused(change: Any, part: str) -> None:
    content = json.loads(byte_fallback_tokenizer(False).to_str())
    change(content)
    with pytest.raises(TextError, match=part):
        adopt_tokenizer(json.dumps(content), None, OURS)
