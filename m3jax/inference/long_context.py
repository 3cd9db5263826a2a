"""Generates from texts longer than the context, whose older part becomes memories.

When prompt and generated text outgrow the context, the oldest text is cut into references, the
writer turns them into memories, and the remaining chunks retrieve them like memories of a bank
(Memory³, discussion). Compute grows with the length of the text, not with its square.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32

from m3jax.errors import InferenceError
from m3jax.inference.generate import Generation, Generator, Listener
from m3jax.inference.memory_retrieval import MemoryRetrieval, MemoryRetriever
from m3jax.memory.reader import MemoryReader
from m3jax.retrieval.embedder import Embedder
from m3jax.text.documents import Document
from m3jax.text.reference_splitter import SHORTEST, Piece, cut_references
from m3jax.text.references import Reference
from m3jax.text.tokenizer import BOS, PAD, Tokenizer


@dataclasses.dataclass
class _Search:
    """Search index of one text's references; its embedder also knows the words of that text."""

    embedder: Embedder
    ids: np.ndarray
    embeddings: np.ndarray


class LongContextReferences:
    """Growing set of references cut from the older parts of texts; it is a `ReferenceTokens`.

    A search returns only references cut from the same text. Their keys are `text <number>#<n>`.

    Attributes:
      length: most tokens W of a reference.
    """

    def __init__(self, embedder: Embedder, length: int) -> None:
        """Makes an empty set.

        Args:
          embedder: embeds references and queries; for each text it is extended by the text's new
            words.
          length: most tokens W of a reference.
        """
        self.length, self._embedder = length, embedder
        self._references: list[Reference] = []
        self._text_of: list[int] = []
        self._searches: dict[int, _Search] = {}

    def add(self, text: int, pieces: Sequence[Piece]) -> None:
        """Adds pieces of text number `text` as references, after its earlier references."""
        if not pieces:
            return
        if text not in self._searches:
            nothing = np.zeros((0, self._embedder.dimension), np.float32)
            self._searches[text] = _Search(self._embedder, np.zeros(0, np.int64), nothing)
        search = self._searches[text]
        for n, piece in enumerate(pieces, len(search.ids)):
            where = (piece.start, piece.end, piece.text, piece.tokens)
            self._references.append(Reference(f"text {text}#{n}", "", "", *where))
            self._text_of.append(text)
        texts = [piece.text for piece in pieces]
        search.embedder = search.embedder.extended(texts)
        search.ids = np.append(search.ids, np.arange(len(self) - len(pieces), len(self)))
        search.embeddings = np.concatenate([search.embeddings, search.embedder.embed(texts)])

    def search(self, query: str, text: int, k: int) -> Int[np.ndarray, " k"]:
        """Returns the k references of text number `text` most like the query, best first.

        Only references of a positive score are returned; the other places are −1.
        """
        ids = np.full(k, -1, np.int64)
        search = self._searches.get(text)
        if search is not None:
            scores = search.embeddings @ search.embedder.embed_queries([query])[0]
            best = np.argsort(-scores, kind="stable")[:k]
            best = best[scores[best] > 0]
            ids[: len(best)] = search.ids[best]
        return ids

    def close(self, texts: Sequence[int]) -> None:
        """Frees the search indexes of these texts; their references stay."""
        for text in texts:
            self._searches.pop(text, None)

    def __len__(self) -> int:
        return len(self._references)

    def __getitem__(self, i: int | np.integer) -> Reference:
        return self._references[int(i)]

    def tokens(self, ids: Sequence[int] | np.ndarray) -> Int32[np.ndarray, "n W"]:
        """Returns the tokens of references, one row each, padded with PAD."""
        rows = np.full((len(ids), self.length), PAD, np.int32)
        for row, i in zip(rows, ids, strict=True):
            tokens = self._references[int(i)].tokens
            row[: len(tokens)] = tokens
        return rows

    @property
    def lengths(self) -> Int32[np.ndarray, " R"]:
        """Number of tokens of every reference."""
        return np.array([len(reference.tokens) for reference in self._references], np.int32)

    def documents(self) -> Int32[np.ndarray, " R"]:
        """Returns each reference's document number; successive references of a text share it."""
        begins = np.diff(np.array(self._text_of, np.int64), prepend=-1) != 0
        return np.cumsum(begins, dtype=np.int32) - np.int32(1)


class LongContextRetriever(MemoryRetriever):
    """Retrieves memories of references that were cut from the text itself.

    Attributes:
      references: cut from the texts.
      texts: for each prompt the number of its text in `references`.
    """

    def __init__(
        self,
        references: LongContextReferences,
        memories: MemoryReader,
        tokenizer: Tokenizer,
        count: int,
    ) -> None:
        """Combines references with the reader of their memories."""
        super().__init__(None, memories, tokenizer, count)
        self.references = references
        self.texts: Sequence[int] = ()

    def _search(
        self, queries: list[str], rows: list[int], against: list[np.ndarray] | None
    ) -> Int[np.ndarray, "n M"]:
        if against is not None:
            raise InferenceError("a text's own older part is not filtered by overlap")
        texts = [self.texts[row] for row in rows]
        search = self.references.search
        pairs = zip(queries, texts, strict=True)
        return np.stack([search(query, text, self.count) for query, text in pairs])


@dataclasses.dataclass
class _Text:
    """State of a growing text; its context begins at token `first`, character `begin`."""

    number: int
    tokens: np.ndarray
    begin: int = 0
    first: int = 0
    stopped: bool = False
    parts: list[Generation] = dataclasses.field(default_factory=list)


