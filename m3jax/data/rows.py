"""Rows with random access: cut from documents, or packed from whole chats or preference pairs.

Texts packed into a row do not attend to each other. A chat of n tokens takes n − 1 positions, since
its targets are its own tokens. Packing depends on the lengths alone; best fit decreasing leaves
little padding.
"""

from __future__ import annotations

import bisect
import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from m3jax.errors import TextError
from m3jax.model.attention_mask import Packing
from m3jax.text.corpus import Corpus
from m3jax.text.documents import ON
from m3jax.text.tokenizer import BOS, PAD


class Row(NamedTuple):
    """Row of one text, or of several packed texts; concatenated documents count as one text.

    Attributes:
      inputs, targets, weights: tokens, their next tokens, and the loss weights of the targets: 0
        for padding, `<s>` and spans without loss.
      references: keys of the references stored with the texts, one per chunk of the row, or ().
      texts: tokens of every text, without padding, and the index of its first chunk in the row.
      chunk_length: tokens Q of a chunk.
      packing: position of every packed text; padding is a text that reads no memory.
      answers: in packed rows, the slot of the answer that every target belongs to, −1 = none.
    """

    inputs: Int[np.ndarray, " T"]
    targets: Int[np.ndarray, " T"]
    weights: Float[np.ndarray, " T"]
    references: tuple[str, ...]
    texts: tuple[tuple[np.ndarray, int], ...]
    chunk_length: int
    packing: Packing | None = None
    answers: Int[np.ndarray, " T"] | None = None

    def queries(
        self, shift: int, without_loss: bool = False
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields every chunk that has a query: its index, the query's tokens, its text's tokens.

        The query is the chunk `shift` places earlier in the same text; if `without_loss`, only its
        tokens without loss where it has some, such as a question without its answer.
        """
        Q = self.chunk_length
        for tokens, first in self.texts:
            free = self._without_loss(tokens, first) if without_loss else np.zeros(0, bool)
            for chunk in range(shift, -(-(len(tokens) - 1) // Q)):
                low = (chunk - shift) * Q
                part = slice(low, low + Q)
                query = tokens[part]
                if free[part].any():
                    query = query[free[part]]
                yield first + chunk, query, tokens

    def _without_loss(self, tokens: np.ndarray, first: int) -> Bool[np.ndarray, " n"]:
        """Marks the tokens of the text that begins with chunk `first`, but `<s>`, without loss."""
        start = 0 if self.packing is None else int(np.argmax(self.packing.first_chunks == first))
        return np.append(False, self.weights[start : start + len(tokens) - 1] == 0)


class Rows:
    """Rows of a corpus of documents, by number.

    Args:
      corpus: tokenized documents.
      sequence_length: tokens T of a row.
      chunk_length: tokens Q of a chunk, which divides T.
      packing: `concat` concatenates the documents and cuts every T tokens; the last, incomplete row
        is left out. `document` gives a document of n tokens ⌈(n − 1)/T⌉ padded rows of its own.
      shares: number of shares into which the shards of the corpus are dealt. No row has documents
        of two shares.

    Attributes:
      chunks: chunks of a row.
      slots: answer slots of a row: 0.
      shares: the number of the first row of each share, and the number of rows.

    Raises:
      TextError: the corpus, or a share of it, does not fill one row.
    """

    def __init__(
        self,
        corpus: Corpus,
        sequence_length: int,
        chunk_length: int,
        packing: str,
        shares: int = 1,
    ) -> None:
        self.corpus, self.sequence_length, self.chunk_length = corpus, sequence_length, chunk_length
        self.packing, self.chunks, self.slots = packing, sequence_length // chunk_length, 0
        self._order, ends = _deal(corpus, shares)
        lengths = np.asarray(corpus.lengths, np.int64)
        if self._order is not None:
            lengths = lengths[self._order]
        if packing == "concat":
            self._starts = np.concatenate([[0], np.cumsum(lengths)])
            self._first_tokens = self._starts[[0, *ends]]
            counts = np.maximum(np.diff(self._first_tokens) - 1, 0) // sequence_length
        else:
            per_document = -(-np.maximum(lengths - 1, 0) // sequence_length)
            self._starts = np.concatenate([[0], np.cumsum(per_document)])
            counts = np.diff(self._starts[[0, *ends]])
        self.shares = np.concatenate([[0], np.cumsum(counts)])
        if counts.min() < 1:
            raise TextError(
                f"{corpus.folder} has {int(lengths.sum())} tokens, too few for one row of"
                f" {sequence_length}{f' in each of {shares} shares' if shares > 1 else ''}; prepare"
                " more text, for validation also with a larger config.text.validation_share, or"
                f" lower config.data.{'shares' if shares > 1 else 'sequence_length'}"
            )

    def __len__(self) -> int:
        return int(self.shares[-1])

    def fetch(self, shares: Iterable[int]) -> None:
        """Makes the shards of shares present on this host; see `Records.fetch`."""
        dealt = range(self.corpus.shards)
        self.corpus.fetch([i for share in shares for i in dealt[share :: len(self.shares) - 1]])

    def document_of(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Returns the number of the document in which each row begins."""
        return self._documents(self._place(rows)[0])

    def _documents(self, places: Any) -> Any:
        return places if self._order is None else self._order[places]

    def _place(self, rows: Any) -> tuple[Any, Any]:
        """Returns the place of the document in which a row begins, share after share, and the first
        of all tokens that it has; of rows of one document, its number."""
        starts = rows
        if self.packing == "concat":
            share = np.searchsorted(self.shares, rows, side="right") - 1
            starts = (rows - self.shares[share]) * self.sequence_length + self._first_tokens[share]
        return np.searchsorted(self._starts, starts, side="right") - 1, starts

    def __getitem__(self, index: int) -> Row:
        return self._concatenated(index) if self.packing == "concat" else self._own(index)

    def _concatenated(self, index: int) -> Row:
        place, start = map(int, self._place(index))
        need = self.sequence_length + 1
        tokens, weights = [], []
        while need:
            item = self.corpus[self._documents(place)]
            low = start - int(self._starts[place])
            part = slice(low, low + need)
            tokens.append(item.tokens[part])
            weights.append(_weights(item)[part])
            need -= len(tokens[-1])
            place += 1
            start = int(self._starts[place])
        tokens_, weights_ = np.concatenate(tokens), np.concatenate(weights)
        return self._row(tokens_, weights_, (), tokens_)

    def _own(self, index: int) -> Row:
        place, _ = self._place(index)
        item = self.corpus[self._documents(place)]
        number = index - int(self._starts[place])
        part = slice(number * self.sequence_length, (number + 1) * self.sequence_length + 1)
        tokens = np.full(self.sequence_length + 1, PAD, np.int32)
        weights = np.zeros(self.sequence_length + 1, np.float32)
        length = len(item.tokens[part])
        tokens[:length] = item.tokens[part]
        weights[:length] = _weights(item)[part]
        keys = _keys(item, self.chunk_length)
        keys = keys[number * self.chunks : (number + 1) * self.chunks]
        return self._row(tokens, weights, keys, tokens[:length])

    def _row(
        self, tokens: np.ndarray, weights: np.ndarray, keys: tuple[str, ...], text: np.ndarray
    ) -> Row:
        return Row(tokens[:-1], tokens[1:], weights[1:], keys, ((text, 0),), self.chunk_length)


def _deal(corpus: Corpus, shares: int) -> tuple[np.ndarray | None, list[int]]:
    """Returns the numbers of the documents, share after share, and where each share ends.

    Share i of n has the shards i, i + n, i + 2n, … For one share, the numbers are None.
    """
    count = len(corpus.lengths)
    if shares == 1:
        return None, [count]
    if corpus.shards < shares:
        raise TextError(
            f"{corpus.folder} has {corpus.shards} shards, too few for config.data.shares ="
            f" {shares}; prepare it again with config.text.shards of at least as many"
        )
    share = np.arange(count) % corpus.shards % shares
    return np.argsort(share, kind="stable"), np.cumsum(np.bincount(share)).tolist()


def _keys(item: Any, chunk_length: int) -> tuple[str, ...]:
    """Returns the keys of the references of a document's chunks, those of a last "*" as well."""
    keys = item.references
    if keys[-1:] != (ON,):
        return keys
    chunks = -(-(len(item.tokens) - 1) // chunk_length)
    return (*keys[:-1], *keys[-2:-1] * (chunks - len(keys) + 1))


def _weights(item: Any) -> np.ndarray:
    weights = np.ones(len(item.tokens), np.float32) if item.weights is None else item.weights
    return np.where(item.tokens == BOS, np.float32(0), weights)


def pack(sizes: Sequence[int] | np.ndarray, room: int) -> list[list[int]]:
    """Packs items into groups whose sizes add up to at most `room`, by best fit decreasing.

    Takes the items from largest to smallest and puts each into the fullest group that has room for
    it, of equally full groups into the oldest. Makes at most 11/9 of the fewest possible groups,
    plus one (Johnson 1974).

    Args:
      sizes: size of every item, 1 … room.
      room: capacity of a group.

    Returns:
      The item numbers of every group, ascending; groups in the order of their first item.
    """
    order = np.argsort(-np.asarray(sizes, np.int64), kind="stable")
    groups: list[list[int]] = []
    left: list[int] = []  # distinct amounts of free room, ascending
    waiting = defaultdict[int, list[int]](list)  # free room → heap of groups that have it
    for item in order.tolist():
        size = int(sizes[item])
        place = bisect.bisect_left(left, size)
        if place == len(left):
            group, rest = len(groups), room
            groups.append([])
        else:
            rest = left[place]
            group = heapq.heappop(waiting[rest])
            if not waiting[rest]:
                del left[place]
        groups[group].append(item)
        rest -= size
        if rest:
            if not waiting[rest]:
                bisect.insort(left, rest)
            heapq.heappush(waiting[rest], group)
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])


