"""Token corpus: one record a document, `BOS text END`, in shards that are read at random."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from m3jax.errors import TextError
from m3jax.text.documents import Document, in_batches
from m3jax.text.records import Records, RecordWriter, dtype_of_tokens
from m3jax.text.tokenizer import BOS, END, Tokenizer

_KIND = "corpus"


@dataclass(frozen=True)
class CorpusInfo:
    """Holds the counts of a corpus. `bytes` is the UTF-8 size of the text."""

    documents: int
    tokens: int
    characters: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.documents} documents, {self.tokens} tokens, {self.characters} characters,"
            f" {self.bytes / max(self.tokens, 1):.2f} bytes per token"
        )


@dataclass(frozen=True)
class TokenDocument:
    """Holds a document as tokens.

    Attributes:
      tokens: `BOS text END`.
      weights: loss weight of every token *as a target*: 0 where it touches a `no_loss` span, else
        1; None = all 1.
      references: keys of references known in advance, one per chunk; "" = none; () = not known.
      id: name of the document.
    """

    tokens: Int32[np.ndarray, " T"]
    weights: Float32[np.ndarray, " T"] | None
    references: tuple[str, ...]
    id: str = ""


@dataclass(frozen=True)
class EncodedDocument:
    """Holds a document as its record will be, and its counts."""

    record: dict[str, Any]
    tokens: int
    characters: int
    bytes: int

    @classmethod
    def of(cls, document: TokenDocument, text: str, dtype: np.dtype) -> EncodedDocument:
        """Makes the record of a document; `text` is what its tokens say, for the counts."""
        tokens, weights = document.tokens, document.weights
        record: dict[str, Any] = {"id": document.id, "tokens": tokens.astype(dtype).tobytes()}
        if weights is not None:
            record["weights"] = weights.astype(np.uint8).tobytes()
        if document.references:
            record["references"] = list(document.references)
        return cls(record, len(tokens), len(text), len(text.encode()))


class CorpusWriter:
    """Writes a corpus document by document, replacing the folder's; `finish` commits it.

    Document i is record i // S of shard i % S, for S = `shards` or fewer. `lengths.bin` holds the
    tokens of every document (int64); `manifest.json`, with the tokenizer's fingerprint, is written
    last. A context manager: an error leaves no temporary files.
    """

    def __init__(self, folder: str | os.PathLike[str], tokenizer: Tokenizer, shards: int) -> None:
        self.folder, self._tokenizer = folder, tokenizer
        self._dtype = dtype_of_tokens(tokenizer.size)
        self._writer = RecordWriter(folder, shards, ["lengths.bin"])
        self._tokens = self._characters = self._bytes = 0

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    def write(self, document: TokenDocument, text: str) -> None:
        """Appends a document; `text` is what its tokens say, for the counts."""
        self.append(EncodedDocument.of(document, text, self._dtype))

    def append(self, document: EncodedDocument) -> None:
        """Appends a document."""
        self._writer.write(document.record, lengths=document.tokens.to_bytes(8, "little"))
        self._tokens += document.tokens
        self._characters += document.characters
        self._bytes += document.bytes

    def finish(self) -> CorpusInfo:
        """Commits the corpus; raises `TextError` if it has no document."""
        if not self._writer.count:
            raise TextError(f"no documents for {self.folder}; give documents with text")
        content = {
            "tokenizer": self._tokenizer.fingerprint,
            "dtype": self._dtype.str,
            "tokens": self._tokens,
            "characters": self._characters,
            "text_bytes": self._bytes,
        }
        self._writer.finish(_KIND, content)
        return CorpusInfo(self._writer.count, self._tokens, self._characters, self._bytes)


def write_corpus(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    shards: int,
) -> CorpusInfo:
    """Tokenizes documents, a million characters at a time, and writes them by `CorpusWriter`.

    Raises:
      TextError: no documents, or a `no_loss` span outside its text.
    """
    return write_encoded(encode_documents(documents, tokenizer), tokenizer, folder, shards)


def write_encoded(
    documents: Iterable[EncodedDocument],
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    shards: int,
) -> CorpusInfo:
    """Writes what `encode_documents` yields by `CorpusWriter`."""
    with CorpusWriter(folder, tokenizer, shards) as writer:
        for document in documents:
            writer.append(document)
        return writer.finish()


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[EncodedDocument]:
    """Tokenizes documents, about a million characters at a time.

    Raises:
      TextError: a `no_loss` span outside its text.
    """
    dtype = dtype_of_tokens(tokenizer.size)
    for batch in in_batches(documents):
        plain = iter(tokenizer.encode_batch([d.text for d in batch if not d.no_loss]))
        for document in batch:
            weights = None
            if document.no_loss:
                ids, spans = tokenizer.encode_with_offsets(document.text)
                goes_on = (len(document.text),) * 2 in document.no_loss
                weights = np.concatenate([[1], _target_weights(document, spans), [not goes_on]])
                weights = weights.astype(np.float32)
            else:
                ids = next(plain)
            tokens = np.concatenate([[BOS], ids, [END]]).astype(np.int32)
            encoded = TokenDocument(tokens, weights, document.references, document.id)
            yield EncodedDocument.of(encoded, document.text, dtype)


def _target_weights(document: Document, spans: np.ndarray) -> np.ndarray:
    """Returns 0 for tokens that share a character with a `no_loss` span, else 1; (T,)."""
    hidden = np.zeros(len(document.text) + 1, np.int64)
    for start, end in document.no_loss:
        if not 0 <= start <= end <= len(document.text):
            raise TextError(
                f"document {document.id!r}: no_loss span ({start}, {end}) is outside its"
                f" {len(document.text)} characters"
            )
        hidden[start + 1 : end + 1] = 1
    before = np.cumsum(hidden)  # hidden characters before each position
    return (before[spans[:, 1]] == before[spans[:, 0]]).astype(np.uint8)


class Corpus:
    """Reads the documents of a corpus at random. Safe to use from several threads.

    Attributes:
      lengths: tokens of every document, `BOS` and `END` included; int64 (documents,).
      total_tokens: their sum.
      fingerprint: hex hash of all documents and the tokenizer.
      tokenizer_fingerprint: of the tokenizer the corpus was made with.
      folder: where it is.
    """

    def __init__(self, records: Records) -> None:
        self._records, self.folder = records, records.folder
        self._dtype = np.dtype(records.manifest["dtype"])
        self.lengths = np.fromfile(records.folder / "lengths.bin", "<i8")
        self.total_tokens: int = records.manifest["tokens"]
        self.fingerprint: str = records.manifest["fingerprint"]
        self.tokenizer_fingerprint: str = records.manifest["tokenizer"]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Corpus:
        """Opens what `write_corpus` wrote; raises `TextError` for an unfinished or cut one."""
        return cls(Records(folder, _KIND))

    def verify(self) -> None:
        """Reads all bytes and compares checksums; raises `TextError` naming a damaged file."""
        self._records.verify()

    def info(self) -> CorpusInfo:
        """Returns the counts that `write_corpus` returned."""
        m = self._records.manifest
        return CorpusInfo(m["count"], m["tokens"], m["characters"], m["text_bytes"])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int | np.integer) -> TokenDocument:
        record = self._records.read([int(i)])[0]
        weights = None
        if "weights" in record:
            weights = np.frombuffer(record["weights"], np.uint8).astype(np.float32)
        return TokenDocument(
            tokens=np.frombuffer(record["tokens"], self._dtype).astype(np.int32),
            weights=weights,
            references=tuple(record.get("references", ())),
            id=record["id"],
        )

    def __iter__(self) -> Iterator[TokenDocument]:
        return map(self.__getitem__, range(len(self)))
