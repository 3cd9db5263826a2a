"""When memories are recalled, with which query, and which tokens they shape (Memory³ §3.5).

The prompt is cut into chunks; each retrieves with its own text and reads what it finds. The first
generated chunk inherits the memories of the last prompt chunk. After every chunk of generated
tokens these are the next query, and what it finds replaces the memories.
"""

from __future__ import annotations

from typing import NamedTuple


class Recall(NamedTuple):
    """One recall of a row. Tokens are counted from the row's first, the prompt's BOS.

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


def schedule(prompt: int, new: int, chunk: int) -> list[Recall]:
    """All recalls of a row.

    Args:
      prompt: tokens of the prompt, BOS included, ≥ 1.
      new: tokens that are generated.
      chunk: tokens Q of a chunk.
    """
    starts = range(0, prompt, chunk)
    recalls = [
        Recall((low, min(low + chunk, prompt)), (low, min(low + chunk, prompt)), (prompt, prompt))
        for low in starts
    ]
    first = recalls[-1]
    inherits = min(new, chunk)
    recalls[-1] = Recall(
        first.query,
        (first.read_by[0], max(first.read_by[1], prompt + inherits - 1)),
        (prompt, prompt + inherits),
    )
    for low in range(prompt + chunk, prompt + new, chunk):
        high = min(low + chunk, prompt + new)
        recalls.append(Recall((low - chunk, low), (low - 1, high - 1), (low, high)))
    return recalls
