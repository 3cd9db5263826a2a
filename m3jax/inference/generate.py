"""Generates text, recalling memories as `schedule` says.

The device generates a whole chunk between two recalls. With several groups of rows it works on one
while the host finds and loads the memories of another, so that a recall costs no time; every row's
text is the same either way.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from m3jax.inference.errors import InferenceError
from m3jax.inference.recall import Recaller
from m3jax.inference.sampling import Sampling
from m3jax.inference.schedule import Recall, schedule
from m3jax.model.decode import Decoder, State, Written, unstack
from m3jax.model.transformer import Model, Params
from m3jax.text.tokenizer import BOS, END, PAD, Tokenizer

Listener = Callable[[int, str], None]  # number of a row, and more of its text


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What was recalled at one place of a row.

    Attributes:
      recall: where; see `schedule`.
      query: the text that was searched for.
      ids: references that were read, best first; −1 = none.
      reading: attention weight that each memory received of the queries that generated the chunk's
        tokens, and everything else in the last column, mean over these tokens; `(L, K, G, M + 1)`,
        L memory layers. None unless observed, and for prompt chunks.
    """

    recall: Recall
    query: str
    ids: Int[np.ndarray, " M"]
    reading: Float[np.ndarray, "L K G columns"] | None = None


@dataclasses.dataclass(frozen=True)
class Generation:
    """One row.

    Attributes:
      prompt: its text.
      prompt_tokens: with BOS.
      tokens: what was generated, a stop token included.
      logprobs: of these, natural logarithm, before temperature and cuts.
      text: what was generated.
      stopped: whether a stop token ended it.
      chunks: what was recalled; empty without memory.
      by_token: attention weight on each memory of the chunk, and on everything else, of the query
        that generated each token, mean over memory layers and heads; None unless observed.
    """

    prompt: str
    prompt_tokens: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, " new"]
    logprobs: Float[np.ndarray, " new"]
    text: str
    stopped: bool
    chunks: list[Chunk]
    by_token: Float[np.ndarray, "new columns"] | None = None


@dataclasses.dataclass
class Timing:
    """Of one call of `Generator.generate`.

    Attributes:
      seconds: altogether.
      first_token: until the first token of every row was there.
      waited: in which the host did nothing but wait for the device.
      tokens: generated, over all rows.
      state_bytes: on the device, of keys and values of the context and of the memories in front.
    """

    seconds: float = 0.0
    first_token: float = 0.0
    waited: float = 0.0
    tokens: int = 0
    state_bytes: int = 0


class Generator:
    """Generates with one set of parameters.

    Attributes:
      timing: of the last call of `generate`.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        recaller: Recaller | None = None,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (END,),
        observe: bool = False,
        longest: int | None = None,
    ) -> None:
        """Makes one.

        Args:
          model: with the constant prefix, if memories are read. On a mesh its axes are `data` and
            `tensor`.
          params: its parameters.
          tokenizer: of the model.
          recaller: finds and loads memories; None generates without.
          sampling: default greedy.
          stop: tokens that end a row.
          observe: whether to report what attention the memories received.
          longest: most tokens of prompt and text together; default `data.row_length`.
        """
        codec = None if recaller is None else recaller.memories.codec
        self.model, self.tokenizer, self.recaller = model, tokenizer, recaller
        self.decoder = Decoder(
            model,
            sampling or Sampling(),
            stop=tuple(stop),
            pad=PAD,
            usable=tokenizer.size,
            decode=None if codec is None or codec.plain else codec.decode,
            observe=observe and recaller is not None,
        )
        self.params = jax.jit(lambda p: unstack(model, p))(params)
        self.chunk = model.config.memory.chunk_length
        self.longest = model.config.data.row_length if longest is None else longest
        self.stop, self.timing = tuple(stop), Timing()

    def generate(
        self,
        prompts: Sequence[str | np.ndarray],
        new: int,
        *,
        groups: int = 1,
        piece: int | None = None,
        listener: Listener | None = None,
        forced: Sequence[np.ndarray] | None = None,
        recalled: Sequence[Sequence[np.ndarray]] | None = None,
        against: Sequence[np.ndarray] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Continues prompts.

        Args:
          prompts: texts, or their tokens without BOS.
          new: most tokens generated for each.
          groups: parts of the rows that take turns on the device.
          piece: tokens that the device generates at a time; default a chunk. Less streams sooner.
          listener: is told of every piece of text, row by row.
          forced: for each prompt the first tokens to generate, whatever the model would choose.
          recalled: for each prompt the references `(M,)` of each of its recalls, instead of those
            that a search finds.
          against: for each prompt tokens that no reference may contain; see `Recaller.find`.
          numbers: of each prompt, of which its draws are a function; default counts from 0.

        Returns:
          One generation a prompt.

        Raises:
          InferenceError: no prompt, an empty one, or more tokens than the model's context.
        """
        rows = self._encode(prompts, new)
        begin = time.perf_counter()
        self.timing = Timing()
        parts = np.array_split(np.arange(len(rows)), min(max(groups, 1), len(rows)))
        batches = [
            _Batch(self, part.tolist(), rows, new, piece or self.chunk, listener) for part in parts
        ]
        for batch in batches:
            batch.forced, batch.given, batch.against = forced, recalled, against
            if numbers is not None:
                batch.drawn_as = [numbers[i] for i in batch.numbers]
        running = [batch.run() for batch in batches]
        while running:
            running = [one for one in running if next(one, None) is not None]
        self.timing.first_token = max(batch.first for batch in batches) - begin
        self.timing.seconds = time.perf_counter() - begin
        found = [row for batch in batches for row in batch.results(prompts)]
        self.timing.tokens = sum(len(row.tokens) for row in found)
        return found

    def pieces(self, tokens: Int[np.ndarray, " n"]) -> list[str]:
        """What each token adds to the text of those before it."""
        texts = [self.text(tokens[:end]) for end in range(len(tokens) + 1)]
        texts = [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in texts[:-1]] + texts[-1:]
        return [after[len(before) :] for before, after in itertools.pairwise(texts)]

    def text(self, tokens: Int[np.ndarray, " n"]) -> str:
        """Text of tokens."""
        return self.tokenizer.decode(tokens.tolist())

    def _encode(self, prompts: Sequence[str | np.ndarray], new: int) -> list[np.ndarray]:
        """Tokens of prompts, with BOS."""
        if not prompts:
            raise InferenceError("there are no prompts; give at least one")
        if new < 1:
            raise InferenceError(f"{new} new tokens; ask for at least 1")
        texts = [number for number, prompt in enumerate(prompts) if isinstance(prompt, str)]
        encoded = self.tokenizer.encode_batch([str(prompts[number]) for number in texts])
        found = {**dict(enumerate(prompts)), **dict(zip(texts, encoded, strict=True))}
        rows = []
        for number, tokens in found.items():
            if not len(tokens):
                raise InferenceError(f"prompt {number} is empty; give it some text")
            rows.append(np.concatenate([[BOS], tokens]).astype(np.int32))
            if len(rows[-1]) + new > self.longest:
                raise InferenceError(
                    f"prompt {number} has {len(rows[-1])} tokens; with {new} new ones it does not"
                    f" fit the model's context of {self.longest}: shorten it, ask for fewer, or"
                    " have its older text recalled (the mode `context`)"
                )
        return rows


