"""Retrieval of memories for chunks: its schedule in a row (Memory³ §3.5), the search, the read.

The prompt is cut into chunks; each retrieves with its own text and reads what it finds. The first
generated chunk inherits the memories of the last prompt chunk. After every chunk of generated
tokens these are the next query, and the memories are replaced.
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
    """One retrieval of a row. Tokens are counted from the row's first, the prompt's BOS.

    Attributes:
      query: tokens `[first, last)` whose text retrieves.
      read_by: tokens `[first, last)` that are fed to the model while its memories are in front: the
        prediction made at each of them reads them.
      generates: tokens `[first, last)` that are generated so; none in all but the last prompt
        chunk.
    """

    query: tuple[int, int]
    read_by: tuple[int, int]
    generates: tuple[int, int]


def retrieval_schedule(prompt: int, new: int, chunk: int) -> list[MemoryRetrieval]:
    """Returns all retrievals of a row.

    Args:
      prompt: tokens of the prompt, BOS included, ≥ 1.
      new: tokens that are generated.
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
    """Finds and loads the memories of chunks.

    Attributes:
      costs: since the start: `memories` read, none (−1) not counted, and their `bytes` as they are
        stored; `search_seconds` and `read_seconds` of the host.
    """

    def __init__(
        self, retriever: Retriever | None, memories: MemoryReader, tokenizer: Tokenizer, count: int
    ) -> None:
        """Takes the search and the bank of the same references.

        Args:
          retriever: finds references; None where a subclass searches by itself.
          memories: of the same references.
          tokenizer: of the model.
          count: memories M of a chunk.
        """
        self.retriever, self.memories, self.tokenizer = retriever, memories, tokenizer
        self.count = count
        names = ("memories", "bytes", "search_seconds", "read_seconds")
        self.costs: dict[str, float] = dict.fromkeys(names, 0)

    def text(self, tokens: np.ndarray) -> str:
        """Returns a chunk as a query; special tokens have no text."""
        return self.tokenizer.decode(tokens.tolist())

    def find(
        self,
        chunks: Sequence[np.ndarray],
        rows: Sequence[int],
        against: Sequence[np.ndarray] | None = None,
    ) -> tuple[Int[np.ndarray, "n M"], list[str]]:
        """Searches references `(n, M)` of chunks, −1 where there is none; returns the queries, too.

        Args:
          chunks: tokens of each; an empty one finds nothing.
          rows: number of the prompt that each belongs to.
          against: for each the tokens that no reference may contain (the overlap filter); None lets
            all pass.
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
        """References of texts; `rows` and `against` as in `find`."""
        assert self.retriever is not None
        return self.retriever.retrieve(queries, against, self.count)

    def read(self, ids: Int[np.ndarray, "*shape"]) -> ExplicitMemory:
        """Reads memories as they are stored, `(L, *shape, K, P, width)`."""
        begin = time.perf_counter()
        memory = self.memories.read_stored(ids)
        number = int((ids >= 0).sum())
        self.costs["memories"] += number
        self.costs["bytes"] += number * (2 * memory.keys.nbytes // max(ids.size, 1))
        self.costs["read_seconds"] += time.perf_counter() - begin
        return memory
