"""Near-duplicates: MinHash signatures, bands of them that collide, and which documents go.

A document is dropped when an *earlier* one, in reading order, is similar to it. The rule looks at
pairs only, so the comparison can be cut into parts that know nothing of each other, and it does not
depend on their number. The dropped document has a witness, the earliest document that is similar.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt32, UInt64

from m3jax.files import write_array
from m3jax.text.cleaning.rules import normal_words
from m3jax.text.optional import optional

ENTRY = np.dtype([("key", "<u8"), ("number", "<u8")])  # of a band, or of an id
DROP = np.dtype([("number", "<u8"), ("witness", "<u8"), ("similarity", "<f4")])
Entries = Shaped[np.ndarray, " e"]  # of type ENTRY
Drops = Shaped[np.ndarray, " d"]  # of type DROP
Signature = UInt32[np.ndarray, " n"]
Part = tuple[int, int]  # a part of all 64-bit keys, and the number of parts
_SEED = 1
_RECALL = 0.97  # share of pairs at the threshold that share a band
_PART_BYTES = 256 << 20  # of band entries that are compared at once
_NEIGHBOURS = 16  # members of a large group that each one is compared with, on both ends


def bands_of(similarity: float, permutations: int) -> tuple[int, int]:
    """Returns bands and rows: the longest bands of which pairs at the threshold share one.

    Two documents of similarity s share one of b bands of r values with probability 1 − (1 − s^r)^b.
    """
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if 1 - (1 - similarity**rows) ** bands >= _RECALL:
            return bands, rows
    return permutations, 1


def algorithm() -> str:
    """Names the library's algorithm; raises `TextError` where the library is not installed."""
    return f"rensa {_rensa().RMinHash.ALGORITHM_VERSION}"


def _rensa() -> Any:
    return optional("rensa", "near-duplicates need rensa")


def signature(text: str, permutations: int, shingle_words: int) -> Signature:
    """Computes the MinHash signature of the runs of `shingle_words` words of a text.

    A text of fewer words is one item, one without words is compared as it is.
    """
    minhash = _rensa().RMinHash(num_perm=permutations, seed=_SEED)
    short: list[str] = []
    whole = False
    for words in normal_words(text):
        if len(words) >= shingle_words:
            runs = (itertools.islice(words, i, None) for i in range(shingle_words))
            minhash.update([" ".join(run) for run in zip(*runs, strict=False)])
            whole = True
        elif not whole:
            short += words
    if not whole:
        minhash.update([" ".join(short) or text])
    return np.array(minhash.digest(), np.uint32)


def band_entries(
    signatures: UInt32[np.ndarray, "d n"], numbers: UInt64[np.ndarray, " d"], similarity: float
) -> Entries:
    """Makes one entry a document and band, sorted by key; equal keys are equal bands."""
    documents, permutations = signatures.shape
    bands, rows = bands_of(similarity, permutations)
    values = signatures[:, : bands * rows].reshape(documents, bands, rows).astype(np.uint64)
    keys = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), (documents, bands))
    for row in range(rows):
        keys = _mixed(keys + values[:, :, row] * np.uint64(0x9E3779B97F4A7C15))
    entries = np.empty(documents * bands, ENTRY)
    entries["key"], entries["number"] = keys.ravel(), np.repeat(numbers, bands)
    return np.sort(entries, order=["key", "number"])


