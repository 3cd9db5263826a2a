"""Generates text; every chunk reads the memories that `retrieval_schedule` assigns to it.

The device generates a whole chunk between two retrievals. With several groups of rows, it works on
one group while the host retrieves and loads the memories of another group, so that retrieval is
hidden behind computation; the texts do not depend on the groups.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from m3jax.errors import InferenceError
from m3jax.inference.memory_retrieval import MemoryRetrieval, MemoryRetriever, retrieval_schedule
from m3jax.inference.sampling import Sampling
from m3jax.model.attention_mask import ExplicitMemory
from m3jax.model.decode import Decoder, Written, unstack
from m3jax.model.kv_cache import State
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.text.tokenizer import BOS, END, PAD, Tokenizer

Listener = Callable[[int, str], None]  # takes prompt number and next piece of text


@dataclasses.dataclass(frozen=True)
class ChunkMemories:
    """Memories that one retrieval provided for a chunk.

    Attributes:
      retrieval: token positions of query, readers and generated tokens.
      query: text of the query.
      ids: references that were read, best first; −1 = none.
      reading: attention weight on each memory (last column: on everything else) of the queries that
        generated the chunk's tokens, mean over these tokens; `(L, K, G, M + 1)`, L memory layers.
        None if not observed, or if the chunk generated no tokens.
    """

    retrieval: MemoryRetrieval
    query: str
    ids: Int[np.ndarray, " M"]
    reading: Float[np.ndarray, "L K G columns"] | None = None


@dataclasses.dataclass(frozen=True)
class Generation:
    """Text generated for one prompt.

    Attributes:
      prompt: text of the prompt.
      prompt_tokens: its tokens with BOS.
      tokens: generated tokens, a stop token included.
      logprobs: natural logarithms of their probabilities, before temperature, top-k and top-p.
      text: text of the generated tokens.
      stopped: whether a stop token ended it.
      chunks: memories of every chunk; empty without memory.
      by_token: attention weight on each memory of the chunk (last column: on everything else) of
        the query that generated each token, mean over memory layers and heads; None if not
        observed.
    """

    prompt: str
    prompt_tokens: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, " new"]
    logprobs: Float[np.ndarray, " new"]
    text: str
    stopped: bool
    chunks: list[ChunkMemories]
    by_token: Float[np.ndarray, "new columns"] | None = None


@dataclasses.dataclass(frozen=True)
class _Call:
    """Arguments of one call of `Generator.generate`; `rows` are the prompts' tokens with BOS."""

    rows: list[np.ndarray]
    new: int
    piece: int
    row_ids: Sequence[int]
    before: int
    listener: Listener | None
    forced: Sequence[np.ndarray] | None
    references: Sequence[Sequence[np.ndarray]] | None
    against: Sequence[np.ndarray] | None