class _Batch:
    """Some rows that go through the device together."""

    def __init__(
        self,
        of: Generator,
        numbers: list[int],
        rows: list[np.ndarray],
        new: int,
        piece: int,
        listener: Listener | None,
    ) -> None:
        self.of, self.numbers, self.new, self.piece = of, numbers, new, piece
        self.rows, self.listener = [rows[i] for i in numbers], listener
        self.forced: Sequence[np.ndarray] | None = None
        self.given: Sequence[Sequence[np.ndarray]] | None = None
        self.against: Sequence[np.ndarray] | None = None
        self.drawn_as = numbers
        self.first = 0.0
        self.tokens = np.full((len(rows := self.rows), new), PAD, np.int32)
        self.logprobs = np.zeros((len(rows), new), np.float32)
        self.chunks: list[list[Chunk]] = [[] for _ in rows]
        self.plans = [schedule(len(row), new, of.chunk) for row in rows]
        self.readings: list[tuple[int, Any]] = []  # chunk of the generated text, and what it read
        M = 0 if of.recaller is None else of.recaller.count
        self.by_token = np.zeros((len(rows), new, M + 1), np.float32)
        self._told = [""] * len(rows)

    def run(self) -> Iterator[bool]:
        """Generates; gives way whenever the device has work to do."""
        of, chunk = self.of, self.of.chunk
        state, written = self._prefill()
        of.timing.state_bytes += sum(x.nbytes for x in jax.tree.leaves(state))
        waiting: list[tuple[int, int, Written]] = [(0, 1, written)]
        done = 1
        yield True
        while done < self.new:
            memory = None
            if done % chunk == 0:
                self._collect(waiting)
                if self._ended(done):
                    break
                if of.recaller is not None:
                    memory = self._recall(done // chunk)
            count = min(self.piece, chunk - done % chunk, self.new - done)
            forced = self._forced(done, self.piece)
            state, written = of.decoder.generate(of.params, state, memory, np.int32(count), forced)
            self._collect(waiting)
            waiting.append((done, count, written))
            done += count
            yield True
        self._collect(waiting)

    def _prefill(self) -> tuple[State, Written]:
        of, chunk = self.of, self.of.chunk
        lengths = np.array([len(row) for row in self.rows], np.int32)
        C = -(-int(lengths.max()) // chunk)
        tokens = np.full((len(self.rows), C * chunk), PAD, np.int32)
        for place, row in enumerate(self.rows):
            tokens[place, : len(row)] = row
        memory = None
        if of.recaller is not None:
            texts = [
                row[low : low + chunk] for row in self.rows for low in range(0, len(row), chunk)
            ]
            places = [
                (place, c)
                for place, row in enumerate(self.rows)
                for c in range(-(-len(row) // chunk))
            ]
            ids = np.full((len(self.rows), C, of.recaller.count), -1, np.int64)
            found, queries = self._find(texts, places)
            ids[tuple(np.array(places).T)] = found
            for (place, c), query, one in zip(places, queries, found, strict=True):
                self.chunks[place].append(Chunk(self.plans[place][c], query, one))
            memory = of.recaller.read(ids)
        slots = -(-self.new // chunk) * chunk
        numbers = np.array(self.drawn_as, np.int32)
        return of.decoder.prefill(
            of.params, tokens, lengths, numbers, memory, self._forced(0, 1), slots=slots
        )

    def _recall(self, number: int) -> Any:
        """Memories that follow the generated chunk before `number`."""
        recaller, chunk = self.of.recaller, self.of.chunk
        assert recaller is not None
        texts = []
        for row in self.tokens[:, (number - 1) * chunk : number * chunk]:
            ended = np.isin(row, self.of.stop).any()
            texts.append(row[:0] if ended or (row == PAD).all() else row)
        places = [(p, self._prompt_chunks(p) + number - 1) for p in range(len(self.rows))]
        ids, queries = self._find(texts, places)
        for (place, c), query, one in zip(places, queries, ids, strict=True):
            self.chunks[place].append(Chunk(self.plans[place][c], query, one))
        return recaller.read(ids)

    def _prompt_chunks(self, place: int) -> int:
        return -(-len(self.rows[place]) // self.of.chunk)

    def _find(
        self, texts: list[np.ndarray], places: list[tuple[int, int]]
    ) -> tuple[np.ndarray, list[str]]:
        """References of chunks, given or searched; `places` are (row, number of its recall)."""
        recaller = self.of.recaller
        assert recaller is not None
        if self.given is not None:
            given = [self.given[self.numbers[row]][number] for row, number in places]
            return np.stack(given).astype(np.int64), [recaller.text(text) for text in texts]
        rows = [self.numbers[row] for row, _ in places]
        against = None if self.against is None else [self.against[row] for row in rows]
        return recaller.find(texts, rows, against)

    def _forced(self, done: int, count: int) -> np.ndarray:
        forced = np.full((len(self.rows), count), -1, np.int32)
        if self.forced is not None:
            for place, number in enumerate(self.numbers):
                part = self.forced[number][done : done + count]
                forced[place, : len(part)] = part
        return forced

    def _collect(self, waiting: list[tuple[int, int, Written]]) -> None:
        """Fetches what was generated, where the device has been given the next piece already."""
        begin = time.perf_counter()
        for done, count, written in waiting:
            self.tokens[:, done : done + count] = np.asarray(written.tokens)[:, :count]
            self.logprobs[:, done : done + count] = np.asarray(written.logprobs)[:, :count]
            if done == 0:
                self.first = time.perf_counter()
            if written.reading is not None and written.by_token is not None:
                self.readings.append((done // self.of.chunk, np.asarray(written.reading)))
                self.by_token[:, done : done + count] = np.asarray(written.by_token)[:, :count]
            if self.listener is not None:
                self._tell(done + count)
        waiting.clear()
        self.of.timing.waited += time.perf_counter() - begin

    def _length(self, place: int) -> tuple[int, bool]:
        """Tokens of a row up to its stop token, and whether it has one."""
        ends = np.flatnonzero(np.isin(self.tokens[place], self.of.stop))
        return (int(ends[0]) + 1, True) if len(ends) else (self.new, False)

    def _ended(self, done: int) -> bool:
        return bool(np.isin(self.tokens[:, :done], self.of.stop).any(axis=1).all())

    def _tell(self, done: int) -> None:
        assert self.listener is not None
        for place, number in enumerate(self.numbers):
            length = min(self._length(place)[0], done)
            text = self.of.text(self.tokens[place, :length])
            if done < self.new:
                text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character of several tokens
            before = self._told[place]
            if len(text) > len(before):
                self.listener(number, text[len(before) :])
                self._told[place] = text

    def results(self, prompts: Sequence[str | np.ndarray]) -> Iterator[Generation]:
        """The generations, once `run` has ended."""
        for place, number in enumerate(self.numbers):
            length, stopped = self._length(place)
            tokens = self.tokens[place, :length]
            prompt = prompts[number]
            yield Generation(
                prompt if isinstance(prompt, str) else self.of.text(prompt),
                self.rows[place],
                tokens,
                self.logprobs[place, :length],
                self.of.text(tokens),
                stopped,
                self._observed(place, length),
                None if not self.readings else self.by_token[place, :length],
            )

    def _observed(self, place: int, length: int) -> list[Chunk]:
        """What the row recalled, as far as it got; with the attention that it paid."""
        prompt, end = len(self.rows[place]), len(self.rows[place]) + length
        total: dict[int, np.ndarray] = {}
        for number, reading in self.readings:
            total[number] = total.get(number, 0) + reading[place]
        chunks = []
        for index, chunk in enumerate(self.chunks[place]):
            low, high = chunk.recall.generates
            if low >= end and low > prompt:
                break
            number = index - self._prompt_chunks(place) + 1
            tokens = min(high, end) - low
            if number in total and tokens > 0:
                chunk = dataclasses.replace(chunk, reading=total[number] / tokens)
            chunks.append(chunk)
        return chunks
