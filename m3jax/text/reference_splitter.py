"""Splitter of documents into references, at paragraph ends where possible."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from m3jax.errors import TextError
from m3jax.text.documents import Document
from m3jax.text.tokenizer import Tokenizer

SHORTEST = 4  # most tokens (UTF-8 bytes) of one character, so any character fits

_SPACE = re.compile(r"[^\S\x1c-\x1f]")  # white space in the tokenizer's pattern
_SPACES = re.compile(r"\s+")
_PARAGRAPHS = re.compile(r"\n")
# After a full stop and closing quotes before white space, or after a CJK full stop.
_SENTENCES = re.compile(r"""[.!?…]["'”’»)\]]*(?=\s)|[。!?][”’」』)]*""")


@dataclass(frozen=True)
class Piece:
    """Holds a reference without key: `text` is characters `[start, end)` of its document."""

    start: int
    end: int
    text: str
    tokens: Int32[np.ndarray, " W"]


def cut_references(document: Document, tokenizer: Tokenizer, length: int) -> list[Piece]:
    """Cuts a document into pieces of at most `length` ≥ 4 tokens, in order, without overlap.

    Whole paragraphs (lines) are joined while they fit. A paragraph that is too long for one piece
    is cut at sentence ends, a sentence that is too long at white space, and a word that is too long
    anywhere. Only white space at the ends of a piece is dropped. A piece's tokens are those of its
    text encoded on its own. Raises `TextError` for `length` < 4, too short for some characters.
    """
    if length < SHORTEST:
        what = f"references of {length} tokens cannot hold any character"
        raise TextError(f"{what}; use ≥ {SHORTEST}")
    text = document.text
    ids, offsets = tokenizer.encode_with_offsets(text)
    # int64 as the numbers looked up in them, or each look-up would convert them all.
    token_starts, token_ends = offsets.T.astype(np.int64)
    skip_space = _space_skipper(text)
    breaks = _breaks(text, token_starts, token_ends, length, skip_space)

    def reach(start: int, most: int) -> int:
        """Returns the end of a piece from `start` that has at most `most` document tokens."""
        after = np.searchsorted(token_ends, start, "right") + max(most, 0)
        limit = int(token_starts[after]) if after < len(token_starts) else len(text)
        # White space after the limit is trimmed, so a break behind it can be used, too.
        place = bisect.bisect_right(breaks, skip_space(limit))
        if place and breaks[place - 1] > start:
            return breaks[place - 1]
        space = next((i for i in range(limit, start, -1) if text[i].isspace()), limit)
        return max(space, start + 1)

    def encode(start: int, end: int) -> np.ndarray:
        """Encodes `text[start:end]` on its own, reusing document tokens where they are equal.

        They are equal from the first white space on, unless a token there also covers characters
        in front of it, such as a full stop, or behind the end.
        """
        head = _SPACE.search(text, start, end)
        if head is None or (end < len(text) and not _SPACE.match(text, end)):
            return tokenizer.encode(text[start:end])
        first, last = np.searchsorted(token_starts, [head.start(), end], "left")
        if first == last or token_starts[first] != head.start() or token_ends[last - 1] > end:
            return tokenizer.encode(text[start:end])
        return np.concatenate([tokenizer.encode(text[start : head.start()]), ids[first:last]])

    pieces: list[Piece] = []
    start, most = skip_space(0), length
    while start < len(text):
        limit = reach(start, most)
        end = start + len(text[start:limit].rstrip())
        tokens = encode(start, end)
        if len(tokens) > length:  # without its leading space the first word has more tokens
            most -= len(tokens) - length
        else:
            pieces.append(Piece(start, end, text[start:end], tokens))
            start, most = skip_space(limit), length
    return pieces


def _breaks(
    text: str,
    token_starts: np.ndarray,
    token_ends: np.ndarray,
    length: int,
    skip_space: Callable[[int], int],
) -> list[int]:
    """Returns preferred ends of pieces: of paragraphs, and of sentences in long paragraphs."""
    ends: list[int] = []
    for start, end in _units(_PARAGRAPHS, text, 0, len(text)):
        content = text[start:end].strip()
        visible = skip_space(start)
        first = np.searchsorted(token_ends, visible, "right")
        last = np.searchsorted(token_starts, visible + len(content), "left")
        if last - first > length:
            ends += [unit_end for _, unit_end in _units(_SENTENCES, text, start, end)]
        else:
            ends.append(end)
    return ends


def _units(pattern: re.Pattern[str], text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields the intervals into which the ends of the matches divide `[start, end)`."""
    for match in pattern.finditer(text, start, end):
        yield start, match.end()
        start = match.end()
    if start < end:
        yield start, end


def _space_skipper(text: str) -> Callable[[int], int]:
    """Returns the function of a position that finds the first character there or behind it that is
    not white space; the text's length if there is none."""
    starts, ends = np.array([m.span() for m in _SPACES.finditer(text)], int).reshape(-1, 2).T.copy()

    def skip(position: int) -> int:
        run = int(np.searchsorted(starts, position, "right")) - 1
        return max(position, int(ends[run])) if run >= 0 else position

    return skip