class Generator:
    """Generates text with one set of parameters.

    Attributes:
      first_token: seconds until every row had its first token, in the last call of `generate`.
      state_bytes: bytes on the device, in that call, of keys and values of the context and of the
        memories.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        memory_retriever: MemoryRetriever | None = None,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (END,),
        observe: bool = False,
        longest: int,
    ) -> None:
        """Prepares the parameters; programs are compiled by the first call of `generate`.

        Args:
          model: with the constant prefix, if memories are read; the axes of its mesh are `data` and
            `tensor`.
          params: its parameters.
          tokenizer: of the model.
          memory_retriever: retrieves and loads memories; None generates without memories.
          sampling: default greedy.
          stop: tokens that end a row.
          observe: report the attention that the memories received.
          longest: most tokens of prompt (with BOS) and text together.
        """
        self.model, self.tokenizer, self.memory_retriever = model, tokenizer, memory_retriever
        self.decoder = Decoder(
            model,
            sampling or Sampling(),
            stop=tuple(stop),
            pad=PAD,
            usable=tokenizer.size,
            dequantize=None if memory_retriever is None else memory_retriever.memories.dequantize,
            observe=observe and memory_retriever is not None,
        )
        self.params = jax.jit(lambda p: unstack(model, p))(params)
        self.chunk = model.memory.chunk_length
        self.longest, self.stop = longest, tuple(stop)
        self.first_token, self.state_bytes = 0.0, 0

    def generate(
        self,
        prompts: Sequence[str | np.ndarray],
        new: int,
        *,
        groups: int = 1,
        piece: int | None = None,
        listener: Listener | None = None,
        forced: Sequence[np.ndarray] | None = None,
        references: Sequence[Sequence[np.ndarray]] | None = None,
        against: Sequence[np.ndarray] | None = None,
        row_ids: Sequence[int] | None = None,
        before: int = 0,
    ) -> list[Generation]:
        """Continues prompts.

        Args:
          prompts: texts, or their tokens without BOS.
          new: most tokens to generate for each prompt.
          groups: number of groups of rows that take turns on the device.
          piece: tokens generated by one call of the device; default a chunk. Smaller pieces stream
            sooner.
          listener: called with the prompt's number and the next piece of its text.
          forced: for each prompt, tokens that the text must begin with, whatever the model would
            choose.
          references: for each prompt the reference ids `(M,)` of each of its retrievals, in place
            of a search.
          against: for each prompt the tokens that no reference may contain; see
            `MemoryRetriever.find`.
          row_ids: folded into the sampling key, so that a prompt's samples do not depend on its
            batch; default 0, 1, …
          before: number of tokens of these texts that earlier calls generated, which are folded in
            as well.

        Returns:
          One generation per prompt.

        Raises:
          InferenceError: no prompts, an empty prompt, `new` below 1, or a prompt that with `new`
            tokens is longer than `longest`.
        """
        call = _Call(
            rows=self._encode(prompts, new),
            new=new,
            piece=piece or self.chunk,
            row_ids=range(len(prompts)) if row_ids is None else row_ids,
            before=before,
            listener=listener,
            forced=forced,
            references=references,
            against=against,
        )
        begin, self.state_bytes = time.perf_counter(), 0
        parts = np.array_split(np.arange(len(prompts)), min(max(groups, 1), len(prompts)))
        row_groups = [_RowGroup(self, call, part.tolist()) for part in parts]
        running = [group.run() for group in row_groups]
        while running:
            running = [steps for steps in running if next(steps, None) is not None]
        self.first_token = max(group.first for group in row_groups) - begin
        return [row for group in row_groups for row in group.results(prompts)]

    def text(self, tokens: Int[np.ndarray, " n"]) -> str:
        """Decodes tokens to text."""
        return self.tokenizer.decode(tokens.tolist())

    def _encode(self, prompts: Sequence[str | np.ndarray], new: int) -> list[np.ndarray]:
        """Returns the tokens of each prompt, with BOS."""
        if not prompts:
            raise InferenceError("there are no prompts; give at least one")
        if new < 1:
            raise InferenceError(f"{new} new tokens; ask for at least 1")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(self.tokenizer.encode_batch(texts))
        rows: list[np.ndarray] = []
        for number, prompt in enumerate(prompts):
            tokens = next(encoded) if isinstance(prompt, str) else prompt
            if not len(tokens):
                raise InferenceError(f"prompt {number} is empty; give it some text")
            rows.append(np.concatenate([[BOS], tokens]).astype(np.int32))
            if len(rows[-1]) + new > self.longest:
                raise InferenceError(
                    f"prompt {number} has {len(rows[-1])} tokens; with {new} new ones it does not"
                    f" fit the model's context of {self.longest}: shorten it, ask for fewer, put"
                    " fewer references into it (the mode `rag`; --references), or make memories"
                    " of its older text (the mode `long_context`)"
                )
        return rows


class _RowGroup:
    """Group of rows that the device processes as one batch, from prompt to generation."""

    def __init__(self, generator: Generator, call: _Call, numbers: list[int]) -> None:
        """Prepares the prompts with these numbers; `run` generates."""
        self.generator, self.call, self.numbers = generator, call, numbers
        self.chunk, self.rows = generator.chunk, [call.rows[i] for i in numbers]
        self.first = 0.0  # time at which every row had its first token
        self.tokens = np.full((len(numbers), call.new), PAD, np.int32)
        self.logprobs = np.zeros((len(numbers), call.new), np.float32)
        self.chunks: list[list[ChunkMemories]] = [[] for _ in numbers]
        self.schedules = [retrieval_schedule(len(row), call.new, self.chunk) for row in self.rows]
        self.readings: list[tuple[int, Any]] = []  # index of a generated chunk, its attention
        M = 0 if generator.memory_retriever is None else generator.memory_retriever.count
        self.by_token = np.zeros((len(numbers), call.new, M + 1), np.float32)
        self._told = [""] * len(numbers)

    def run(self) -> Iterator[bool]:
        """Generates the texts; yields after each device call, so that other groups can run."""
        generator, chunk = self.generator, self.chunk
        state, written = self._prefill()
        generator.state_bytes += sum(x.nbytes for x in jax.tree.leaves(state))
        waiting: list[tuple[int, int, Written]] = [(0, 1, written)]
        done = 1
        yield True
        while done < self.call.new:
            memory = None
            if done % chunk == 0:
                self._collect(waiting)
                if np.isin(self.tokens[:, :done], generator.stop).any(axis=1).all():
                    break
                if generator.memory_retriever is not None:
                    memory = self._next_memories(done // chunk)
            count = min(self.call.piece, chunk - done % chunk, self.call.new - done)
            forced = self._forced(done, self.call.piece)
            state, written = generator.decoder.generate(
                generator.params, state, memory, np.int32(count), forced
            )
            self._collect(waiting)
            waiting.append((done, count, written))
            done += count
            yield True
        self._collect(waiting)

    def _prefill(self) -> tuple[State, Written]:
        """Runs the model on the prompts, with memories for each chunk; samples the first tokens."""
        generator, chunk = self.generator, self.chunk
        retriever = generator.memory_retriever
        lengths = np.array([len(row) for row in self.rows], np.int32)
        C = -(-int(lengths.max()) // chunk)
        tokens = np.full((len(self.rows), C * chunk), PAD, np.int32)
        for place, row in enumerate(self.rows):
            tokens[place, : len(row)] = row
        memory = None
        if retriever is not None:
            places = [(p, c) for p in range(len(self.rows)) for c in range(self._prompt_chunks(p))]
            texts = [self.rows[p][c * chunk : (c + 1) * chunk] for p, c in places]
            ids = np.full((len(self.rows), C, retriever.count), -1, np.int64)
            ids[tuple(np.array(places).T)] = self._retrieve(texts, places)
            memory = retriever.read(ids)
        return generator.decoder.prefill(
            generator.params,
            tokens,
            lengths,
            np.array([(self.call.row_ids[i], self.call.before) for i in self.numbers], np.int32),
            memory,
            self._forced(0, 1),
            slots=-(-self.call.new // chunk) * chunk,
        )

    def _next_memories(self, number: int) -> ExplicitMemory:
        """Reads the memories of generated chunk `number`, retrieved with the chunk before it."""
        assert self.generator.memory_retriever is not None
        texts = []
        for row in self.tokens[:, (number - 1) * self.chunk : number * self.chunk]:
            ended = np.isin(row, self.generator.stop).any()
            texts.append(row[:0] if ended or (row == PAD).all() else row)
        places = [(p, self._prompt_chunks(p) + number - 1) for p in range(len(self.rows))]
        return self.generator.memory_retriever.read(self._retrieve(texts, places))

    def _prompt_chunks(self, place: int) -> int:
        return -(-len(self.rows[place]) // self.chunk)

    def _retrieve(self, texts: list[np.ndarray], places: list[tuple[int, int]]) -> np.ndarray:
        """Returns reference ids of chunks; `places` are (row in the group, retrieval index)."""
        retriever, call = self.generator.memory_retriever, self.call
        assert retriever is not None
        numbers = [self.numbers[place] for place, _ in places]
        if call.references is not None:
            rows = [call.references[i][c] for i, (_, c) in zip(numbers, places, strict=True)]
            ids, queries = np.stack(rows).astype(np.int64), [retriever.text(t) for t in texts]
        else:
            against = None if call.against is None else [call.against[i] for i in numbers]
            ids, queries = retriever.find(texts, numbers, against)
        for (place, c), query, read in zip(places, queries, ids, strict=True):
            self.chunks[place].append(ChunkMemories(self.schedules[place][c], query, read))
        return ids

    def _forced(self, done: int, count: int) -> np.ndarray:
        """Returns forced tokens `(rows, count)` from index `done` on; −1 where none is forced."""
        forced = np.full((len(self.rows), count), -1, np.int32)
        if self.call.forced is not None:
            for place, number in enumerate(self.numbers):
                part = self.call.forced[number][done : done + count]
                forced[place, : len(part)] = part
        return forced

    def _collect(self, waiting: list[tuple[int, int, Written]]) -> None:
        """Copies the results in `waiting` to the host, calls the listener, empties `waiting`."""
        for done, count, written in waiting:
            self.tokens[:, done : done + count] = np.asarray(written.tokens)[:, :count]
            self.logprobs[:, done : done + count] = np.asarray(written.logprobs)[:, :count]
            if done == 0:
                self.first = time.perf_counter()
            if written.reading is not None and written.by_token is not None:
                self.readings.append((done // self.chunk, np.asarray(written.reading)))
                self.by_token[:, done : done + count] = np.asarray(written.by_token)[:, :count]
            if self.call.listener is not None:
                self._tell(self.call.listener, done + count)
        waiting.clear()

    def _length(self, place: int) -> tuple[int, bool]:
        """Returns the number of a row's tokens up to its stop token, and whether it has any."""
        ends = np.flatnonzero(np.isin(self.tokens[place], self.generator.stop))
        return (int(ends[0]) + 1, True) if len(ends) else (self.call.new, False)

    def _tell(self, listener: Listener, done: int) -> None:
        """Calls the listener with the text of each row that is new since the last call."""
        for place, number in enumerate(self.numbers):
            length = min(self._length(place)[0], done)
            text = self.generator.text(self.tokens[place, :length])
            if done < self.call.new:
                text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # an incomplete character
            before = self._told[place]
            if len(text) > len(before):
                listener(number, text[len(before) :])
                self._told[place] = text

    def results(self, prompts: Sequence[str | np.ndarray]) -> Iterator[Generation]:
        """Yields the generation of each row; valid once `run` has ended."""
        for place, number in enumerate(self.numbers):
            length, stopped = self._length(place)
            tokens, prompt = self.tokens[place, :length], prompts[number]
            yield Generation(
                prompt if isinstance(prompt, str) else self.generator.text(prompt),
                self.rows[place],
                tokens,
                self.logprobs[place, :length],
                self.generator.text(tokens),
                stopped,
                self._observed(place, length),
                None if not self.readings else self.by_token[place, :length],
            )

    def _observed(self, place: int, length: int) -> list[ChunkMemories]:
        """Returns the memories of the row's chunks up to its last token, with their attention."""
        prompt, end = len(self.rows[place]), len(self.rows[place]) + length
        total: dict[int, np.ndarray] = {}
        for number, reading in self.readings:
            total[number] = total.get(number, 0) + reading[place]
        chunks = []
        for index, chunk in enumerate(self.chunks[place]):
            low, high = chunk.retrieval.generates
            if low >= end and low > prompt:
                break
            number = index - self._prompt_chunks(place) + 1
            tokens = min(high, end) - low
            if number in total and tokens > 0:
                chunk = dataclasses.replace(chunk, reading=total[number] / tokens)
            chunks.append(chunk)
        return chunks
