"""Questions with one right continuation, answered with memories from a bank.

The prompt is cut into chunks; each retrieves `memory.per_prompt_chunk` memories with its own text,
and the answer's tokens read those of the last prompt chunk (Memory³ §3.5). A scored answer is
never part of a query.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.memory.bank import Bank
from m3jax.memory.layers import LayeredBank
from m3jax.model.attention import ExplicitMemory
from m3jax.model.transformer import Model, Params
from m3jax.retrieval.retriever import Retriever
from m3jax.text.documents import TextError
from m3jax.text.files import lines
from m3jax.text.references import References
from m3jax.text.tokenizer import BOS, PAD, Tokenizer


@dataclass(frozen=True)
class Question:
    """`answer` is the text that should follow `prompt`.

    `references` are keys of the references to read instead of retrieved ones.
    """

    prompt: str
    answer: str
    references: tuple[str, ...] = ()


class Rows(NamedTuple):
    """Questions as rows of tokens, all of one length."""

    tokens: np.ndarray  # (n, T) prompt and answer, the last answer token left out
    targets: np.ndarray  # (n, T)
    answer: np.ndarray  # (n, T) bool: the target is a token of the answer
    last_chunk: np.ndarray  # (n,) chunk of the last prompt token


def read_questions(path: str | Path) -> list[Question]:
    """Questions from JSON lines with `prompt`, `answer` and optional `references`."""
    questions = []
    for number, line in enumerate(lines(path), 1):
        try:
            record = json.loads(line)
            keys = tuple(record["references"]) if "references" in record else ()
            questions.append(Question(record["prompt"], record["answer"], keys))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise TextError(
                f"{path}:{number}: expected a JSON object with prompt and answer ({error!r})"
            ) from error
    if not questions:
        raise TextError(f"{path} holds no questions")
    return questions


class Answerer:
    """Scores questions with one set of parameters.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: of the model.
      batch_rows: questions scored at once.
    """

    def __init__(self, model: Model, params: Params, tokenizer: Tokenizer, batch_rows: int = 64):
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.batch_rows = batch_rows
        self._predict = jax.jit(functools.partial(_predict, model))
        self._observe = jax.jit(model.memory_attention, static_argnums=3)

    def rows(self, questions: Sequence[Question]) -> Rows:
        """Questions as token rows whose length is a multiple of the chunk length."""
        chunk = self.model.config.memory.chunk_length
        encoded = [
            (
                np.concatenate([[BOS], self.tokenizer.encode(q.prompt)]),
                self.tokenizer.encode(q.answer),
            )
            for q in questions
        ]
        longest = max(len(prompt) + len(answer) - 1 for prompt, answer in encoded)
        T = -(-longest // chunk) * chunk
        tokens, targets = np.full((2, len(questions), T), PAD, np.int32)
        answer_mask = np.zeros((len(questions), T), bool)
        for row, (prompt, answer) in enumerate(encoded):
            both = np.concatenate([prompt, answer])
            tokens[row, : len(both) - 1], targets[row, : len(both) - 1] = both[:-1], both[1:]
            answer_mask[row, len(prompt) - 1 : len(both) - 1] = True
        last = np.array([(len(prompt) - 1) // chunk for prompt, _ in encoded])
        return Rows(tokens, targets, answer_mask, last)

    def retrieve(self, questions: Sequence[Question], retriever: Retriever) -> np.ndarray:
        """References `(n, C, M)` each chunk of the questions' rows reads, −1 = none."""
        memory = self.model.config.memory
        rows = self.rows(questions)
        C = rows.tokens.shape[1] // memory.chunk_length
        ids = np.full((len(questions), C, memory.per_prompt_chunk), -1, np.int64)
        queries, places = [], []
        for row, question in enumerate(questions):
            prompt = np.concatenate([[BOS], self.tokenizer.encode(question.prompt)])
            for chunk in range(rows.last_chunk[row] + 1):
                low = chunk * memory.chunk_length
                queries.append(self.tokenizer.decode(prompt[low : low + memory.chunk_length]))
                places.append((row, chunk))
        found = retriever.retrieve(queries, None, memory.per_prompt_chunk)
        ids[tuple(np.array(places).T)] = found
        return self._inherit(ids, rows.last_chunk)

    def given(self, questions: Sequence[Question], references: References) -> np.ndarray:
        """References `(n, C, M)` from the questions' own keys, read by every chunk of the row."""
        rows = self.rows(questions)
        C = rows.tokens.shape[1] // self.model.config.memory.chunk_length
        ids = np.array([[references.find(key) for key in q.references] for q in questions])
        return np.repeat(ids[:, None], C, axis=1)

    def _inherit(self, ids: np.ndarray, last_chunk: np.ndarray) -> np.ndarray:
        """Chunks after the prompt read what its last chunk reads."""
        chunk = np.minimum(np.arange(ids.shape[1])[None], last_chunk[:, None])
        return np.take_along_axis(ids, chunk[..., None], axis=1)

    def correct(
        self,
        questions: Sequence[Question],
        ids: np.ndarray | None = None,
        bank: Bank | LayeredBank | None = None,
    ) -> np.ndarray:
        """Whether every token of the answer is the model's first choice, `(n,)` bool.

        Args:
          questions: the questions.
          ids: references `(n, C, M)` to read; None = no memory.
          bank: where their memories are.
        """
        rows, right = self.rows(questions), []
        for low in range(0, len(questions), self.batch_rows):
            part = slice(low, low + self.batch_rows)
            short = self.batch_rows - len(rows.tokens[part])
            tokens = np.pad(rows.tokens[part], ((0, short), (0, 0)))
            memory = None if ids is None else self._memory(ids[part], bank, short)
            predicted = np.asarray(self._predict(self.params, tokens, memory))
            hit = predicted[: self.batch_rows - short] == rows.targets[part]
            right.append(np.all(hit | ~rows.answer[part], axis=1))
        return np.concatenate(right)

    def first_choices(
        self, questions: Sequence[Question], ids: np.ndarray, bank: Bank
    ) -> tuple[list[str], np.ndarray]:
        """The likeliest token after each prompt, as text, and how it read the kept tokens.

        Returns:
          The tokens, and their attention on every memory slot, `(n, L, N, M, P)`, N query heads.
        """
        rows, memory = self.rows(questions), self._memory(ids, bank, 0)
        place = np.arange(len(questions)), rows.answer.argmax(axis=1)
        chosen = np.asarray(self._predict(self.params, rows.tokens, memory))[place]
        weights = np.asarray(self._observe(self.params, rows.tokens, memory, 1))
        weights = np.moveaxis(weights, 4, 1)[:, place[1], place[0]]  # (L, n, K, G, slots)
        L, n, K, G, _ = weights.shape
        C, M, P = *ids.shape[1:], self.model.config.memory.kept_tokens
        chunk = place[1] // self.model.config.memory.chunk_length
        weights = np.moveaxis(weights.reshape(L, n, K * G, C, M, P), 3, 1)[:, chunk, np.arange(n)]
        size = self.tokenizer.size  # the model may have more rows than the tokenizer has entries
        names = [self.tokenizer.decode([t]) if t < size else f"token {t}" for t in chosen.tolist()]
        return names, np.moveaxis(weights, 0, 1)

    def _memory(
        self, ids: np.ndarray, bank: Bank | LayeredBank | None, short: int
    ) -> ExplicitMemory:
        assert bank is not None
        padded = np.pad(ids, ((0, short), (0, 0), (0, 0)), constant_values=-1)
        return jax.tree.map(jnp.asarray, bank.read(padded))


def _predict(
    model: Model, params: Params, tokens: jax.Array, memory: ExplicitMemory | None
) -> jax.Array:
    return jnp.argmax(model.logits(params, tokens, memory, window=1), axis=-1)
