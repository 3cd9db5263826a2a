"""Retrieves memories for the chunks of a row: schedule (Memory³ §3.5), search and reading.

Each chunk of the prompt retrieves with its own text and reads the memories of the retrieved
references. The first generated chunk reads the memories of the last prompt chunk. Every later chunk
reads memories that were retrieved with the text of the generated chunk before it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from m3jax.memory.reader import MemoryReader
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.retrieval.retriever import Retriever
from m3jax.text.tokenizer import Tokenizer


class MemoryRetrieval(NamedTuple):
    """Retrieval for one chunk of a row; token positions count from the row's BOS.

    Attributes:
      query: positions `[first, last)` of the text that is the query.
      read_by: positions `[first, last)` of the input tokens whose predictions read the memories.
      generates: positions `[first, last)` of the tokens that these predictions generate; empty for
        prompt chunks before the last.
    """

    query: tuple[int, int]
    read_by: tuple[int, int]
    generates: tuple[int, int]


def retrieval_schedule(prompt: int, new: int, chunk: int) -> list[MemoryRetrieval]:
    """Returns the retrievals of a row, in order.

    Args:
      prompt: number of prompt tokens with BOS, at least 1.
      new: number of tokens to generate.
      chunk: tokens Q of a chunk.
    """
    spans = [(low, min(low + chunk, prompt)) for low in range(0, prompt, chunk)]
    retrievals = [MemoryRetrieval(span, span, (prompt, prompt)) for span in spans]
    low, high = spans[-1]
    end = prompt + min(new, chunk)
    retrievals[-1] = MemoryRetrieval((low, high), (low, max(high, end - 1)), (prompt, end))
    for low in range(prompt + chunk, prompt + new, chunk):
        high = min(low + chunk, prompt + new)
        retrievals.append(MemoryRetrieval((low - chunk, low), (low - 1, high - 1), (low, high)))
    return retrievals


class MemoryRetriever:
    """Retrieves and loads the memories of chunks.

    Attributes:
      costs: totals since the start: `memories` read (without −1), their `bytes` as stored, and
        `search_seconds` and `read_seconds` of the host.
    """

    def __init__(
        self, retriever: Retriever | None, memories: MemoryReader, tokenizer: Tokenizer, count: int
    ) -> None:
        """Combines a retriever with a reader of the memories of the same references.

        Args:
          retriever: searches references; None if a subclass overrides `_search`.
          memories: reader of their memories.
          tokenizer: of the model.
          count: memories M of a chunk.
        """
        self.retriever, self.memories, self.tokenizer = retriever, memories, tokenizer
        self.count = count
        names = ("memories", "bytes", "search_seconds", "read_seconds")
        self.costs: dict[str, float] = dict.fromkeys(names, 0)

    def text(self, tokens: np.ndarray) -> str:
        """Returns the query of a chunk: its text, without special tokens."""
        return self.tokenizer.decode(tokens.tolist())

    def find(
        self,
        chunks: Sequence[np.ndarray],
        rows: Sequence[int],
        against: Sequence[np.ndarray] | None = None,
    ) -> tuple[Int[np.ndarray, "n M"], list[str]]:
        """Retrieves references for chunks; returns their ids `(n, M)`, −1 = none, and the queries.

        Args:
          chunks: tokens of each chunk; an empty chunk retrieves nothing.
          rows: for each chunk the number of its prompt.
          against: for each chunk the tokens that no reference may contain (the overlap filter);
            None = no filter.
        """
        begin = time.perf_counter()
        queries = [self.text(chunk) for chunk in chunks]
        ids = np.full((len(queries), self.count), -1, np.int64)
        places = [place for place, query in enumerate(queries) if query.strip()]
        if places:
            texts = None if against is None else [against[i] for i in places]
            ids[places] = self._search(
                [queries[i] for i in places], [rows[i] for i in places], texts
            )
        self.costs["search_seconds"] += time.perf_counter() - begin
        return ids, queries

    def _search(
        self, queries: list[str], rows: list[int], against: list[np.ndarray] | None
    ) -> Int[np.ndarray, "n M"]:
        """Returns reference ids for queries; `rows` and `against` as in `find`."""
        assert self.retriever is not None
        return self.retriever.retrieve(queries, against, self.count)

    def read(self, ids: Int[np.ndarray, "*shape"]) -> ExplicitMemory:
        """Reads memories as they are stored, `(L, *shape, K, P, width)`, and adds to `costs`."""
        begin = time.perf_counter()
        memory = self.memories.read_stored(ids)
        number = int((ids >= 0).sum())
        self.costs["memories"] += number
        self.costs["bytes"] += number * (2 * memory.keys.nbytes // max(ids.size, 1))
        self.costs["read_seconds"] += time.perf_counter() - begin
        return memory
