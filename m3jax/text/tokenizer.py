"""Byte-level BPE tokenizer with four special tokens; any text is encoded without loss."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import decoders, models, pre_tokenizers, trainers

from m3jax.errors import TextError
from m3jax.failures import raise_if_machine
from m3jax.files import digest, json_text, write_atomically
from m3jax.text.byte_fallback import SPACE
from m3jax.workdir import remedy

PAD, BOS, REFERENCE, END = 0, 1, 2, 3
SPECIAL_TOKENS = ("<pad>", "<s>", "<reference>", "</s>")
SMALLEST = len(SPECIAL_TOKENS) + 256  # special tokens and bytes: a tokenizer without merges

_FILE = "tokenizer.json"
_MANIFEST = "manifest.json"
_WORD_ENDS = re.compile(
    r"[^\W\d_](?=\n| [^\W\d_])"
)  # a letter before a line feed, or a space and a letter
_BLOCK = 1 << 20  # characters of a text that are tokenized at once, about: bounds RAM

Tokens = Int32[np.ndarray, "_"]  # of any length


class Tokenizer:
    """Encodes and decodes text with a byte-level BPE. Safe to use from several threads.

    A *word* is a run of letters, of digits or of other characters, with the space before it (the
    pattern of GPT-2). Merges never cross word borders, so `N217` is two words, and `word` at the
    start of a text is a different token from ` word` within it.

    Attributes:
      size: number of vocabulary entries, special tokens included.
      fingerprint: hex hash of the saved JSON.
      lacking: bytes without tokens, which are left out of texts; none in trained tokenizers.
      prefix: `[BOS, REFERENCE]`, set before every reference, as `<s>Reference:` in Memory³ §3.3.
    """

    def __init__(self, json_text: str) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
        self._tokenizer.encode_special_tokens = (
            True  # "<s>" within a text is three plain characters
        )
        self._json = json_text
        self.size: int = self._tokenizer.get_vocab_size()
        self.fingerprint: str = digest(json_text)
        self.prefix: np.ndarray = np.array([BOS, REFERENCE], np.int32)
        self.lacking: bytes = _lacking_bytes(self._tokenizer)
        self._lost = SPACE if self._tokenizer.model.byte_fallback else ""
        first = tuple(self._tokenizer.id_to_token(i) for i in range(len(SPECIAL_TOKENS)))
        if first != SPECIAL_TOKENS:
            raise TextError(f"the tokenizer begins with {first}; expected {SPECIAL_TOKENS}")

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocabulary: int,
        min_frequency: int,
        most_bytes: int | None = None,
    ) -> Tokenizer:
        """Learns merges from texts, read once; the same texts give the same tokenizer.

        Raises `TextError` if all texts are empty or `vocabulary` < 260.

        Args:
          texts: training texts.
          vocabulary: most entries, special tokens included.
          min_frequency: least count of a pair to be merged.
          most_bytes: UTF-8 bytes of text to read; None = all.
        """
        if vocabulary < SMALLEST:
            raise TextError(
                f"a tokenizer of {vocabulary} entries cannot hold 256 bytes and"
                f" {len(SPECIAL_TOKENS)} special tokens; set text.vocabulary ≥ {SMALLEST}"
            )
        tokenizer = tokenizers.Tokenizer(models.BPE())
        splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
        tokenizer.pre_tokenizer = splitter
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            min_frequency=min_frequency,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        blocks = filter(None, _limited(texts, most_bytes))
        first = next(blocks, None)
        if first is None:
            raise TextError("no text to train a tokenizer on; the documents are empty")
        tokenizer.train_from_iterator(itertools.chain([first], blocks), trainer)
        return cls(tokenizer.to_str())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` (readable by `tokenizers`), then `manifest.json`."""
        content = {"kind": "tokenizer", "fingerprint": self.fingerprint, "size": self.size}
        write_atomically(Path(folder) / _FILE, self._json.encode())
        write_atomically(Path(folder) / _MANIFEST, json_text(content, indent=1).encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Loads a tokenizer that `save` wrote; `TextError` if a file is missing or damaged."""
        path, manifest = Path(folder) / _FILE, Path(folder) / _MANIFEST
        for needed in (path, manifest):
            if not needed.is_file():
                raise TextError(f"no tokenizer: {needed} is missing; run launch/prepare.py")
        try:
            text = path.read_bytes().decode()
            expected = json.loads(manifest.read_bytes())["fingerprint"]
            if digest(text) != expected:
                raise ValueError("its bytes are not those that were saved")
            return cls(text)
        except TextError:  # intact, but not of our layout
            raise
        except Exception as error:  # the tokenizers library raises plain Exception
            raise_if_machine(error)
            raise TextError(
                f"{path} is damaged ({error}), or {manifest} is; {remedy(folder)}"
            ) from error

    def encode(self, text: str) -> Tokens:
        """Encodes a text without special tokens, even for `"</s>"`.

        `decode` returns the text exactly, unless it has characters that are `lost`.
        """
        return self.encode_batch([text])[0]

    def lost(self, text: str) -> int:
        """Counts the characters of a text that have bytes without tokens, or stand for a space.

        `decode` returns U+FFFD in the place of such a character, or nothing; and a space for
        U+2581, as which a tokenizer with byte fallback writes spaces.
        """
        if self._lost:
            return text.count(self._lost)
        data = text.encode()
        if len(data.translate(None, self.lacking)) == len(data):
            return 0
        return sum(not set(self.lacking).isdisjoint(character.encode()) for character in text)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Encodes every text, in parallel over the cores."""
        blocks = [list(_blocks(text)) for text in texts]
        flat = [block for parts in blocks for block in parts]
        encodings = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        ids = [[np.array(next(encodings).ids, np.int32) for _ in parts] for parts in blocks]
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in ids]

    def encode_with_offsets(
        self, text: str
    ) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, "T 2"]]:
        """Encodes a text; returns its tokens and the characters `[start, end)` that each covers.

        All tokens of a character that needs several have that character's span; together the spans
        cover the text without gaps, except for characters all of whose bytes lack tokens.
        """
        ids, spans, start = [], [], 0
        for block in _blocks(text):
            encoding = self._tokenizer.encode(block, add_special_tokens=False)
            ids.append(np.array(encoding.ids, np.int32))
            spans.append(np.array(encoding.offsets, np.int32).reshape(-1, 2) + np.int32(start))
            start += len(block)
        return np.concatenate(ids), np.concatenate(spans)

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """Decodes tokens to text; special tokens are skipped, broken UTF-8 becomes U+FFFD.

        Raises `TextError` for a token that is not in the vocabulary.
        """
        tokens = [int(i) for i in ids]
        wrong = next((token for token in tokens if not 0 <= token < self.size), None)
        if wrong is not None:
            raise TextError(f"token {wrong} is outside the tokenizer's {self.size} entries")
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def _lacking_bytes(tokenizer: tokenizers.Tokenizer) -> bytes:
    """Returns the bytes that a byte-level BPE has no tokens for; b"" with byte fallback."""
    if tokenizer.model.byte_fallback:
        return b""
    return bytes(
        byte
        for byte, character in enumerate(_byte_characters())
        if tokenizer.token_to_id(character) is None
    )


def _byte_characters() -> list[str]:
    """Returns the character by which byte-level BPE writes each byte.

    Printable bytes of Latin-1 stand for themselves, the others are U+0100, U+0101, … in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _limited(texts: Iterable[str], most_bytes: int | None) -> Iterator[str]:
    """Yields blocks (`_blocks`) of texts, up to `most_bytes` UTF-8 bytes in total."""
    left = sys.maxsize if most_bytes is None else most_bytes
    for block in (block for text in texts for block in _blocks(text)):
        data = block.encode()
        if len(data) >= left:
            yield data[:left].decode("utf-8", "ignore")
            return
        left -= len(data)
        yield block


def _blocks(text: str) -> Iterator[str]:
    """Yields blocks of a text whose tokens, concatenated, are the tokens of the whole text.

    Long texts are cut behind a letter that a line feed, or a space and a letter follow: words end
    there in all patterns that split texts for byte-level BPE.
    """
    start = 0
    while len(text) - start > _BLOCK:
        end = _WORD_ENDS.search(text, start + _BLOCK)
        if end is None:
            break
        yield text[start : end.start() + 1]
        start = end.start() + 1
    yield text[start:] if start else text
