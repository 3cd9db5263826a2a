"""Scores continuations, such as answers to questions, with memories that their contexts retrieve.

The context is cut into chunks; each chunk retrieves `memory.per_prompt_chunk` references with its
own text, and the continuation reads the memories of the last chunk (Memory³ §3.5).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float64, Int
from tqdm import tqdm

from m3jax.errors import InferenceError
from m3jax.evaluation.questions import Question
from m3jax.memory.reader import MemoryReader
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.retrieval.retriever import Retriever
from m3jax.text.references import References
from m3jax.text.tokenizer import BOS, PAD, Tokenizer

_BLOCK = 32  # continuation tokens whose logits are computed at once
_QUERIES = 1024  # queries searched at once


class Pair(NamedTuple):
    """Tokens of a context, BOS first, and of its continuation; neither is empty."""

    context: np.ndarray
    continuation: np.ndarray


def fit(
    context: Sequence[int] | np.ndarray, continuation: Sequence[int] | np.ndarray, longest: int
) -> tuple[Pair, bool]:
    """Puts BOS in front of a context and cuts its beginning, so that a row holds the pair.

    Args:
      context: tokens without BOS.
      continuation: tokens to score.
      longest: tokens of a row; the last token of the continuation is only scored.

    Returns:
      The pair, and whether the context was cut.

    Raises:
      InferenceError: the continuation is empty or longer than a row.
    """
    room = longest - len(continuation)
    if not len(continuation) or room < 0:
        raise InferenceError(
            f"a continuation of {len(continuation)} tokens cannot be scored in rows of {longest};"
            " leave it out, or raise data.sequence_length"
        )
    kept = np.asarray(context, np.int32)[max(0, len(context) - room) :]
    begin = np.array([BOS], np.int32)
    pair = Pair(np.concatenate([begin, kept]), np.asarray(continuation, np.int32))
    return pair, len(context) > room


class Rows(NamedTuple):
    """Pairs laid out as rows of one length T, with up to A continuation tokens."""

    tokens: np.ndarray  # (n, T) context and continuation without the last token, padded
    place: np.ndarray  # (n, A) position that predicts each continuation token
    target: np.ndarray  # (n, A) continuation tokens
    real: np.ndarray  # (n, A) bool: not padding


class Scores(NamedTuple):
    """Scores of n continuations: log-probability in nats; whether all tokens are first choices."""

    logprob: Float64[np.ndarray, " n"]
    greedy: Bool[np.ndarray, " n"]


def as_rows(pairs: Sequence[Pair], chunk: int, most: int = 0) -> Rows:
    """Lays pairs out as rows.

    Args:
      pairs: contexts and continuations.
      chunk: T is a multiple of this: 1, 2, 3, 4, 6, 8, 12, … chunks, so that few lengths occur.
      most: T does not exceed this, unless a pair is longer.
    """
    longest = max(len(context) + len(continuation) - 1 for context, continuation in pairs)
    chunks = -(-longest // chunk)
    power = _power_of_two(chunks)
    few = 3 * power // 4 if power >= 4 and chunks <= 3 * power // 4 else power
    T = max(chunks, min(few, most // chunk)) * chunk
    A = _power_of_two(max(len(continuation) for _, continuation in pairs))
    n = len(pairs)
    tokens = np.full((n, T), PAD, np.int32)
    place, target = np.zeros((2, n, A), np.int32)
    real = np.zeros((n, A), bool)
    for row, (context, continuation) in enumerate(pairs):
        both, count = np.concatenate([context, continuation]), len(continuation)
        tokens[row, : len(both) - 1] = both[:-1]
        place[row, :count] = len(context) - 1 + np.arange(count)
        target[row, :count], real[row, :count] = continuation, True
    return Rows(tokens, place, target, real)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


class Scorer:
    """Scores continuations with one set of parameters.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: of the model.
      longest: most tokens of a row, which only longer pairs exceed.
      batch_size: number of rows scored at once.
    """

    def __init__(
        self, model: Model, params: Params, tokenizer: Tokenizer, longest: int, batch_size: int = 64
    ):
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.longest, self.batch_size = longest, batch_size
        self._program = jax.jit(functools.partial(_score, model))

    def retrieve(
        self,
        contexts: Sequence[np.ndarray],
        retriever: Retriever,
        against: Sequence[np.ndarray] | None = None,
        *,
        shift: int = 0,
    ) -> list[Int[np.ndarray, "_ M"]]:
        """Retrieves references for each chunk of each context, best first, −1 = none.

        Args:
          contexts: tokens of each context.
          retriever: searches the references.
          against: for each context the tokens that no reference may contain; None = no filter.
          shift: 0: the query of a chunk is its own text; 1: the text of the chunk before.
        """
        memory = self.model.memory
        chunk, M = memory.chunk_length, memory.per_prompt_chunk
        ids_of = [np.full((-(-len(row) // chunk), M), -1, np.int64) for row in contexts]
        searches = []
        for number, row in enumerate(contexts):
            for c in range(shift, len(ids_of[number])):
                low = (c - shift) * chunk
                query = self.tokenizer.decode(row[low : low + chunk])
                if query.strip():
                    searches.append((number, c, query))
        for low in range(0, len(searches), _QUERIES):
            part = searches[low : low + _QUERIES]
            texts = None if against is None else [against[number] for number, _, _ in part]
            ids = retriever.retrieve([query for _, _, query in part], texts, M)
            for (number, c, _), read in zip(part, ids, strict=True):
                ids_of[number][c] = read
        return ids_of

    def score(
        self,
        pairs: Sequence[Pair],
        ids: Sequence[Int[np.ndarray, "_ M"]] | None = None,
        bank: MemoryReader | None = None,
        *,
        progress: str = "",
    ) -> Scores:
        """Scores continuations; pairs of similar length run together.

        Args:
          pairs: contexts and continuations.
          ids: for each pair the references that its chunks read; chunks beyond these read the
            references of the last. None = no memory.
          bank: holds the memories of the references.
          progress: name of a progress bar; "" shows none.

        Raises:
          InferenceError: an empty continuation, all of whose tokens would be first choices.
        """
        if not all(len(pair.continuation) for pair in pairs):
            raise InferenceError("an empty continuation cannot be scored")
        logprob, greedy = np.zeros(len(pairs)), np.zeros(len(pairs), bool)
        order = np.argsort([-len(c) - len(t) for c, t in pairs], kind="stable")
        starts = range(0, len(pairs), self.batch_size)
        for low in tqdm(starts, desc=progress, unit="batch", disable=not progress):
            part = order[low : low + self.batch_size].tolist()
            part += part[-1:] * (self.batch_size - len(part))
            chunk = self.model.memory.chunk_length
            rows = as_rows([pairs[i] for i in part], chunk, self.longest)
            memory = None if ids is None else self._memory([ids[i] for i in part], bank, rows)
            scored = self._program(self.params, rows.tokens, rows.place, rows.target, memory)
            tokens, first = (np.asarray(x) for x in scored)
            logprob[part] = np.where(rows.real, tokens, 0).sum(axis=1, dtype=np.float64)
            greedy[part] = np.all(first | ~rows.real, axis=1)
        return Scores(logprob, greedy)

    def _memory(
        self, ids: Sequence[np.ndarray], bank: MemoryReader | None, rows: Rows
    ) -> ExplicitMemory:
        assert bank is not None
        chunks = np.arange(rows.tokens.shape[1] // self.model.memory.chunk_length)
        stacked = np.stack([row[np.minimum(chunks, len(row) - 1)] for row in ids])
        return jax.tree.map(jnp.asarray, bank.read(stacked))


class Answerer(Scorer):
    """Scores answers to questions as continuations of their prompts."""

    def pairs(self, questions: Sequence[Question]) -> list[Pair]:
        """Encodes prompts and answers as pairs.

        Raises `InferenceError` if a prompt with its answer is longer than a row.
        """
        prompts = self.tokenizer.encode_batch([q.prompt for q in questions])
        answers = self.tokenizer.encode_batch([q.answer for q in questions])
        pairs = []
        for prompt, answer in zip(prompts, answers, strict=True):
            pair, cut = fit(prompt, answer, self.longest)
            if cut:
                raise InferenceError(
                    f"a prompt of {len(prompt)} tokens and its answer of {len(answer)} do not fit"
                    f" the model's context of {self.longest}; shorten it, or raise"
                    " data.sequence_length"
                )
            pairs.append(pair)
        return pairs

    def search(
        self, questions: Sequence[Question], retriever: Retriever
    ) -> list[Int[np.ndarray, "_ M"]]:
        """Retrieves references for each chunk of each prompt, −1 = none.

        References that overlap with the prompt are dropped, as the retriever's limit says.
        """
        contexts = [pair.context for pair in self.pairs(questions)]
        return self.retrieve(contexts, retriever, [context[1:] for context in contexts])

    def look_up(
        self, questions: Sequence[Question], references: References
    ) -> Int[np.ndarray, "n 1 M"]:
        """Returns the ids of the references that the questions name; all chunks of a row read them.

        Raises `TextError` for a key that no live reference has.
        """
        return np.array([[[references.find(key) for key in q.references]] for q in questions])

    def correct(
        self,
        questions: Sequence[Question],
        ids: Sequence[Int[np.ndarray, "_ M"]] | Int[np.ndarray, "n 1 M"] | None = None,
        bank: MemoryReader | None = None,
    ) -> Bool[np.ndarray, " n"]:
        """Returns for each question whether every token of the answer is the model's first choice.

        Args:
          questions: n questions.
          ids: references to read, of `search` or `look_up`; None = no memory.
          bank: holds their memories.
        """
        return self.score(self.pairs(questions), None if ids is None else [*ids], bank).greedy

    def first_choices(
        self, questions: Sequence[Question], ids: Int[np.ndarray, "n 1 M"], bank: MemoryReader
    ) -> tuple[list[str], np.ndarray]:
        """Returns the likeliest token after each prompt and its attention on memories.

        Returns:
          The tokens as text, and the attention of the query that predicts them on every memory
          slot, `(n, L, N, M, P)`, L memory layers, N query heads.
        """
        rows = as_rows(self.pairs(questions), self.model.memory.chunk_length)
        memory = self._memory([*ids], bank, rows)
        place = np.arange(len(questions)), rows.place[:, 0]
        logits = jax.jit(self.model.logits, static_argnames="window")(
            self.params, rows.tokens, memory, window=1
        )
        chosen = np.asarray(jnp.argmax(logits, axis=-1))[place]
        observe = jax.jit(self.model.memory_attention, static_argnums=3)
        weights = np.asarray(observe(self.params, rows.tokens, memory, 1))
        weights = np.moveaxis(weights, 4, 1)[:, place[1], place[0]]
        L, n, K, G, *slots = weights.shape  # slots: C, M, P
        chunk = place[1] // self.model.memory.chunk_length
        weights = np.moveaxis(weights.reshape(L, n, K * G, *slots), 3, 1)[:, chunk, np.arange(n)]
        size = self.tokenizer.size  # the model's vocabulary may be padded
        names = [self.tokenizer.decode([t]) if t < size else f"token {t}" for t in chosen.tolist()]
        return names, np.moveaxis(weights, 0, 1)


def _score(
    model: Model,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    place_BA: Int[Array, "B A"],
    target_BA: Int[Array, "B A"],
    memory: ExplicitMemory | None,
) -> tuple[Array, Array]:
    """Computes the log-probability of each target, and whether it is the first choice, `(B, A)`."""
    hidden = model.hidden(params, tokens_BT, memory, window=1)
    hidden_BAD = jnp.take_along_axis(hidden, place_BA[..., None], axis=1)
    B, A, _ = hidden_BAD.shape

    def blocks(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(B, -1, min(A, _BLOCK), *x.shape[2:]), 1, 0)

    def score_block(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        logits, target = model.head(params, inputs[0]), inputs[1]
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(logprobs, target[..., None], axis=-1)[..., 0]
        return chosen, jnp.argmax(logits, axis=-1) == target

    scored = jax.lax.map(score_block, (blocks(hidden_BAD), blocks(target_BA)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, A), scored)
