"""Documents as rows of T + 1 tokens, at random access."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from m3jax.errors import TextError
from m3jax.text.corpus import Corpus
from m3jax.text.tokenizer import BOS, PAD


class Row(NamedTuple):
    """Row of documents: inputs are `tokens[:-1]`, targets `tokens[1:]`."""

    tokens: Int[np.ndarray, T + 1]
    weights: Float[np.ndarray, T]  # of each target; 0 for padding, `<s>` and spans without loss
    references: tuple[str, ...]  # keys stored with the document, one per chunk of the row, or ()
    chunk_length: int

    @property
    def inputs(self) -> np.ndarray:
        """Tokens that are fed to the model."""
        return self.tokens[:-1]

    @property
    def targets(self) -> np.ndarray:
        """Tokens that are predicted."""
        return self.tokens[1:]

    def queries(self, shift: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields chunks that search: number, tokens of the query, tokens of the whole row."""
        Q = self.chunk_length
        for chunk in range(shift, len(self.inputs) // Q):
            low = (chunk - shift) * Q
            yield chunk, self.tokens[low : low + Q], self.tokens


class Rows:
    """All rows of a corpus, numbered.

    Args:
      corpus: token documents.
      sequence_length: tokens T of a row.
      chunk_length: tokens Q of a chunk, which divides T.
      packing: `concat` puts the documents one after the other and cuts every T tokens; the last,
        incomplete row is left out. `document` gives each document ⌈(n − 1)/T⌉ rows of its own,
        padded.

    Attributes:
      chunks: of a row.
      slots: places for answers in a row: none.

    Raises:
      TextError: the corpus does not fill one row.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, chunk_length: int, packing: str):
        self.corpus, self.sequence_length, self.chunk_length = corpus, sequence_length, chunk_length
        self.packing, self.chunks, self.slots = packing, sequence_length // chunk_length, 0
        lengths = np.asarray(corpus.lengths, np.int64)
        if packing == "concat":
            self._starts = np.concatenate([[0], np.cumsum(lengths)])
            self._count = int((self._starts[-1] - 1) // sequence_length)
        else:
            per_document = -(-np.maximum(lengths - 1, 0) // sequence_length)
            self._starts = np.concatenate([[0], np.cumsum(per_document)])
            self._count = int(self._starts[-1])
        if self._count < 1:
            raise TextError(
                f"the corpus has {int(lengths.sum())} tokens, too few for one row of"
                f" {sequence_length}; prepare more text or lower config.data.sequence_length"
            )

    def __len__(self) -> int:
        return self._count

    def document_of(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Returns the number of the document that each row begins in."""
        starts = rows * self.sequence_length if self.packing == "concat" else rows
        return np.searchsorted(self._starts, starts, side="right") - 1

    def __getitem__(self, index: int) -> Row:
        return self._concatenated(index) if self.packing == "concat" else self._own(index)

    def _concatenated(self, index: int) -> Row:
        start, need = index * self.sequence_length, self.sequence_length + 1
        document = int(np.searchsorted(self._starts, start, side="right")) - 1
        tokens, weights = [], []
        while need:
            item = self.corpus[document]
            low = start - int(self._starts[document])
            part = slice(low, low + need)
            tokens.append(item.tokens[part])
            weights.append(_weights(item)[part])
            need -= len(tokens[-1])
            document += 1
            start = int(self._starts[document])
        joined = np.concatenate(tokens), np.concatenate(weights)[1:]
        return Row(*joined, (), self.chunk_length)

    def _own(self, index: int) -> Row:
        document = int(np.searchsorted(self._starts, index, side="right")) - 1
        item = self.corpus[document]
        number = index - int(self._starts[document])
        part = slice(number * self.sequence_length, (number + 1) * self.sequence_length + 1)
        tokens = np.full(self.sequence_length + 1, PAD, np.int32)
        weights = np.zeros(self.sequence_length + 1, np.float32)
        length = len(item.tokens[part])
        tokens[:length] = item.tokens[part]
        weights[:length] = _weights(item)[part]
        keys = item.references[number * self.chunks : (number + 1) * self.chunks]
        return Row(tokens, weights[1:], keys, self.chunk_length)


def _weights(item: Any) -> np.ndarray:
    weights = np.ones(len(item.tokens), np.float32) if item.weights is None else item.weights
    return np.where(item.tokens == BOS, np.float32(0), weights)