def _mixed(x: np.ndarray) -> np.ndarray:
    """Applies the finalizer of SplitMix64, a bijection in which every bit depends on all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def write_signatures(at: Path, texts: Sequence[str | None], first: int, limits: Any) -> None:
    """Writes `<at>.signatures.npy`, a row a text, and `<at>.bands.npy`, the sorted band entries.

    `texts` are numbered from `first` on; of None, a text that was left out, there are no bands.
    `limits` is a config section with `similarity`, `permutations` and `shingle_words`.
    """
    signatures = np.zeros((len(texts), limits.permutations), np.uint32)
    for row, text in zip(signatures, texts, strict=True):
        if text is not None:
            row[:] = signature(text, limits.permutations, limits.shingle_words)
    kept = np.flatnonzero([text is not None for text in texts])
    numbers = np.uint64(first) + kept.astype(np.uint64)
    entries = band_entries(signatures[kept], numbers, limits.similarity)
    write_array(at.with_suffix(".signatures.npy"), signatures, shared=True)
    write_array(at.with_suffix(".bands.npy"), entries, shared=True)


def parts_of(folder: Path) -> list[Part]:
    """Lists parts of all keys, each of whose band entries fit in memory."""
    size = sum(path.stat().st_size for path in folder.glob("*.bands.npy"))
    parts = max(1, -(-size // _PART_BYTES))
    return [(part, parts) for part in range(parts)]


def keys_of_part(keys: UInt64[np.ndarray, " n"], part: Part) -> slice:
    """Finds where sorted 64-bit keys are in one part of all."""
    low, high = (-(-(i << 64) // part[1]) for i in (part[0], part[0] + 1))
    last = np.searchsorted(keys, np.uint64(high)) if high < 1 << 64 else len(keys)
    return slice(int(np.searchsorted(keys, np.uint64(low))), int(last))


def in_part(folder: Path, kind: str, part: Part) -> Entries:
    """Reads the entries of the sorted files `*.<kind>.npy` that are in one part of all keys."""
    pieces = [np.empty(0, ENTRY)]
    for path in sorted(folder.glob(f"*.{kind}.npy")):
        entries = np.load(path, mmap_mode="r")
        pieces.append(np.array(entries[keys_of_part(entries["key"], part)]))
    return np.concatenate(pieces)


def compare_files(
    folder: Path, part: Part, place_of: Callable[[int], tuple[str, int]], similarity: float
) -> Drops:
    """Compares, as `compare`, the documents of one part of all keys in a folder of signatures.

    `place_of` returns the name of a document's file (`write_signatures`) and the row in it.
    """

    @lru_cache(maxsize=256)
    def signatures_of(name: str) -> UInt32[np.ndarray, "d n"]:
        return np.load(folder / f"{name}.signatures.npy", mmap_mode="r")

    def signature_of(number: int) -> Signature:
        name, row = place_of(number)
        return np.array(signatures_of(name)[row])

    return compare(in_part(folder, "bands", part), signature_of, float(similarity))


def groups(entries: Entries) -> Iterable[UInt64[np.ndarray, " g"]]:
    """Yields the numbers of entries with equal keys, ascending, for keys that occur twice."""
    entries = np.sort(entries, order=["key", "number"])
    starts = np.flatnonzero(np.append(True, entries["key"][1:] != entries["key"][:-1]))
    ends = np.append(starts[1:], len(entries))
    for i in np.flatnonzero(ends - starts > 1).tolist():
        yield np.unique(entries["number"][starts[i] : ends[i]])


def compare(entries: Entries, signature_of: Callable[[int], Signature], similarity: float) -> Drops:
    """Finds the documents that an earlier one of the same band is similar to, sorted by number.

    `entries` are all band entries with a key that occurs at all, `signature_of` returns the
    signature of a document by its number. In a group of many each is compared with the 16 first and
    the 16 before it.
    """
    witnesses: dict[int, tuple[int, float]] = {}
    seen: set[tuple[int, int]] = set()
    for members in groups(entries):
        first: list[tuple[int, Signature]] = []
        last: deque[tuple[int, Signature]] = deque(maxlen=_NEIGHBOURS)
        for number in members.tolist():
            own = signature_of(number)
            for earlier, other in (*first, *last):
                if (earlier, number) in seen:
                    continue
                seen.add((earlier, number))
                share = float(np.mean(own == other))
                known = witnesses.get(number)
                if share >= similarity and (known is None or earlier < known[0]):
                    witnesses[number] = earlier, share
            (first if len(first) < _NEIGHBOURS else last).append((number, own))
    rows = [(number, *witness) for number, witness in sorted(witnesses.items())]
    return np.array(rows, DROP)


def merged(parts: list[np.ndarray]) -> Drops:
    """Joins parts to one row a dropped document, with its earliest witness, sorted by number."""
    drops = np.sort(np.concatenate([np.empty(0, DROP), *parts]), order=["number", "witness"])
    first = np.append(True, drops["number"][1:] != drops["number"][:-1])[: len(drops)]
    return drops[first]
