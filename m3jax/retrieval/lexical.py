"""Embedder without a model: TF-IDF of words, hashed into a dense vector.

Feature hashing follows Weinberger et al., arXiv 0902.2206. Every sum is exact, so that the vector
of a text is bitwise the same in any batch, thread, process and order of texts.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from m3jax.errors import RetrievalError
from m3jax.files import digest, json_text, open_array, write_array
from m3jax.retrieval.embedder import Embedder, different_embedders, read_spec, reading

_DF = "document_frequency.npy"
_WORD = re.compile(r"\w+")
# Equivalent table for ASCII, three times faster: non-word characters become spaces.
_ASCII_WORDS = "".join(
    character.lower() if _WORD.match(character) else " " for character in map(chr, range(128))
)
# Scripts written without spaces: kana, Bopomofo, ideographs with their extensions, Hangul.
_CJK = (
    "\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_CJK_RUN = re.compile(f"[{_CJK}]+|[^{_CJK}]+")
_IS_CJK = re.compile(f"[{_CJK}]")


def words(text: str) -> list[str]:
    """Splits a text into lower-cased words, and runs of CJK into characters and bigrams."""
    if text.isascii():
        return text.translate(_ASCII_WORDS).split()
    plain = _WORD.findall(unicodedata.normalize("NFKC", text).lower())
    if not _IS_CJK.search(text):
        return plain
    split: list[str] = []
    for run in _CJK_RUN.findall(" ".join(plain)):
        if _IS_CJK.match(run):
            split.extend(run)
            split.extend(map("".join, itertools.pairwise(run)))
        else:
            split.extend(run.split())
    return split


_WORD_BUCKETS = 4  # signed buckets of a word: enough that different words rarely share all of them
_PREFIX_BUCKETS = 2  # signed buckets of its prefix: half the weight of the word
_BUCKETS = _WORD_BUCKETS + _PREFIX_BUCKETS
_PREFIX = 5  # characters of the prefix: "photograph", "photography", "photographers" share one
_SLOTS = 2**20  # rows of the document-frequency table: large, so that rare names rarely collide
_SCHEME = (_WORD_BUCKETS, _PREFIX_BUCKETS, _PREFIX, _SLOTS)
_CACHED_WORDS = 2**20  # the cache is emptied beyond this many words (about 200 MB)
_BLOCK = 256  # texts embedded at a time
_EXACT = 2.0**16  # weights are multiples of 1/65536, so that float64 sums of them are exact


def _hash(
    strings: Iterable[str], buckets: int, kind: bytes
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes n strings: table slots (n,), bucket hashes (n, buckets) and signs (n, buckets)."""
    size = 4 * (buckets + 2)
    data = b"".join(
        hashlib.blake2b(s.encode("utf-8", "surrogatepass"), digest_size=size, person=kind).digest()
        for s in strings
    )
    numbers = np.frombuffer(data, "<u4").reshape(-1, buckets + 2)
    signs = 1.0 - 2.0 * (numbers[:, 1:2] >> np.arange(buckets, dtype=np.uint32) & 1)
    return numbers[:, 0] % _SLOTS, numbers[:, 2:], signs


