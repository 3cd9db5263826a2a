"""Cleaning of documents in blocks on disk: repair, rules, quality; then near-duplicates, equal ids.

The functions of a stage exchange data only through files of one folder, so they may run in any
process. The last file of a block, `<name>.json`, marks it as finished. Work that was interrupted
thus resumes with the missing files, and the result does not depend on the number of processes.

    blocks/<name>.documents    repaired documents that pass the rules, msgpack under zlib
                 .table.npy    number of words, number of characters and language of each document
                 .ids.npy      hash of the id of each document, sorted
                 .bands.npy    band entries of the MinHash signatures in .signatures.npy, sorted
                 .json         counts and samples
    compared/<part>.drops.npy  documents with an earlier near-duplicate, by part of the band keys
                   .renames.npy documents with the id of an earlier document
    drops.npy, renames.npy     the same, joined over all parts
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from jaxtyping import Shaped, UInt64

from m3jax.errors import TextError
from m3jax.files import hash64, write_array, write_atomically
from m3jax.optional import optional
from m3jax.text.cleaning import minhash
from m3jax.text.cleaning.blocks import INDEX_BITS, Block, number_of, place_of, read_block
from m3jax.text.cleaning.counters import SHOWN, Tally
from m3jax.text.cleaning.quality import Scorer, load_scorer
from m3jax.text.cleaning.rules import broken_rule, measure
from m3jax.text.documents import Document

_TABLE = np.dtype([("words", "<u8"), ("characters", "<u8"), ("language", "<U8")])
_LANGUAGE_HEAD = 500  # characters from which the language of a document is detected
# Written alike: 330 of 5000 Mandarin Wikipedia articles are classified as Wu or Cantonese.
_VARIETIES = {"wuu": "zh", "yue": "zh"}
_Kept = tuple[Document, int, str]  # a document, its number of words, its language


@dataclass(frozen=True)
class CleanFolder:
    """Reads the documents that are left in a folder of cleaned blocks, which all processes see.

    Documents come in reading order. If an earlier document has the same id, the document's file and
    line are appended to its id: `7~b.jsonl:12`.
    """

    folder: Path
    clean: Any  # the config section `clean`
    quality: str | None = None  # spec of the quality scorer

    @property
    def blocks(self) -> Path:
        return self.folder / "blocks"

    @property
    def drops(self) -> Shaped[np.ndarray, " d"]:
        """Returns near-duplicates and witnesses (rows of `minhash.DROP`), sorted by number."""
        return np.load(self.folder / "drops.npy", mmap_mode="r")

    @property
    def renames(self) -> UInt64[np.ndarray, " r"]:
        """Returns the numbers of the documents with a repeated id, sorted."""
        return np.load(self.folder / "renames.npy", mmap_mode="r")

    def names(self) -> list[str]:
        """Lists the names of the finished blocks, in reading order."""
        return sorted(path.stem for path in self.blocks.glob("*.json"))

    def __iter__(self) -> Iterator[Document]:
        return itertools.chain.from_iterable(map(self.block, self.names()))

    def block(self, name: str) -> Iterator[Document]:
        """Yields the documents of a block that are left, without near-duplicates."""
        dropped, renamed = self.left_out(name), _inside(self.renames, name)
        for i, document in enumerate(self.unfiltered(name)):
            if i in renamed:
                document = replace(
                    document, id=f"{document.id}~{document.place or document.source}"
                )
            if i not in dropped:
                yield document

    def unfiltered(self, name: str) -> list[Document]:
        """Reads the documents of a block, near-duplicates included, with their original ids."""
        data = zlib.decompress((self.blocks / f"{name}.documents").read_bytes())
        return [Document(*fields) for fields in msgpack.unpackb(data, use_list=False)]

    def left_out(self, name: str) -> set[int]:
        """Returns the indices of the near-duplicates within a block."""
        return _inside(self.drops["number"], name)


def _inside(numbers: UInt64[np.ndarray, " n"], name: str) -> set[int]:
    """Returns the indices within a block of the (sorted) document numbers that are in it."""
    first = number_of(name, 0)
    low, high = np.searchsorted(numbers, np.array([first, first + (1 << INDEX_BITS)], np.uint64))
    return {int(n) - first for n in numbers[low:high]}


def clean_block(cleaned: CleanFolder, block: Block) -> None:
    """Reads, repairs, filters and writes the documents of a block; does nothing if they are there.

    An unreadable document is counted if `clean.enabled`, else its `TextError` is raised.
    """
    if (cleaned.blocks / f"{block.name}.json").is_file():
        return
    clean, tally = cleaned.clean, Tally()
    kept: list[_Kept] = []
    unread = Counter[str]()
    for item in read_block(block, unread):
        if isinstance(item, Document):
            passed = _pass(item, clean, tally)
            kept += [] if passed is None else [passed]
        elif clean.enabled:
            tally.count("unreadable", 0)
            tally.show("unreadable", str(item)[:SHOWN], "")
        else:
            raise item
    tally.counts["not read/blank lines"] += unread["blank lines"]
    if clean.enabled and clean.quality_min > 0:
        kept = _of_quality(kept, _scorer(str(cleaned.quality)), clean.quality_min, tally)
    _write(cleaned, block.name, kept, tally)


def _pass(document: Document, clean: Any, tally: Tally) -> _Kept | None:
    """Returns the repaired document, its number of words and language; None if it is removed."""
    text = document.text
    tally.count("read", len(text))
    if not text.strip():
        tally.count("empty", len(text))
        return None
    if not clean.enabled:
        return document, 0, ""
    if len(text) > clean.characters_max:
        tally.take_out("characters_max", document, str(len(text)))
        return None
    if clean.repair and not document.no_loss:  # no_loss spans are positions in the unrepaired text
        repaired = _repair(text)
        if repaired != text:
            _show_repair(document, repaired, tally)
            document = replace(document, text=repaired)
    if not document.text.strip():
        tally.count("empty", len(text))
        return None
    measures, language = measure(document.text), _language(document.text)
    tally.languages[language] += 1
    tally.lengths[str(measures.words.bit_length())] += 1
    broken = broken_rule(measures, clean)
    if broken is not None:
        tally.take_out(broken[0], document, f"{broken[1]:.4g}")
        return None
    return document, measures.words, language


def _show_repair(document: Document, repaired: str, tally: Tally) -> None:
    """Counts a repair, and offers a sample around the first character that changed."""
    text = document.text
    tally.count("repaired", len(text))
    pairs = enumerate(zip(text, repaired, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(repaired)))
    around = slice(max(0, at - 40), at + 40)
    tally.show("repaired", text[around], repaired[around], document)


def _repair(text: str) -> str:
    ftfy = optional("ftfy", "clean.repair needs ftfy")
    # Only damage is repaired: curly quotes, ligatures and full-width letters stay as they are.
    return ftfy.fix_text(
        text,
        unescape_html=False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        explain=False,
    )


def _language(text: str) -> str:
    py3langid = optional("py3langid", "languages are told by py3langid")
    language = py3langid.classify(text[:_LANGUAGE_HEAD])[0]
    return _VARIETIES.get(language, language)


@lru_cache(maxsize=1)
def _scorer(spec: str) -> Scorer:
    return load_scorer(spec)


def _of_quality(kept: list[_Kept], scorer: Scorer, least: float, tally: Tally) -> list[_Kept]:
    scores = scorer.score([document.text for document, _, _ in kept])
    for (document, _, _), score in zip(kept, scores, strict=True):
        if score < least:
            tally.take_out("quality_min", document, f"{score:.2f}")
    return [item for item, score in zip(kept, scores, strict=True) if score >= least]


def _write(cleaned: CleanFolder, name: str, kept: list[_Kept], tally: Tally) -> None:
    clean, at, first = cleaned.clean, cleaned.blocks / name, number_of(name, 0)
    documents = [
        (d.id, d.text, d.title, d.source, d.no_loss, d.references, d.place) for d, _, _ in kept
    ]
    data = zlib.compress(msgpack.packb(documents), 1)
    write_atomically(at.with_suffix(".documents"), data, shared=True)
    table = np.array([(words, len(d.text), language) for d, words, language in kept], _TABLE)
    write_array(at.with_suffix(".table.npy"), table, shared=True)
    if clean.enabled:
        ids = [(hash64(d.id.encode()), first + i) for i, (d, _, _) in enumerate(kept)]
        write_array(at.with_suffix(".ids.npy"), np.array(sorted(ids), minhash.ENTRY), shared=True)
    if clean.enabled and clean.similarity > 0:
        minhash.write_signatures(at, [d.text for d, _, _ in kept], first, clean)
    tally.write(at.with_suffix(".json"))


def compare_part(cleaned: CleanFolder, part: minhash.Part) -> None:
    """Writes the near-duplicates and repeated ids of a part of the keys (`minhash.parts_of`)."""
    target = cleaned.folder / "compared" / minhash.name_of(part)
    if target.with_suffix(".renames.npy").is_file():
        return
    drops, similarity = np.empty(0, minhash.DROP), cleaned.clean.similarity
    if similarity > 0:
        drops = minhash.compare_files(cleaned.blocks, part, place_of, similarity)
    ids = minhash.in_part(cleaned.blocks, "ids", part)
    repeated = [members[1:] for members in minhash.groups(ids)]
    renames = np.concatenate([np.empty(0, np.uint64), *repeated])
    write_array(target.with_suffix(".drops.npy"), drops, shared=True)
    write_array(target.with_suffix(".renames.npy"), renames, shared=True)


def decide(cleaned: CleanFolder) -> Tally:
    """Writes the joined results of all comparisons, and returns the summed counts of all blocks.

    Raises:
      TextError: the fraction of unreadable lines exceeds `clean.unreadable_share`.
    """
    tally, share = Tally.read(cleaned.blocks), cleaned.clean.unreadable_share
    unreadable, read = tally.counts["unreadable/documents"], tally.counts["read/documents"]
    if cleaned.clean.enabled and unreadable > share * (unreadable + read):
        shown = tally.samples["unreadable"][0]["value"]
        raise TextError(
            f"{unreadable} of {unreadable + read} lines, rows and files are unreadable, more than"
            f" clean.unreadable_share = {share:g}; one of them: {shown}. Repair the input or raise"
            " it"
        )
    parts = minhash.parts_of(cleaned.blocks) if cleaned.clean.enabled else []
    drops = minhash.results(cleaned.folder / "compared", parts, ".drops.npy")
    renames = minhash.results(cleaned.folder / "compared", parts, ".renames.npy")
    write_array(cleaned.folder / "drops.npy", minhash.merged(drops))
    together = np.unique(np.concatenate([np.empty(0, np.uint64), *renames]))
    write_array(cleaned.folder / "renames.npy", together)
    return tally
