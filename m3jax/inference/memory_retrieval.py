"""Retrieval of memories for chunks: a search, then a read of the bank or a write; with costs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from m3jax.memory.reader import MemoryReader
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.retrieval.retriever import Retriever
from m3jax.text.tokenizer import Tokenizer


@dataclasses.dataclass
class RetrievalCosts:
    """Costs of memory retrieval since the start.

    Attributes:
      queries: texts that were searched for.
      memories: that were read, none (−1) not counted.
      bytes: of these, as they are stored.
      search_seconds, read_seconds: of the host.
    """

    queries: int = 0
    memories: int = 0
    bytes: int = 0
    search_seconds: float = 0.0
    read_seconds: float = 0.0


class MemoryRetriever:
    """Finds and loads the memories of chunks.

    Attributes:
      costs: since the start.
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
        self.count, self.costs = count, RetrievalCosts()

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
        self.costs.queries += len(places)
        self.costs.search_seconds += time.perf_counter() - begin
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
        self.costs.memories += number
        keys: Any = memory.keys
        self.costs.bytes += number * (2 * keys.nbytes // max(ids.size, 1))
        self.costs.read_seconds += time.perf_counter() - begin
        return memory