class LongContextGenerator:
    """Generates texts of any length from prompts of any length.

    Attributes:
      generator: generates each part of a text.
      references: cut from the texts so far; None without memory.
      window: tokens at the end of a text that stay in the context when the text outgrows it.
      length: most tokens of a reference.
    """

    def __init__(self, generator: Generator, window: int | None = None) -> None:
        """Checks that window, a reference and a new token fit the context.

        Args:
          generator: with a `LongContextRetriever`, or without memory: then older text is dropped.
          window: default half of the context. A reference that begins before the window and ends in
            it stays in the context as well.

        Raises:
          InferenceError: references that are too short or longer than `memory.reference_length`, or
            no room in the context for the window, a reference, BOS and a new token.
        """
        retriever, longest = generator.memory_retriever, generator.longest
        assert retriever is None or isinstance(retriever, LongContextRetriever)
        self.generator, self._retriever, self._texts = generator, retriever, 0
        self.references = None if retriever is None else retriever.references
        self.window = longest // 2 if window is None else window
        most = generator.model.memory.reference_length
        self.length = most if self.references is None else self.references.length
        if not SHORTEST <= self.length <= most:
            raise InferenceError(
                f"references of {self.length} tokens; take {SHORTEST} to {most}, the model's"
                " memory.reference_length"
            )
        most = longest - self.length - 3
        if not 1 <= self.window <= most:
            raise InferenceError(
                f"a window of {self.window} tokens, up to {self.length} of a reference that ends"
                f" in it, BOS and a new token do not fit the context of {longest}; take a window"
                f" from 1 to {most}, or shorter references"
                if most > 0
                else f"references of {self.length} tokens leave no room in a context of {longest};"
                " take shorter ones"
            )

    def generate(
        self,
        prompts: Sequence[str],
        new: int,
        *,
        groups: int = 1,
        piece: int | None = None,
        listener: Listener | None = None,
    ) -> list[Generation]:
        """Continues prompts; see `Generator.generate`.

        Token positions of retrievals count from the text's BOS, also where older text has become
        memories.
        """
        encoded = self.generator.tokenizer.encode_batch(list(prompts))
        texts = [_Text(self._texts + i, tokens) for i, tokens in enumerate(encoded)]
        self._texts += len(texts)
        done = 0
        while done < new and (running := [i for i, text in enumerate(texts) if not text.stopped]):
            parts = [texts[i] for i in running]
            for text in parts:
                self._forget(text, new - done)
            if self._retriever is not None:
                self._retriever.texts = [text.number for text in parts]
            tails = [text.tokens[text.first :] for text in parts]
            step = self.generator.longest - max(len(tail) for tail in tails) - 1
            step = max(1, min(new - done, step))
            generations = self.generator.generate(
                tails,
                step,
                groups=groups,
                piece=piece,
                listener=None if listener is None else _renumbered(listener, running),
                row_ids=[text.number for text in parts],
                before=done,
            )
            for text, part in zip(parts, generations, strict=True):
                text.parts.append(_moved(part, text.first))
                text.tokens = np.concatenate([text.tokens, part.tokens])
                text.stopped = part.stopped
            done += step
        if self.references is not None:
            self.references.close([text.number for text in texts])
        return [self._joined(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]

    def _forget(self, text: _Text, new: int) -> None:
        """Turns older text into memories if the text and `new` tokens would outgrow the context."""
        tokens, decode = text.tokens[text.first :], self.generator.text
        if len(tokens) + 1 + new <= self.generator.longest:
            return
        border = len(decode(tokens[: max(len(tokens) - self.window, 0)]))
        pieces = cut_references(Document("", decode(tokens)), self.generator.tokenizer, self.length)
        count = sum(piece.end <= border for piece in pieces)
        end = min([border, *(piece.start for piece in pieces[count : count + 1])])
        # A token that begins before `end` and ends after it stays in the context.
        numbers = range(len(tokens) + 1)
        taken = bisect.bisect_right(numbers, end, key=lambda n: len(decode(tokens[:n]))) - 1
        if self.references is not None:
            older = [
                dataclasses.replace(
                    piece, start=text.begin + piece.start, end=text.begin + piece.end
                )
                for piece in pieces[:count]
            ]
            self.references.add(text.number, older)
        text.begin, text.first = text.begin + len(decode(tokens[:taken])), text.first + taken

    def _joined(self, prompt: str, text: _Text) -> Generation:
        """Joins the parts of a text to one generation."""
        tokens = np.concatenate([part.tokens for part in text.parts])
        observed = [part.by_token for part in text.parts if part.by_token is not None]
        return Generation(
            prompt,
            np.concatenate([[BOS], text.tokens[: len(text.tokens) - len(tokens)]]).astype(np.int32),
            tokens,
            np.concatenate([part.logprobs for part in text.parts]),
            self.generator.text(tokens),
            text.stopped,
            [chunk for part in text.parts for chunk in part.chunks],
            np.concatenate(observed) if len(observed) == len(text.parts) else None,
        )


def _renumbered(listener: Listener, running: Sequence[int]) -> Listener:
    return lambda number, text: listener(running[number], text)


def _moved(part: Generation, first: int) -> Generation:
    """Shifts the token positions of a part so that they count from the BOS of the whole text."""
    chunks = []
    for chunk in part.chunks:
        spans = ((low + first, high + first) for low, high in chunk.retrieval)
        chunks.append(dataclasses.replace(chunk, retrieval=MemoryRetrieval(*spans)))
    return dataclasses.replace(part, chunks=chunks)
