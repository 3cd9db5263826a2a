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
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from m3jax.files import write_array, write_atomically
from m3jax.text.cleaning import minhash
from m3jax.text.cleaning.blocks import Block, Unreadable, number_of, read_block
from m3jax.text.cleaning.counters import SHOWN, Tally
from m3jax.text.cleaning.quality import Scorer, load_scorer
from m3jax.text.cleaning.rules import Measures, broken_rule, measure
from m3jax.text.documents import Document
from m3jax.text.optional import optional

_TABLE = np.dtype([("words", "<u8"), ("characters", "<u8"), ("language", "<U8")])
_LANGUAGE_HEAD = 500  # characters by which a document's language is told
# Written alike: of 5000 articles of the Mandarin Wikipedia 330 are told to be Wu or Cantonese.
_VARIETIES = {"wuu": "zh", "yue": "zh"}


@dataclass(frozen=True)
class Cleaning:
    """Names the folder, seen by all processes; the section `clean`; the scorer's spec."""

    folder: Path
    clean: Any
    quality: str | None = None

    @property
    def blocks(self) -> Path:
        return self.folder / "blocks"


def names_of(cleaning: Cleaning) -> list[str]:
    """Lists the names of the finished blocks, in reading order."""
    return sorted(path.stem for path in cleaning.blocks.glob("*.json"))


def is_clean(cleaning: Cleaning, block: Block) -> bool:
    """Tests whether a block is finished."""
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
    """Returns the repaired document with its measures and language, if no rule takes it out."""
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
            _show_repair(document, repaired, tally)
            document = replace(document, text=repaired)
    if document.text.isspace() or not document.text:
        tally.count("empty", len(text))
        return None
    measures, language = measure(document.text), _language(document.text)
    tally.languages[language] += 1
    tally.lengths[str(measures.words.bit_length())] += 1
    broken = broken_rule(measures, clean)
    if broken is not None:
        tally.take_out(broken[0], document, f"{broken[1]:.4g}")
        return None
    return document, measures, language


def _show_repair(document: Document, repaired: str, tally: Tally) -> None:
    """Counts a repair, and samples it around the first sign that changed."""
    text = document.text
    tally.count("repaired", len(text))
    pairs = enumerate(zip(text, repaired, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(repaired)))
    around = slice(max(0, at - 40), at + 40)
    names = {"id": document.id, "source": document.source, "value": text[around]}
    tally.show("repaired", names, repaired[around])


def _repair(text: str) -> str:
    ftfy = optional("ftfy", "clean.repair needs ftfy")
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
    py3langid = optional("py3langid", "languages are told by py3langid")
    language = py3langid.classify(text[:_LANGUAGE_HEAD])[0]
    return _VARIETIES.get(language, language)


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
    return [item for item, score in zip(kept, scores, strict=True) if score >= least]


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
        ids = np.empty(len(kept), minhash.ENTRY)
        ids["key"] = [_hash(document.id) for document, _, _ in kept]
        ids["number"] = numbers
        arrays["ids"] = np.sort(ids, order=["key", "number"])
    if clean.enabled and clean.similarity > 0:
        signatures = np.empty((len(kept), clean.permutations), np.uint32)
        for i, (document, _, _) in enumerate(kept):
            signatures[i] = minhash.signature(
                document.text, clean.permutations, clean.shingle_words
            )
        arrays["signatures"] = signatures
        arrays["bands"] = minhash.band_entries(signatures, numbers, clean.similarity)
    at = cleaning.blocks
    data = zlib.compress(msgpack.packb(documents), 1)
    write_atomically(at / f"{name}.documents", data, shared=True)
    for key, array in arrays.items():
        write_array(at / f"{name}.{key}.npy", array, shared=True)
    counted = json.dumps(tally.to_json(), sort_keys=True).encode()
    write_atomically(at / f"{name}.json", counted, shared=True)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
