"""Rows that go through the device together, from their prompts to what they became."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from m3jax.inference.results import Chunk, Generation
from m3jax.inference.retrieval_schedule import schedule
from m3jax.model.decode import State, Written
from m3jax.text.tokenizer import PAD

if TYPE_CHECKING:
    from m3jax.inference.generate import Generator

Listener = Callable[[int, str], None]  # number of a row, and more of its text


@dataclasses.dataclass(frozen=True)
class Call:
    """What `Generator.generate` was asked for.

    Attributes:
      rows: tokens of prompts, with BOS.
      new: most tokens generated for each.
      piece: tokens that the device generates at a time.
      numbers: of each prompt, of which its draws are a function.
      listener, forced, recalled, against: as in `Generator.generate`.
    """

    rows: list[np.ndarray]
    new: int
    piece: int
    numbers: Sequence[int]
    listener: Listener | None
    forced: Sequence[np.ndarray] | None
    recalled: Sequence[Sequence[np.ndarray]] | None
    against: Sequence[np.ndarray] | None


class Batch:
    """Some rows of a call, through the device together."""

    def __init__(self, of: Generator, call: Call, numbers: list[int]) -> None:
        """Takes the rows of these numbers; nothing is generated before `run`."""
        self.of, self.call, self.numbers = of, call, numbers
        self.rows = [call.rows[i] for i in numbers]
        self.first = 0.0  # when the first token of every row was there
        self.tokens = np.full((len(numbers), call.new), PAD, np.int32)
        self.logprobs = np.zeros((len(numbers), call.new), np.float32)
        self.chunks: list[list[Chunk]] = [[] for _ in numbers]
        self.plans = [schedule(len(row), call.new, of.chunk) for row in self.rows]
        self.readings: list[tuple[int, Any]] = []  # chunk of the generated text, and what it read
        M = 0 if of.recaller is None else of.recaller.count
        self.by_token = np.zeros((len(numbers), call.new, M + 1), np.float32)
        self._told = [""] * len(numbers)

    def run(self) -> Iterator[bool]:
        """Generates; gives way whenever the device has work to do."""
        of, chunk = self.of, self.of.chunk
        state, written = self._prefill()
        of.timing.state_bytes += sum(x.nbytes for x in jax.tree.leaves(state))
        waiting: list[tuple[int, int, Written]] = [(0, 1, written)]
        done = 1
        yield True
        while done < self.call.new:
            memory = None
            if done % chunk == 0:
                self._collect(waiting)
                if self._ended(done):
                    break
                if of.recaller is not None:
                    memory = self._recall(done // chunk)
            count = min(self.call.piece, chunk - done % chunk, self.call.new - done)
            forced = self._forced(done, self.call.piece)
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
        slots = -(-self.call.new // chunk) * chunk
        numbers = np.array([self.call.numbers[i] for i in self.numbers], np.int32)
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
        if self.call.recalled is not None:
            given = [self.call.recalled[self.numbers[row]][number] for row, number in places]
            return np.stack(given).astype(np.int64), [recaller.text(text) for text in texts]
        rows = [self.numbers[row] for row, _ in places]
        against = None if self.call.against is None else [self.call.against[row] for row in rows]
        return recaller.find(texts, rows, against)

    def _forced(self, done: int, count: int) -> np.ndarray:
        forced = np.full((len(self.rows), count), -1, np.int32)
        if self.call.forced is not None:
            for place, number in enumerate(self.numbers):
                part = self.call.forced[number][done : done + count]
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
            if self.call.listener is not None:
                self._tell(done + count)
        waiting.clear()
        self.of.timing.waited += time.perf_counter() - begin

    def _length(self, place: int) -> tuple[int, bool]:
        """Tokens of a row up to its stop token, and whether it has one."""
        ends = np.flatnonzero(np.isin(self.tokens[place], self.of.stop))
        return (int(ends[0]) + 1, True) if len(ends) else (self.call.new, False)

    def _ended(self, done: int) -> bool:
        return bool(np.isin(self.tokens[:, :done], self.of.stop).any(axis=1).all())

    def _tell(self, done: int) -> None:
        assert self.call.listener is not None
        for place, number in enumerate(self.numbers):
            length = min(self._length(place)[0], done)
            text = self.of.text(self.tokens[place, :length])
            if done < self.call.new:
                text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character of several tokens
            before = self._told[place]
            if len(text) > len(before):
                self.call.listener(number, text[len(before) :])
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
