"""Near-duplicates: MinHash signatures, their bands (LSH), and the documents to drop.

A document is dropped if an *earlier* document, in reading order, is similar to it. This rule looks
at pairs only, so the comparison can be divided into independent parts, and the result does not
depend on their number. A dropped document has a witness: the earliest document similar to it.
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

from m3jax.errors import TextError
from m3jax.files import write_array
from m3jax.optional import optional
from m3jax.text.cleaning.rules import normal_words

ENTRY = np.dtype(
    [("key", "<u8"), ("number", "<u8")]
)  # a band or the hash of an id, and its document
DROP = np.dtype([("number", "<u8"), ("witness", "<u8"), ("similarity", "<f4")])
Entries = Shaped[np.ndarray, " e"]  # of type ENTRY
Drops = Shaped[np.ndarray, " d"]  # of type DROP
Signature = UInt32[np.ndarray, " n"]
Part = tuple[int, int]  # index of a part of the range of 64-bit keys, number of parts
_SEED = 1
_RECALL = 0.97  # fraction of pairs at the threshold that must share a band
_PART_BYTES = 256 << 20  # of band entries that are compared at once
_NEIGHBOURS = 16  # first and preceding members of a large group to compare a member with


def bands_of(similarity: float, permutations: int) -> tuple[int, int]:
    """Returns the number b of bands and the number r of values per band for a threshold.

    Two documents of similarity s share a band with probability 1 − (1 − s^r)^b; r is the largest
    with which this is at least 0.97 at the threshold `similarity`.
    """
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if 1 - (1 - similarity**rows) ** bands >= _RECALL:
            return bands, rows
    return permutations, 1


def algorithm() -> str:
    """Returns the MinHash library's name and version; `TextError` if it is not installed."""
    return f"rensa {_rensa().RMinHash.ALGORITHM_VERSION}"


def _rensa() -> Any:
    return optional("rensa", "near-duplicates need rensa")


def signature(text: str, permutations: int, shingle_words: int) -> Signature:
    """Computes the MinHash signature of the shingles (runs of `shingle_words` words) of a text.

    A text of fewer words is a single shingle; so is the raw text if it has no words.
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
    """Makes one entry per document and band, sorted by key; equal bands have equal keys."""
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
    """Writes `<at>.signatures.npy`, a row per text, and `<at>.bands.npy`, the sorted band entries.

    `texts` are numbered from `first`; None stands for a removed text, which gets no band entries.
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
    """Lists parts of the key range, small enough to hold the band entries of each in RAM."""
    size = sum(path.stat().st_size for path in folder.glob("*.bands.npy"))
    parts = max(1, -(-size // _PART_BYTES))
    return [(part, parts) for part in range(parts)]


def name_of(part: Part) -> str:
    """Returns the name of the files of a part."""
    return f"{part[0]:05d}-{part[1]:05d}"


def results(folder: Path, parts: Sequence[Part], suffix: str) -> list[np.ndarray]:
    """Reads the results of all parts; raises `TextError` naming the file that is missing."""
    files = [folder / f"{name_of(part)}{suffix}" for part in parts]
    for path in files:
        if not path.is_file():
            raise TextError(
                f"{path} is missing: a worker wrote it elsewhere, or a shared disk does not show it"
                " yet; put the workdir on a disk that all workers share and run the command again"
            )
    return [np.load(path) for path in files]


def keys_of_part(keys: UInt64[np.ndarray, " n"], part: Part) -> slice:
    """Returns the slice of the sorted 64-bit `keys` that are in a part of the key range."""
    low, high = (-(-(i << 64) // part[1]) for i in (part[0], part[0] + 1))
    last = np.searchsorted(keys, np.uint64(high)) if high < 1 << 64 else len(keys)
    return slice(int(np.searchsorted(keys, np.uint64(low))), int(last))


def in_part(folder: Path, kind: str, part: Part) -> Entries:
    """Reads the entries of all files `*.<kind>.npy` with keys in a part of the key range."""
    pieces = [np.empty(0, ENTRY)]
    for path in sorted(folder.glob(f"*.{kind}.npy")):
        entries = np.load(path, mmap_mode="r")
        pieces.append(np.array(entries[keys_of_part(entries["key"], part)]))
    return np.concatenate(pieces)


def compare_files(
    folder: Path, part: Part, place_of: Callable[[int], tuple[str, int]], similarity: float
) -> Drops:
    """Applies `compare` to one part of the key range, for files of `write_signatures` in a folder.

    `place_of` maps a document's number to the name of its file and its row there.
    """

    @lru_cache(maxsize=256)
    def signatures_of(name: str) -> UInt32[np.ndarray, "d n"]:
        return np.load(folder / f"{name}.signatures.npy", mmap_mode="r")

    def signature_of(number: int) -> Signature:
        name, row = place_of(number)
        return np.array(signatures_of(name)[row])

    return compare(in_part(folder, "bands", part), signature_of, float(similarity))


def groups(entries: Entries) -> Iterable[UInt64[np.ndarray, " g"]]:
    """Yields, for every key that occurs twice or more, its documents' numbers, ascending."""
    entries = np.sort(entries, order=["key", "number"])
    starts = np.flatnonzero(np.append(True, entries["key"][1:] != entries["key"][:-1]))
    ends = np.append(starts[1:], len(entries))
    for i in np.flatnonzero(ends - starts > 1).tolist():
        yield np.unique(entries["number"][starts[i] : ends[i]])


def compare(entries: Entries, signature_of: Callable[[int], Signature], similarity: float) -> Drops:
    """Finds the documents that are similar to an earlier document with an equal band.

    Similarity is the fraction of equal values of two signatures. `entries` must hold all entries of
    every key in it; `signature_of` returns the signature of a document by its number. In a large
    group, each document is compared with the first 16 and the previous 16 only. Returns the drops
    sorted by number.
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
    """Joins the drops of parts: one row per document, earliest witness, sorted by number."""
    drops = np.sort(np.concatenate([np.empty(0, DROP), *parts]), order=["number", "witness"])
    first = np.append(True, drops["number"][1:] != drops["number"][:-1])[: len(drops)]
    return drops[first]
