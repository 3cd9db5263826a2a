"""Token corpus: one record `BOS text END` per document, in shards with random access."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from m3jax.errors import TextError
from m3jax.text.documents import Document, in_batches
from m3jax.text.records import Records, RecordWriter, dtype_of_tokens, told_losses
from m3jax.text.tokenizer import BOS, END, Tokenizer

_KIND = "corpus"


@dataclass(frozen=True)
class TokenDocument:
    """Holds a tokenized document.

    Attributes:
      tokens: `BOS text END`.
      weights: loss weight of every token *as a target*: 0 if it overlaps a `no_loss` span, else 1;
        None = all 1.
      references: keys of the references that the chunks read, one per chunk, if known in advance;
        "" = the chunk reads none, a last "*" = further chunks read the one before; () = not known.
      id: name of the document.
    """

    tokens: Int32[np.ndarray, " T"]
    weights: Float32[np.ndarray, " T"] | None
    references: tuple[str, ...]
    id: str = ""

    def encoded(self, text: str, tokenizer: Tokenizer) -> EncodedDocument:
        """Encodes the document as a record; `text` is its text, to count characters and bytes."""
        data = self.tokens.astype(dtype_of_tokens(tokenizer.size)).tobytes()
        record: dict[str, Any] = {"id": self.id, "tokens": data}
        if self.weights is not None:
            record["weights"] = self.weights.astype(np.uint8).tobytes()
        if self.references:
            record["references"] = list(self.references)
        sizes = len(self.tokens), len(text), len(text.encode())
        return EncodedDocument(record, *sizes, tokenizer.lost(text))


class EncodedDocument(NamedTuple):
    """Holds the record of a document as the corpus stores it, and its counts.

    `lost` counts characters with bytes that the tokenizer lacks.
    """

    record: dict[str, Any]
    tokens: int
    characters: int
    bytes: int
    lost: int


class CorpusWriter(RecordWriter):
    """Writes a corpus document by document; `commit` finishes it.

    It replaces any corpus in the folder. `lengths.bin` holds the number of tokens of every document
    (int64).
    """

    def __init__(self, folder: str | os.PathLike[str], tokenizer: Tokenizer, shards: int) -> None:
        super().__init__(folder, shards, ["lengths.bin"])
        self._tokenizer = tokenizer
        self._counts: Counter[str] = Counter()

    def append(self, document: EncodedDocument) -> None:
        """Appends a document."""
        self.write(document.record, lengths=document.tokens.to_bytes(8, "little"))
        _, tokens, characters, size, lost = document
        self._counts.update(tokens=tokens, characters=characters, text_bytes=size)
        if lost:
            self._counts.update(lost_characters=lost, lossy_documents=1)

    def commit(self) -> None:
        """Finishes the corpus; raises `TextError` if it has no document."""
        if not self.count:
            raise TextError(f"no documents for {self.folder}; give documents with text")
        dtype = dtype_of_tokens(self._tokenizer.size).str
        made = {"tokenizer": self._tokenizer.fingerprint, "dtype": dtype}
        self.finish(_KIND, {**made, **self._counts})


def write_corpus(
    documents: Iterable[EncodedDocument],
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    shards: int,
) -> None:
    """Writes the documents of `encode_documents` as a corpus; `TextError` if there are none."""
    with CorpusWriter(folder, tokenizer, shards) as writer:
        for document in documents:
            writer.append(document)
        writer.commit()


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[EncodedDocument]:
    """Tokenizes documents, about a million characters at a time.

    Raises `TextError` if a `no_loss` span is outside its document's text.
    """
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
            yield encoded.encoded(document.text, tokenizer)


def _target_weights(document: Document, spans: np.ndarray) -> np.ndarray:
    """Returns the loss weights (T,): 0 for tokens that overlap a `no_loss` span, else 1."""
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


class Corpus(Records):
    """Reads the documents of a corpus by index, in any order. Thread-safe.

    Attributes:
      lengths: number of tokens of every document, with `BOS` and `END`; int64 (documents,).
      fingerprint: hex hash of all documents and the tokenizer.
      tokenizer_fingerprint: fingerprint of the tokenizer that the corpus was made with.
      folder: folder of the corpus.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fetch: Callable[[list[str]], None] | None = None,
    ) -> None:
        """Opens a corpus that `write_corpus` wrote; `fetch` and `TextError` as of `Records`."""
        super().__init__(folder, _KIND, fetch)
        self._dtype = np.dtype(self.manifest["dtype"])
        self.lengths = self.side_file("lengths.bin", "<i8")
        self.fingerprint: str = self.manifest["fingerprint"]
        self.tokenizer_fingerprint: str = self.manifest["tokenizer"]

    def info(self) -> str:
        """Formats the counts of documents, tokens, characters and bytes per token."""
        tokens, characters = self.manifest["tokens"], self.manifest["characters"]
        ratio = self.manifest["text_bytes"] / max(tokens, 1)
        counts = f"{len(self)} documents, {tokens} tokens, {characters} characters"
        return f"{counts}, {ratio:.2f} bytes per token{told_losses(self.manifest, 'documents')}"

    def __getitem__(self, i: int | np.integer) -> TokenDocument:
        record = self.read([int(i)])[0]
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
