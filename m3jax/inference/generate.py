"""Generates text, recalling memories as `schedule` says.

The device generates a whole chunk between two recalls. With several groups of rows it works on one
while the host finds and loads the memories of another, so that a recall costs no time; every row's
text is the same either way.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from m3jax.errors import InferenceError
from m3jax.inference.batch import Batch, Call, Listener
from m3jax.inference.memory_retrieval import Recaller
from m3jax.inference.results import Generation, Timing
from m3jax.inference.sampling import Sampling
from m3jax.model.decode import Decoder, unstack
from m3jax.model.parameters import Params
from m3jax.model.transformer import Model
from m3jax.text.tokenizer import BOS, END, PAD, Tokenizer


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
        longest: int,
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
          longest: most tokens of prompt and text together.
        """
        codec = None if recaller is None else recaller.memories.codec
        self.model, self.tokenizer, self.recaller = model, tokenizer, recaller
        self.decoder = Decoder(
            model,
            sampling or Sampling(),
            stop=tuple(stop),
            pad=PAD,
            usable=tokenizer.size,
            dequantize=None if codec is None or codec.plain else codec.decode,
            observe=observe and recaller is not None,
        )
        self.params = jax.jit(lambda p: unstack(model, p))(params)
        self.chunk = model.memory.chunk_length
        self.longest, self.stop, self.timing = longest, tuple(stop), Timing()

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
        call = Call(
            rows=self._encode(prompts, new),
            new=new,
            piece=piece or self.chunk,
            numbers=range(len(prompts)) if numbers is None else numbers,
            listener=listener,
            forced=forced,
            recalled=recalled,
            against=against,
        )
        begin = time.perf_counter()
        self.timing = Timing()
        parts = np.array_split(np.arange(len(prompts)), min(max(groups, 1), len(prompts)))
        batches = [Batch(self, call, part.tolist()) for part in parts]
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
