"""Schedule of memory retrieval in a row: queries, and the tokens that read (Memory³ §3.5).

The prompt is cut into chunks; each retrieves with its own text and reads what it finds. The first
generated chunk inherits the memories of the last prompt chunk. After every chunk of generated
tokens these are the next query, and the memories are replaced.
"""

from __future__ import annotations

from typing import NamedTuple


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
