"""Memories with document context: packs references that are encoded together (Memory³ §10).

A window is a run of consecutive references of one document. A reference attends to the references
before it in its window; its memory is the keys and values of its own tokens, at the positions that
they would have if it were encoded alone. A document that is longer than a window is split into
several windows: each but the first begins with the document's first reference, which usually states
subject and title, and continues where the previous window ended. The tokens that a memory keeps are
selected by the queries of its own reference, so that a memory never depends on later text.

Windows are packed into rows of slots, one reference per slot. The packing depends on the reference
set alone, so that an interrupted build puts every reference into the same slot when it resumes.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64
from ml_collections import ConfigDict

# Defaults of entries that a layout may omit: references encoded alone, the same count for all
# heads, and RoPE in all layers.
UNSTATED = {
    "document_context_references": 1,
    "counts": "",
    "each": 0,
    "key_scale": 1.0,
    "no_rope_every": 0,
}

_BLOCK = 64  # rows that are filled together; a block is complete before the next begins


def window_references(config: ConfigDict) -> int:
    """Returns the references per window, which is the slots per row; 1 = each is encoded alone."""
    if not config.writer.document_context:
        return 1
    return config.writer.document_context_tokens // config.memory.reference_length


def layout_entries(config: ConfigDict) -> dict[str, Any]:
    """Returns the entry of a bank's layout on document context; empty if there is none."""
    references = window_references(config)
    return {} if references == 1 else {"document_context_references": references}


def writer_settings(layout: dict[str, Any]) -> dict[str, Any]:
    """Returns the `config.writer` fields with the document context of a bank of this layout."""
    references = {**UNSTATED, **layout}["document_context_references"]
    if references == 1:
        return {"document_context": False}
    tokens = references * layout["reference_length"]
    return {"document_context": True, "document_context_tokens": tokens}


def identities(
    documents: Int[np.ndarray, " R"], hashes: UInt64[np.ndarray, " R"], slots: int
) -> UInt64[np.ndarray, " R"]:
    """Hashes each reference's tokens together with all earlier tokens of its window.

    Args:
      documents: document number of each reference; a document's references are consecutive.
      hashes: hash of each reference's own tokens; the first reference of a window keeps it.
      slots: references per window.
    """
    place, previous = _places(documents, slots)
    mixed = hashes.astype(np.uint64)
    for number in range(1, slots):
        ids = np.flatnonzero(place == number)
        if not ids.size:
            break
        before = _mix(mixed[previous[ids]] ^ np.uint64(0x9E3779B97F4A7C15))
        mixed[ids] = _mix(before + hashes[ids])
    return mixed


def _mix(x: np.ndarray) -> np.ndarray:
    """Applies the 64-bit finalizer of MurmurHash3, a bijection that mixes all bits."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    return x ^ (x >> np.uint64(33))


def _places(
    documents: Int[np.ndarray, " R"], slots: int
) -> tuple[Int[np.ndarray, " R"], Int[np.ndarray, " R"]]:
    """Returns each reference's place in its window and its predecessor there (−1 at place 0)."""
    ids = np.arange(len(documents))
    begins = np.flatnonzero(np.diff(documents, prepend=documents[:1] - 1))
    lead = np.repeat(begins, np.diff(begins, append=len(documents)))
    number = ids - lead
    later = number >= slots
    place = np.where(later, 1 + (number - slots) % (slots - 1), number)
    previous = np.where(later & (place == 1), lead, ids - 1)
    return place, np.where(place == 0, -1, previous)


class Row(NamedTuple):
    """Lists the references that are encoded in one row, one per slot."""

    ids: Int[np.ndarray, " slots"]  # −1 in an empty slot
    first: Int[np.ndarray, " slots"]  # slot at which the window of each slot begins
    own: Bool[np.ndarray, " slots"]  # True if its memory is written, False if it is only context


def packed_rows(
    documents: Int[np.ndarray, " R"], slots: int, requested: Bool[np.ndarray, " R"]
) -> Iterator[Row]:
    """Yields rows that hold all windows of requested references, roughly in the order of the ids.

    Args:
      documents: document number of each reference; a document's references are consecutive.
      slots: slots per row, which is the most references of a window.
      requested: True for references whose memories are encoded; rows without any are left out.
    """
    rows: list[list[tuple[int, int, int]]] = []
    spare: list[list[int]] = [[] for _ in range(slots + 1)]  # row numbers by free slots
    for window in _windows(documents, slots):
        low, high, lead = window
        size = high - low + (lead >= 0)
        left = next((left for left in range(size, slots) if spare[left]), slots)
        if left < slots:
            number = spare[left].pop()
        else:
            if len(rows) == _BLOCK:
                yield from _rows_of(rows, slots, requested)
                rows, spare = [], [[] for _ in range(slots + 1)]
            number = len(rows)
            rows.append([])
        rows[number].append(window)
        spare[left - size].append(number)
    yield from _rows_of(rows, slots, requested)


def _windows(documents: Int[np.ndarray, " R"], slots: int) -> Iterator[tuple[int, int, int]]:
    """Yields `low`, `high`, `lead` of each window: references low … high − 1, preceded by `lead`.

    `lead` is the document's first reference, or −1 if the window itself begins with it.
    """
    place, previous = _places(documents, slots)
    low = np.flatnonzero((place == 0) | (previous != np.arange(len(documents)) - 1))
    high = np.append(low[1:], len(documents))
    return zip(low.tolist(), high.tolist(), previous[low].tolist(), strict=True)


def _rows_of(
    rows: list[list[tuple[int, int, int]]], slots: int, requested: np.ndarray
) -> Iterator[Row]:
    for windows in rows:
        if not any(requested[low:high].any() for low, high, _ in windows):
            continue
        ids, first = np.full(slots, -1, np.int64), np.arange(slots, dtype=np.int32)
        own, slot = np.zeros(slots, bool), 0
        for low, high, lead in windows:
            begin = slot
            if lead >= 0:
                ids[slot], slot = lead, slot + 1
            stop = slot + high - low
            ids[slot:stop], own[slot:stop] = np.arange(low, high), requested[low:high]
            first[begin:stop], slot = begin, stop
        yield Row(ids, first, own)


def in_order(
    ids: Int[np.ndarray, " n"], parts: Iterable[tuple[np.ndarray, np.ndarray]]
) -> Iterator[np.ndarray]:
    """Yields memories in the order of `ids`, each as soon as all memories before it are there.

    Args:
      ids: requested references, ascending.
      parts: batches of ids and their memories, in an order close to that of `ids`.
    """
    ready: dict[int, np.ndarray] = {}
    remaining = collections.deque(ids.tolist())
    for part, memories in parts:
        ready.update(zip(part.tolist(), memories, strict=True))
        run = []
        while remaining and remaining[0] in ready:
            run.append(ready.pop(remaining.popleft()))
        if run:
            yield np.stack(run)