class _Cache:
    """Maps words to rows of growing arrays (slots, buckets, signs), so that a word is hashed once.

    Rows are filled before their word becomes visible and never change, so readers need no lock.
    """

    def __init__(self, dimension: int):
        self.rows: dict[str, int] = {}
        self.slots = np.zeros((1024, 2), np.int64)  # slots of the word and of its prefix
        self.buckets = np.zeros((1024, _BUCKETS), np.int64)
        self.signs = np.zeros((1024, _BUCKETS), np.float64)
        self._segment = dimension // _BUCKETS
        self._lock = threading.Lock()

    def lookup(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns, for each word of each text, the index of the text and the word's row (int64)."""
        split = [words(text) for text in texts]
        flat = list(itertools.chain.from_iterable(split))
        unknown = set(flat).difference(self.rows)
        if unknown:
            self._add(sorted(unknown))
        rows = np.fromiter(map(self.rows.__getitem__, flat), np.int64, len(flat))
        return np.repeat(np.arange(len(texts)), [len(part) for part in split]), rows

    def _add(self, unknown: list[str]) -> None:
        with self._lock:
            new = [word for word in unknown if word not in self.rows]
            start, stop = len(self.rows), len(self.rows) + len(new)
            while stop > len(self.slots):
                for name in ("slots", "buckets", "signs"):
                    old = getattr(self, name)
                    setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
            hashed = _hash(new, _WORD_BUCKETS, b"word")
            prefixes = _hash([word[:_PREFIX] for word in new], _PREFIX_BUCKETS, b"prefix")
            slots, numbers, signs = (
                np.column_stack(pair) for pair in zip(hashed, prefixes, strict=True)
            )
            # One segment of the vector per bucket, so that the buckets of a word are distinct. The
            # remainder (4 of 1024 numbers) stays zero; ScaNN logs a message about it.
            segments = np.arange(_BUCKETS) * self._segment
            self.slots[start:stop] = slots
            self.buckets[start:stop] = numbers % self._segment + segments
            self.signs[start:stop] = signs
            self.rows.update(zip(new, range(start, stop), strict=True))


class LexicalEmbedder(Embedder):
    """Embeds texts by hashed TF-IDF for cosine similarity; deterministic and without a model.

    A word that occurs tf times in a text and in df of the n fitted texts adds `(1 + ln tf) ·
    ln((n + 1) / df)`, with hashed signs, to four hashed buckets. Its prefix of five characters,
    which inflected forms share, adds the same formula with its own df to two more buckets. Then the
    vector is normalised. Words that occur in no fitted text have weight 0, so that a text without
    any known word embeds to zeros.
    """

    name = "lexical"

    def __init__(self, dimension: int):
        """Makes an unfitted embedder; raises `RetrievalError` if the dimension is below 8."""
        if dimension < 8:
            raise RetrievalError(
                f"embedding dimension {dimension} is too small; set config.retrieval.dimension to"
                " 8 or more"
            )
        self.dimension, self.documents, self.fitted = dimension, 0, False
        self.fingerprint = digest(json_text([self.name, 1, dimension, *_SCHEME, 0]))
        self._added: np.ndarray | None = None  # rows (slot, frequency) of an extension
        self._cache = _Cache(dimension)

    @property
    def spec(self) -> dict[str, Any]:
        return {**super().spec, "documents": self.documents}

    def fit(self, texts: Iterable[str]) -> None:
        """Counts the document frequency of each hashed word and prefix."""
        self._learn(*self._counted(texts))

    @property
    def family(self) -> str:
        """Returns hashing scheme and dimension, without the document frequencies."""
        return json_text([self.name, self.dimension, *_SCHEME])

    def extended(self, texts: Sequence[str]) -> LexicalEmbedder:
        """Returns an embedder that also counts these texts, so that their new words can match.

        Existing vectors of older texts keep their older word weights, so that recall is slightly
        lower than with an embedder fitted to all texts at once.
        """
        self.check_fitted()
        frequencies, documents = self._counted(texts)
        embedder = LexicalEmbedder(self.dimension)
        embedder._learn(self._df + frequencies, self.documents + documents)
        slots = np.flatnonzero(frequencies)
        embedder._added = np.stack([slots, frequencies[slots]], 1).astype(np.uint32)
        return embedder

    def _counted(self, texts: Iterable[str]) -> tuple[np.ndarray, int]:
        frequencies, documents, cache = np.zeros(_SLOTS, np.int64), 0, _Cache(self.dimension)
        remaining = iter(texts)
        while block := list(itertools.islice(remaining, _BLOCK)):
            text_of, rows = cache.lookup(block)
            pairs = np.unique(text_of[:, None] * _SLOTS + cache.slots[rows])
            slots, counts = np.unique(pairs % _SLOTS, return_counts=True)
            frequencies[slots] += counts
            documents += len(block)
            if len(cache.rows) > _CACHED_WORDS:
                cache = _Cache(self.dimension)
        return frequencies, documents

    def _learn(self, frequencies: np.ndarray, documents: int) -> None:
        ratio = (documents + 1) / np.maximum(frequencies, 1)
        self._idf = np.where(frequencies > 0, np.log(ratio), 0.0)
        self._df, self.documents = frequencies.astype(np.uint32), documents
        self.fitted = documents > 0
        scheme = [self.name, 1, self.dimension, *_SCHEME, documents]
        self.fingerprint = digest(json_text(scheme), self._df.tobytes())

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dimension"]:
        """Embeds each text as a unit vector, or as zeros if it has no known word.

        Raises:
          RetrievalError: the embedder is not fitted.
        """
        self.check_fitted()
        starts = range(0, len(texts), _BLOCK)
        blocks = [self._embed_block(texts[start : start + _BLOCK]) for start in starts]
        return np.concatenate(blocks or [np.zeros((0, self.dimension), np.float32)])

    def _embed_block(self, texts: Sequence[str]) -> np.ndarray:
        cache = self._cache
        if len(cache.rows) > _CACHED_WORDS:
            cache = self._cache = _Cache(self.dimension)
        text_of, rows = cache.lookup(texts)
        capacity = len(cache.slots)
        pairs, counts = np.unique(text_of * capacity + rows, return_counts=True)
        text_of, rows = np.divmod(pairs, capacity)
        idf = self._idf[cache.slots[rows]]
        idf = np.repeat(idf, [_WORD_BUCKETS, _PREFIX_BUCKETS], axis=1)
        weights = np.round((1.0 + np.log(counts))[:, None] * idf * _EXACT) / _EXACT
        targets = text_of[:, None] * self.dimension + cache.buckets[rows]
        values = weights * cache.signs[rows]
        sums = np.bincount(targets.ravel(), values.ravel(), len(texts) * self.dimension)
        sums = sums.reshape(len(texts), self.dimension)
        norms = np.sqrt((sums * sums).sum(axis=1, keepdims=True))
        return (sums / np.where(norms == 0, 1.0, norms)).astype(np.float32)

    def save(self, folder: str | Path) -> None:
        """Writes the document frequencies and `embedder.json`; errors as in `embed`.

        An extension writes the frequencies in its own texts alone: an edit of a document costs a
        few kilobytes, not the table.
        """
        self.check_fitted()
        write_array(Path(folder) / _DF, self._df if self._added is None else self._added)
        super().save(folder)

    @classmethod
    def load(cls, *folders: str | Path) -> LexicalEmbedder:
        """Loads the embedder saved in the last folder, an extension of those before it.

        Raises `RetrievalError` if one is damaged, or of another hash scheme or dimension.
        """
        last, added = folders[-1], None
        frequencies = np.zeros(_SLOTS, np.int64)
        spec = read_spec(last)
        if any(read_spec(folder).get("dimension") != spec.get("dimension") for folder in folders):
            raise different_embedders()
        for folder in folders:
            with reading(folder):
                table = open_array(Path(folder) / _DF)
                if table.ndim == 2:
                    np.add.at(frequencies, table[:, 0], table[:, 1])
                    added = table
                else:  # of the base, or of an extension that was saved whole
                    frequencies, added = table.astype(np.int64), None
        with reading(last):
            embedder = cls(int(spec["dimension"]))
            embedder._learn(frequencies, int(spec["documents"]))
            embedder._added = added
            same = embedder.fingerprint == spec["fingerprint"]
        if not same:
            raise RetrievalError(
                f"the embedder in {last} is damaged or of another version of the hashing scheme;"
                " build the index again"
            )
        return embedder
