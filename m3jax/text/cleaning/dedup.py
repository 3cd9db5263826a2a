"""Deduplication of cleaned blocks: near-duplicates and repeated ids among all, and the rest."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import msgpack
import numpy as np
from jaxtyping import Shaped

from m3jax.errors import TextError
from m3jax.files import write_array
from m3jax.text.cleaning import minhash
from m3jax.text.cleaning.blocks import INDEX_BITS, number_of, place_of
from m3jax.text.cleaning.clean import Cleaning, names_of
from m3jax.text.cleaning.counters import Tally
from m3jax.text.documents import Document


def parts_to_compare(cleaning: Cleaning) -> list[tuple[int, int]]:
    """Lists parts of the keys of bands, as `minhash.parts_of`."""
    return minhash.parts_of(cleaning.blocks.glob("*.bands.npy"))


def compare_part(cleaning: Cleaning, part: tuple[int, int]) -> int:
    """Finds the near-duplicates and the repeated ids of a range of keys; returns its number."""
    target = cleaning.folder / "compared" / f"{part[0]:05d}-{part[1]:05d}"
    if target.with_suffix(".renames.npy").is_file():
        return part[0]
    names = names_of(cleaning)
    drops = np.empty(0, minhash.DROP)
    if cleaning.clean.similarity > 0:
        entries = _in_range(cleaning, names, "bands", part)
        drops = minhash.compare(entries, _signatures_of(cleaning), float(cleaning.clean.similarity))
    repeated = [members[1:] for members in minhash.groups(_in_range(cleaning, names, "ids", part))]
    renames = np.concatenate([np.empty(0, np.uint64), *repeated])
    write_array(target.with_suffix(".drops.npy"), drops, shared=True)
    write_array(target.with_suffix(".renames.npy"), renames, shared=True)
    return part[0]


def _in_range(
    cleaning: Cleaning, names: Iterable[str], kind: str, part: tuple[int, int]
) -> Shaped[np.ndarray, " e"]:
    return minhash.in_part((cleaning.blocks / f"{name}.{kind}.npy" for name in names), part)


def _signatures_of(cleaning: Cleaning) -> Any:
    @lru_cache(maxsize=256)
    def of_block(name: str) -> np.ndarray:
        return np.load(cleaning.blocks / f"{name}.signatures.npy", mmap_mode="r")

    def of(number: int) -> np.ndarray:
        name, index = place_of(number)
        return np.array(of_block(name)[index])

    return of


def decide(cleaning: Cleaning) -> Tally:
    """Joins the comparisons' results, and counts the blocks; returns all counts.

    Raises:
      TextError: more unreadable lines than `clean.unreadable_share`, or no document is left.
    """
    tally = Tally()
    for name in names_of(cleaning):
        content = json.loads((cleaning.blocks / f"{name}.json").read_bytes())
        tally.add(Tally.from_json(content))
    unreadable, read = tally.counts["unreadable/documents"], tally.counts["read/documents"]
    share = cleaning.clean.unreadable_share
    if cleaning.clean.enabled and unreadable > share * (unreadable + read):
        shown = tally.samples["unreadable"][0]["value"]
        raise TextError(
            f"{unreadable} of {unreadable + read} lines, rows and files are unreadable, more than"
            f" clean.unreadable_share = {share:g}; one of them: {shown}. Repair the input or raise"
            " it"
        )
    drops, renames = [np.empty(0, minhash.DROP)], [np.empty(0, np.uint64)]
    if cleaning.clean.enabled:
        for part, parts in parts_to_compare(cleaning):
            at = cleaning.folder / "compared" / f"{part:05d}-{parts:05d}"
            drops.append(np.load(at.with_suffix(".drops.npy")))
            renames.append(np.load(at.with_suffix(".renames.npy")))
    write_array(cleaning.folder / "drops.npy", minhash.merged(drops))
    together = np.unique(np.concatenate(renames))
    write_array(cleaning.folder / "renames.npy", together)
    return tally


class Cleaned:
    """Reads the documents that are left, in reading order.

    An id that an earlier document has too gets the document's source behind it: `7~b.jsonl:12`.

    Attributes:
      cleaning: where they are.
      names: the blocks, in reading order.
      drops: near-duplicates with their witnesses, sorted by number.
      renames: numbers of the documents with a repeated id, sorted.
    """

    def __init__(self, cleaning: Cleaning) -> None:
        self.cleaning, self.names = cleaning, names_of(cleaning)
        self.drops = np.load(cleaning.folder / "drops.npy", mmap_mode="r")
        self.renames = np.load(cleaning.folder / "renames.npy", mmap_mode="r")

    def __iter__(self) -> Iterator[Document]:
        for name in self.names:
            yield from self.block(name)

    def block(self, name: str) -> Iterator[Document]:
        """Yields the documents of a block that are left."""
        documents = self.unfiltered(name)
        dropped, renamed = self.left_out(name), self._inside(self.renames, name)
        for i, document in enumerate(documents):
            if i in renamed:
                document = replace(document, id=f"{document.id}~{document.source}")
            if i not in dropped:
                yield document

    def unfiltered(self, name: str) -> list[Document]:
        """Reads the documents of a block before duplicates are left out, with the ids they had."""
        data = (self.cleaning.blocks / f"{name}.documents").read_bytes()
        rows = msgpack.unpackb(zlib.decompress(data))
        return [
            Document(name, text, title, source, tuple((a, b) for a, b in spans), tuple(references))
            for name, text, title, source, spans, references in rows
        ]

    def left_out(self, name: str) -> set[int]:
        """Returns the places of a block's near-duplicates."""
        return self._inside(self.drops["number"], name)

    def _inside(self, numbers: np.ndarray, name: str) -> set[int]:
        first = number_of(name, 0)
        low, high = np.searchsorted(
            numbers, np.array([first, first + (1 << INDEX_BITS)], np.uint64)
        )
        return {int(n) - first for n in numbers[low:high]}
