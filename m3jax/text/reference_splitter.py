"""Splitter of documents into references that respect paragraph ends where they can."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from m3jax.errors import TextError
from m3jax.text.documents import Document
from m3jax.text.tokenizer import Tokenizer

SHORTEST = 4  # tokens of one character at most, so any character fits

_SPACE = re.compile(r"[^\S\x1c-\x1f]")  # what the tokenizer's pattern calls white space
_PARAGRAPHS = re.compile(r"\n")
# After a full stop and closing quotes before white space, or after a CJK full stop.
_SENTENCES = re.compile(r"""[.!?…]["'”’»)\]]*(?=\s)|[。!?][”’」』)]*""")


@dataclass(frozen=True)
class Piece:
    """Holds a reference before it has a key: `text` is `[start, end)` of the document's text."""

    start: int
    end: int
    text: str
    tokens: Int32[np.ndarray, " W"]


def cut_references(document: Document, tokenizer: Tokenizer, length: int) -> list[Piece]:
    """Cuts a document into pieces of at most `length` ≥ 4 tokens, in order, without overlap.

    Whole paragraphs (lines) are joined while they fit. A paragraph that is too long for one piece
    is cut at sentence ends, such a sentence at white space, such a word anywhere. White space at
    both ends of a piece is left out; nothing else is. A piece's tokens are those of its text alone.
    Raises `TextError` for a length below 4, in which a single character might not fit.
    """
    if length < SHORTEST:
        what = f"references of {length} tokens cannot hold any character"
        raise TextError(f"{what}; use ≥ {SHORTEST}")
    text = document.text
    ids, offsets = tokenizer.encode_with_offsets(text)
    token_starts, token_ends = offsets.T.copy()
    breaks = _breaks(text, token_starts, token_ends, length)

    def reach(start: int, most: int) -> int:
        """Returns the end of a piece from `start` with `most` of the document's tokens."""
        after = np.searchsorted(token_ends, start, "right") + max(most, 0)
        limit = int(token_starts[after]) if after < len(token_starts) else len(text)
        # White space behind the limit is trimmed away, so a break behind it is within reach.
        place = bisect.bisect_right(breaks, _skip_space(text, limit))
        if place and breaks[place - 1] > start:
            return breaks[place - 1]
        space = next((i for i in range(limit, start, -1) if text[i].isspace()), limit)
        return max(space, start + 1)

    def encode(start: int, end: int) -> np.ndarray:
        """Encodes `text[start:end]` alone, with the document's tokens where they are equal.

        No word crosses from a sign to white space, so behind the first white space they are.
        """
        head = _SPACE.search(text, start, end)
        if head is None or (end < len(text) and not _SPACE.match(text, end)):
            return tokenizer.encode(text[start:end])
        first, last = np.searchsorted(token_starts, [head.start(), end], "left")
        return np.concatenate([tokenizer.encode(text[start : head.start()]), ids[first:last]])

    pieces: list[Piece] = []
    start, most = _skip_space(text, 0), length
    while start < len(text):
        limit = reach(start, most)
        end = start + len(text[start:limit].rstrip())
        tokens = encode(start, end)
        if len(tokens) > length:  # its first word lost a space and became more tokens
            most -= len(tokens) - length
        else:
            pieces.append(Piece(start, end, text[start:end], tokens))
            start, most = _skip_space(text, limit), length
    return pieces


def _breaks(text: str, token_starts: np.ndarray, token_ends: np.ndarray, length: int) -> list[int]:
    """Returns positions where a piece may end: of paragraphs, of sentences in too long ones."""
    ends: list[int] = []
    for start, end in _units(_PARAGRAPHS, text, 0, len(text)):
        content = text[start:end].strip()
        first = np.searchsorted(token_ends, _skip_space(text, start), "right")
        last = np.searchsorted(token_starts, _skip_space(text, start) + len(content), "left")
        if last - first > length:
            ends += [unit_end for _, unit_end in _units(_SENTENCES, text, start, end)]
        else:
            ends.append(end)
    return ends


def _units(pattern: re.Pattern[str], text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields parts of `[start, end)`, each up to the end of a match; the last one up to `end`."""
    for match in pattern.finditer(text, start, end):
        yield start, match.end()
        start = match.end()
    if start < end:
        yield start, end


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
