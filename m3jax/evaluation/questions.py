"""Scores questions with one right continuation, answered with memories from a bank.

The prompt is cut into chunks; each retrieves `memory.per_prompt_chunk` memories with its own text,
and the answer's tokens read those of the last prompt chunk (Memory³ §3.5). A scored answer is
never part of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m3jax.evaluation.scoring import Pair, Scorer, as_rows
from m3jax.memory.bank import Bank
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.retrieval.retriever import Retriever
from m3jax.text.jsonl import read_records
from m3jax.text.references import References
from m3jax.text.tokenizer import BOS, Tokenizer


@dataclass(frozen=True)
class Question:
    """Question whose `answer` is the text that should follow `prompt`.

    `references` are keys of the references to read instead of retrieved ones.
    """

    prompt: str
    answer: str
    references: tuple[str, ...] = ()


def read_questions(path: str | Path) -> list[Question]:
    """Reads questions from JSON lines with `prompt`, `answer` and optional `references`."""

    def parse(record: Any) -> Question:
        return Question(record["prompt"], record["answer"], tuple(record.get("references", ())))

    return read_records(path, parse, "questions", "a JSON object with prompt and answer")


class Answerer:
    """Scores questions with one set of parameters.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: of the model.
      longest: tokens of a row, see `Scorer`.
      batch_size: questions scored at once.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        longest: int,
        batch_size: int = 64,
    ):
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.scorer = Scorer(model, params, tokenizer, longest, batch_size)
        self._logits = jax.jit(lambda p, tokens, memory: model.logits(p, tokens, memory, window=1))
        self._observe = jax.jit(model.memory_attention, static_argnums=3)

    def pairs(self, questions: Sequence[Question]) -> list[Pair]:
        """Encodes prompts and answers."""
        prompts = self.tokenizer.encode_batch([q.prompt for q in questions])
        answers = self.tokenizer.encode_batch([q.answer for q in questions])
        begin = np.array([BOS], np.int32)
        return [Pair(np.concatenate([begin, p]), a) for p, a in zip(prompts, answers, strict=True)]

    def retrieve(self, questions: Sequence[Question], retriever: Retriever) -> np.ndarray:
        """Retrieves references `(n, C, M)` for each chunk of the questions' rows, −1 = none."""
        pairs = self.pairs(questions)
        retrieved = self.scorer.retrieve([pair.context for pair in pairs], retriever)
        chunk = np.arange(self._chunks(pairs))
        return np.stack([ids[np.minimum(chunk, len(ids) - 1)] for ids in retrieved])

    def given(self, questions: Sequence[Question], references: References) -> np.ndarray:
        """Finds references `(n, C, M)` by the questions' own keys, for every chunk of the row."""
        ids = np.array([[references.find(key) for key in q.references] for q in questions])
        return np.repeat(ids[:, None], self._chunks(self.pairs(questions)), axis=1)

    def _chunks(self, pairs: Sequence[Pair]) -> int:
        """Chunks of the longest row."""
        longest = max(len(context) + len(answer) - 1 for context, answer in pairs)
        return -(-longest // self.model.memory.chunk_length)

    def correct(
        self,
        questions: Sequence[Question],
        ids: np.ndarray | None = None,
        bank: Bank | None = None,
    ) -> np.ndarray:
        """Tells if every token of the answer is the model's first choice, `(n,)` bool.

        Args:
          questions: the questions.
          ids: references `(n, C, M)` to read; None = no memory.
          bank: where their memories are.
        """
        return self.scorer.score(
            self.pairs(questions), None if ids is None else [*ids], bank
        ).greedy

    def first_choices(
        self, questions: Sequence[Question], ids: np.ndarray, bank: Bank
    ) -> tuple[list[str], np.ndarray]:
        """Returns the likeliest token after each prompt, as text, and its attention on memories.

        Returns:
          The tokens, and their attention on every memory slot, `(n, L, N, M, P)`, N query heads.
        """
        rows = as_rows(self.pairs(questions), self.model.memory.chunk_length)
        memory = jax.tree.map(jnp.asarray, bank.read(ids))
        place = np.arange(len(questions)), rows.place[:, 0]
        logits = self._logits(self.params, rows.tokens, memory)
        chosen = np.asarray(jnp.argmax(logits, axis=-1))[place]
        weights = np.asarray(self._observe(self.params, rows.tokens, memory, 1))
        weights = np.moveaxis(weights, 4, 1)[:, place[1], place[0]]  # (L, n, K, G, slots)
        L, n, K, G, _ = weights.shape
        C, M, P = *ids.shape[1:], self.model.memory.kept_tokens
        chunk = place[1] // self.model.memory.chunk_length
        weights = np.moveaxis(weights.reshape(L, n, K * G, C, M, P), 3, 1)[:, chunk, np.arange(n)]
        size = self.tokenizer.size  # the model may have more rows than the tokenizer has entries
        names = [self.tokenizer.decode([t]) if t < size else f"token {t}" for t in chosen.tolist()]
        return names, np.moveaxis(weights, 0, 1)
