"""Rows that hold several whole chats, or pairs of them, that do not see each other.

A chat of n tokens takes n − 1 places: its targets are its own tokens. Where the rows are packed is
a function of the lengths alone; best fit decreasing leaves little padding.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from m3jax.errors import TextError
from m3jax.text.corpus import Corpus
from m3jax.text.tokenizer import PAD


def pack(sizes: Sequence[int] | np.ndarray, room: int) -> list[list[int]]:
    """Groups items whose sizes add up to at most `room`: best fit decreasing.

    The largest item first, each into the fullest group that it fits; of equal ones the first made.
    At most 11/9 of the fewest groups possible, plus one (Johnson 1974).

    Args:
      sizes: of every item, 1 … room.
      room: of a group.

    Returns:
      Numbers of the items of every group, ascending; groups in the order of their first item.
    """
    order = np.argsort(-np.asarray(sizes, np.int64), kind="stable")
    groups: list[list[int]] = []
    left: list[int] = []  # different amounts of room that are left, ascending
    waiting: dict[int, list[int]] = {}  # groups with so much room left, newest first
    for item in order.tolist():
        size = int(sizes[item])
        place = bisect.bisect_left(left, size)
        if place == len(left):
            group, rest = len(groups), room
            groups.append([])
        else:
            rest = left[place]
            group = waiting[rest].pop()
            if not waiting[rest]:
                del waiting[rest], left[place]
        groups[group].append(item)
        rest -= size
        if rest:
            if rest not in waiting:
                bisect.insort(left, rest)
                waiting[rest] = []
            bisect.insort(waiting[rest], group, key=lambda g: -g)
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])


@dataclass(frozen=True)
class PackedRow:
    """Row of several texts; see `m3jax.model.attention_mask.Packing`.

    Attributes:
      inputs, targets, weights: tokens, their next tokens, and the weights of these.
      starts, first_chunks: of the text of every token. Padding is a text that reads no memory.
      answers: slot of the answer that a target belongs to, −1 for none; of pairs.
      keys: of the reference that every chunk reads, where the chats say so; else ().
      texts: tokens of every text and the number of its first chunk.
      chunk_length: tokens Q of a chunk.
    """

    inputs: Int[np.ndarray, " T"]
    targets: Int[np.ndarray, " T"]
    weights: Float[np.ndarray, " T"]
    starts: Int[np.ndarray, " T"]
    first_chunks: Int[np.ndarray, " T"]
    answers: Int[np.ndarray, " T"]
    keys: tuple[str, ...]
    texts: tuple[tuple[np.ndarray, int], ...]
    chunk_length: int

    @property
    def references(self) -> tuple[str, ...]:
        """Keys stored with the chats, one per chunk of the row."""
        return self.keys

    def queries(self, shift: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields chunks that search: number, tokens of the query, tokens of the whole text."""
        Q = self.chunk_length
        for tokens, first in self.texts:
            for chunk in range(shift, -(-(len(tokens) - 1) // Q)):
                low = (chunk - shift) * Q
                yield first + chunk, tokens[low : low + Q], tokens


class PackedRows:
    """All rows of chats or pairs, numbered.

    Attributes:
      chunks: places for chunks in a row: as many as the fullest has.
      slots: places for answers in a row, two for each pair; 0 for chats.
      padding: share of the places that hold nothing.
      plan: numbers of the chats (or pairs) of every row.
    """

    def __init__(
        self, corpus: Corpus, sequence_length: int, chunk_length: int, packing: str
    ) -> None:
        """Packs chats or pairs into rows.

        Args:
          corpus: of `prepare_chats`.
          sequence_length: tokens T of a row.
          chunk_length: tokens Q of a chunk.
          packing: `chats` or `pairs`; a pair's two chats are neighbours in one row.

        Raises:
          TextError: a chat, or a pair, is longer than a row.
        """
        self.corpus, self.sequence_length, self.chunk_length = corpus, sequence_length, chunk_length
        self._pairs = packing == "pairs"
        self._each = 2 if self._pairs else 1
        inputs = (np.asarray(corpus.lengths, np.int64) - 1).reshape(-1, self._each)
        sizes = inputs.sum(axis=1)
        if sizes.max() > sequence_length:
            raise TextError(
                f"{corpus.folder} holds {packing} of {sizes.max()} tokens, more than a row of"
                f" config.data.sequence_length = {sequence_length}; prepare it again with this row"
                " length"
            )
        self.plan = pack(sizes, sequence_length)
        chunks = (-(-inputs // chunk_length)).sum(axis=1)
        self.chunks = max(int(chunks[group].sum()) for group in self.plan)
        self.slots = 2 * max(map(len, self.plan)) if self._pairs else 0
        self.padding = 1 - float(sizes.sum()) / (len(self.plan) * sequence_length)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> PackedRow:
        T, Q = self.sequence_length, self.chunk_length
        inputs, targets = np.full((2, T), PAD, np.int32)
        weights = np.zeros(T, np.float32)
        starts, first_chunks, answers = np.zeros((3, T), np.int32)
        place = chunk = 0
        texts, keys = [], []
        numbers = [n * self._each + i for n in self.plan[index] for i in range(self._each)]
        for slot, number in enumerate(numbers):
            item = self.corpus[number]
            assert item.weights is not None
            end = place + len(item.tokens) - 1
            inputs[place:end], targets[place:end] = item.tokens[:-1], item.tokens[1:]
            weights[place:end] = item.weights[1:]
            starts[place:end], first_chunks[place:end] = place, chunk
            answers[place:end] = np.where(item.weights[1:] > 0, slot, -1)
            texts.append((item.tokens, chunk))
            count = -(-(end - place) // Q)
            keys += list(item.references or ("",) * count)
            place, chunk = end, chunk + count
        starts[place:], first_chunks[place:], answers[place:] = place, self.chunks, -1
        parts = (inputs, targets, weights, starts, first_chunks, answers)
        return PackedRow(*parts, tuple(keys), tuple(texts), Q)