class PackedRows:
    """Rows packed from whole chats or preference pairs, by number.

    Attributes:
      chunks: chunk slots of a row: the largest number of chunks in any row.
      slots: answer slots of a row, two for each pair; 0 for chats.
      shares: as of `Rows`; there is one share.
      padding: share of the token positions that are padding.
      plan: numbers of the chats (or pairs) in every row.
    """

    def __init__(
        self, corpus: Corpus, sequence_length: int, chunk_length: int, packing: str
    ) -> None:
        """Packs chats or pairs into rows.

        Args:
          corpus: made by `prepare_chats`.
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
        self.shares = np.array([0, len(self.plan)])
        chunks = (-(-inputs // chunk_length)).sum(axis=1)
        self.chunks = max(int(chunks[group].sum()) for group in self.plan)
        self.slots = 2 * max(map(len, self.plan)) if self._pairs else 0
        self.padding = 1 - float(sizes.sum()) / (len(self.plan) * sequence_length)

    def __len__(self) -> int:
        return len(self.plan)

    def fetch(self, shares: Iterable[int]) -> None:
        """Does nothing: all chats are present."""

    def __getitem__(self, index: int) -> Row:
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
        places: tuple[Any, Any] = (starts, first_chunks)
        stored = tuple(keys), tuple(texts)
        return Row(inputs, targets, weights, *stored, Q, Packing(*places), answers)
