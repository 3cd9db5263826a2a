"""Cleaning: repaired and filtered documents in blocks on disk, and which of them are duplicates.

Every function here reads and writes files of one folder and may run in any process: a block is
cleaned by whoever gets it, and its last file, `<name>.json`, says that it is done. So work that was
stopped goes on with what is missing, and the number of processes changes nothing.

    blocks/<name>.documents    repaired documents that pass the rules, msgpack under zlib
                 .table.npy    number of words and language of each
                 .ids.npy      hash of the id of each, sorted
                 .bands.npy    MinHash bands, sorted; .signatures.npy what they come from
                 .json         counts and samples
    compared/<part>.npy        documents with an earlier near-duplicate, among a range of bands
    drops.npy, renames.npy     what is decided of all
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from jaxtyping import Shaped

from m3jax.text import duplicates
from m3jax.text.blocks import INDEX_BITS, Block, Unreadable, number_of, place_of, read_block
from m3jax.text.documents import Document, TextError
from m3jax.text.files import write_array, write_atomically
from m3jax.text.quality import Scorer, load_scorer
from m3jax.text.rules import Measures, broken_rule, measure
from m3jax.text.tally import SHOWN, Tally

_TABLE = np.dtype([("words", "<u8"), ("characters", "<u8"), ("language", "<U8")])
_PART_BYTES = 256 << 20  # of band entries that are compared at once
_LANGUAGE_HEAD = 500  # characters by which a document's language is told


@dataclass(frozen=True)
class Cleaning:
    """What the functions here need to know.

    Attributes:
      folder: where they read and write, seen by all processes.
      clean: the section `clean` of the config, as an object with its fields.
      quality: spec of the scorer (`load_scorer`), or None.
    """

    folder: Path
    clean: Any
    quality: str | None = None

    @property
    def blocks(self) -> Path:
        """The folder of the blocks."""
        return self.folder / "blocks"


def names_of(cleaning: Cleaning) -> list[str]:
    """The names of the finished blocks, in reading order."""
    return sorted(path.stem for path in cleaning.blocks.glob("*.json"))


def is_clean(cleaning: Cleaning, block: Block) -> bool:
    """Whether a block is finished."""
    return (cleaning.blocks / f"{block.name}.json").is_file()


def clean_block(cleaning: Cleaning, block: Block) -> str:
    """Reads, repairs and filters the documents of a block; returns its name."""
    if is_clean(cleaning, block):
        return block.name
    clean, tally = cleaning.clean, Tally()
    kept: list[tuple[Document, Measures, str]] = []
    for item in read_block(block, strict=not clean.enabled):
        if isinstance(item, Unreadable):
            tally.count("unreadable", 0)
            tally.show("unreadable", {"value": item.reason[:SHOWN]}, "")
        else:
            passed = _pass(item, clean, tally)
            if passed is not None:
                kept.append(passed)
    if clean.enabled and clean.quality_min > 0:
        kept = _of_quality(kept, _scorer(str(cleaning.quality)), clean.quality_min, tally)
    _write(cleaning, block.name, kept, tally)
    return block.name


def _pass(document: Document, clean: Any, tally: Tally) -> tuple[Document, Measures, str] | None:
    """The repaired document with its measures and language, if no rule takes it out."""
    text = document.text
    tally.count("read", len(text))
    if not text or text.isspace():
        tally.count("empty", len(text))
        return None
    if not clean.enabled:
        return document, Measures(len(text), 0, 0.0, 0.0, 0.0, 0.0), ""
    if len(text) > clean.characters_max:
        tally.take_out("characters_max", document, str(len(text)))
        return None
    if clean.repair and not document.no_loss:  # whose spans are positions in the text as it is
        repaired = _repair(text)
        if repaired != text:
            tally.count("repaired", len(text))
            at = next(
                (i for i, (a, b) in enumerate(zip(text, repaired, strict=False)) if a != b),
                min(len(text), len(repaired)),
            )
            around = slice(max(0, at - 40), at + 40)
            names = {"id": document.id, "source": document.source, "value": text[around]}
            tally.show("repaired", names, repaired[around])
            document = replace(document, text=repaired)
    measures, language = measure(document.text), _language(document.text)
    tally.languages[language] += 1
    tally.lengths[str(measures.words.bit_length())] += 1
    broken = broken_rule(measures, clean)
    if broken is not None:
        tally.take_out(broken[0], document, f"{broken[1]:.4g}")
        return None
    return document, measures, language


def _repair(text: str) -> str:
    try:
        import ftfy
    except ImportError as error:
        raise TextError("clean.repair needs ftfy: pip install -e '.[clean]'") from error
    # What is damaged, not what is a matter of taste: quotes and wide letters stay as they are.
    return ftfy.fix_text(
        text,
        unescape_html=False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        explain=False,
    )


def _language(text: str) -> str:
    try:
        import py3langid
    except ImportError as error:
        raise TextError("languages are told by py3langid: pip install -e '.[clean]'") from error
    return py3langid.classify(text[:_LANGUAGE_HEAD])[0]


@lru_cache(maxsize=1)
def _scorer(spec: str) -> Scorer:
    return load_scorer(spec)


def _of_quality(
    kept: list[tuple[Document, Measures, str]], scorer: Scorer, least: float, tally: Tally
) -> list[tuple[Document, Measures, str]]:
    scores = scorer.score([document.text for document, _, _ in kept])
    for (document, _, _), score in zip(kept, scores, strict=True):
        if score < least:
            tally.take_out("quality_min", document, f"{score:.2f}")
    return [one for one, score in zip(kept, scores, strict=True) if score >= least]


def _write(
    cleaning: Cleaning, name: str, kept: list[tuple[Document, Measures, str]], tally: Tally
) -> None:
    clean = cleaning.clean
    numbers = np.array([number_of(name, i) for i in range(len(kept))], np.uint64)
    table = np.array([(m.words, m.characters, language) for _, m, language in kept], _TABLE)
    documents = [
        [d.id, d.text, d.title, d.source, [list(s) for s in d.no_loss], list(d.references)]
        for d, _, _ in kept
    ]
    arrays = {"table": table}
    if clean.enabled:
        ids = np.empty(len(kept), duplicates.ENTRY)
        ids["key"] = [_hash(document.id) for document, _, _ in kept]
        ids["number"] = numbers
        arrays["ids"] = np.sort(ids, order=["key", "number"])
    if clean.enabled and clean.similarity > 0:
        signatures = np.empty((len(kept), clean.permutations), np.uint32)
        for i, (document, _, _) in enumerate(kept):
            signatures[i] = duplicates.signature(
                document.text, clean.permutations, clean.shingle_words
            )
        arrays["signatures"] = signatures
        arrays["bands"] = duplicates.band_entries(signatures, numbers, clean.similarity)
    at = cleaning.blocks
    write_atomically(at / f"{name}.documents", zlib.compress(msgpack.packb(documents), 1))
    for key, array in arrays.items():
        write_array(at / f"{name}.{key}.npy", array)
    write_atomically(at / f"{name}.json", json.dumps(tally.to_json(), sort_keys=True).encode())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


# -- comparing --------------------------------------------------------------------------------


def parts_to_compare(cleaning: Cleaning) -> list[tuple[int, int]]:
    """Ranges of keys, as `(part, parts)`, each of which fits in memory."""
    files = cleaning.blocks.glob("*.bands.npy")
    total = sum(path.stat().st_size for path in files)
    parts = max(1, -(-total // _PART_BYTES))
    return [(part, parts) for part in range(parts)]


def compare_part(cleaning: Cleaning, part: tuple[int, int]) -> int:
    """Finds the near-duplicates and the repeated ids of a range of keys; returns its number."""
    target = cleaning.folder / "compared" / f"{part[0]:05d}-{part[1]:05d}"
    if target.with_suffix(".renames.npy").is_file():
        return part[0]
    names = names_of(cleaning)
    found = np.empty(0, duplicates.DROP)
    if cleaning.clean.similarity > 0:
        entries = _in_range(cleaning, names, "bands", part)
        found = duplicates.compare(
            entries, _signatures_of(cleaning), float(cleaning.clean.similarity)
        )
    repeated = [
        members[1:] for members in duplicates.groups(_in_range(cleaning, names, "ids", part))
    ]
    renames = np.concatenate([np.empty(0, np.uint64), *repeated])
    write_array(target.with_suffix(".drops.npy"), found)
    write_array(target.with_suffix(".renames.npy"), renames)
    return part[0]


def _in_range(
    cleaning: Cleaning, names: Iterable[str], kind: str, part: tuple[int, int]
) -> Shaped[np.ndarray, " e"]:
    """The entries of all blocks whose keys are in a part of all keys."""
    low, high = (-(-(i << 64) // part[1]) for i in (part[0], part[0] + 1))
    pieces = [np.empty(0, duplicates.ENTRY)]
    for name in names:
        entries = np.load(cleaning.blocks / f"{name}.{kind}.npy", mmap_mode="r")
        keys = entries["key"]
        first = np.searchsorted(keys, np.uint64(low))
        last = np.searchsorted(keys, np.uint64(high)) if high < 1 << 64 else len(keys)
        pieces.append(np.array(entries[first:last]))
    return np.concatenate(pieces)


def _signatures_of(cleaning: Cleaning) -> Any:
    @lru_cache(maxsize=256)
    def of_block(name: str) -> np.ndarray:
        return np.load(cleaning.blocks / f"{name}.signatures.npy", mmap_mode="r")

    def of(number: int) -> np.ndarray:
        name, index = place_of(number)
        return np.array(of_block(name)[index])

    return of


def decide(cleaning: Cleaning) -> Tally:
    """Joins what the comparisons found, and counts the blocks; returns all counts.

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
    drops, renames = [np.empty(0, duplicates.DROP)], [np.empty(0, np.uint64)]
    if cleaning.clean.enabled:
        for part, parts in parts_to_compare(cleaning):
            at = cleaning.folder / "compared" / f"{part:05d}-{parts:05d}"
            drops.append(np.load(at.with_suffix(".drops.npy")))
            renames.append(np.load(at.with_suffix(".renames.npy")))
    write_array(cleaning.folder / "drops.npy", duplicates.merged(drops))
    together = np.unique(np.concatenate(renames))
    write_array(cleaning.folder / "renames.npy", together)
    return tally


# -- reading ----------------------------------------------------------------------------------


class Cleaned:
    """The documents that are left, in reading order.

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
        """The documents of a block that are left."""
        documents = self.unfiltered(name)
        dropped, renamed = self.left_out(name), self._inside(self.renames, name)
        for i, document in enumerate(documents):
            if i in renamed:
                document = replace(document, id=f"{document.id}~{document.source}")
            if i not in dropped:
                yield document

    def unfiltered(self, name: str) -> list[Document]:
        """The documents of a block before duplicates are left out, with the ids they had."""
        data = (self.cleaning.blocks / f"{name}.documents").read_bytes()
        rows = msgpack.unpackb(zlib.decompress(data))
        return [
            Document(name, text, title, source, tuple((a, b) for a, b in spans), tuple(references))
            for name, text, title, source, spans, references in rows
        ]

    def left_out(self, name: str) -> set[int]:
        """Places of a block's near-duplicates."""
        return self._inside(self.drops["number"], name)

    def _inside(self, numbers: np.ndarray, name: str) -> set[int]:
        first = number_of(name, 0)
        low, high = np.searchsorted(
            numbers, np.array([first, first + (1 << INDEX_BITS)], np.uint64)
        )
        return {int(n) - first for n in numbers[low:high]}
