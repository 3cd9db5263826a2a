"""A checkpoint with its tokenizer, knowledge and bank, ready to generate in every mode.

| mode | what the model reads |
|---|---|
| `none` | the prompt |
| `memory` | memories of the bank, as it stores them (warm start) |
| `cold` | memories written when their reference is first found |
| `rag` | references as text in front of the prompt |
| `context` | memories of its own older text, where it is longer than the model's context |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m3jax.checkpoint import restore_params
from m3jax.config import PREFIX_TOKENS, prefix_tokens
from m3jax.errors import InferenceError
from m3jax.inference.cold_start import ColdMemories
from m3jax.inference.generate import Generator
from m3jax.inference.long_context import ContextRecaller, ContextReferences
from m3jax.inference.memory_retrieval import Recaller
from m3jax.inference.rag import retrieve, with_references
from m3jax.inference.results import Generation
from m3jax.inference.sampling import Sampling
from m3jax.knowledge.memory_writer import check_reader, restore_writer
from m3jax.knowledge.versions import (
    check_bank,
    open_bank,
    open_references,
    open_retriever,
    open_version,
)
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.text.tokenizer import Tokenizer

MODES = ("none", "memory", "cold", "rag", "context")


class Session:
    """What generation needs, opened once.

    Attributes:
      config: of the checkpoint's stage.
      meta: of the checkpoint.
      references: of the version of the knowledge that is read; None in a stage without memory.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: str | Path,
        *,
        checkpoint: str | Path | None = None,
        bank: str | Path | None = None,
        version: int | None = None,
    ) -> None:
        """Opens checkpoint and tokenizer; the knowledge when a mode first needs it.

        Args:
          config: a validated config, of the stage that made the checkpoint.
          workdir: prepared folder.
          checkpoint: stage folder or `checkpoints/<step>`; default `workdir/<stage>`.
          bank: folder or URL of the bank; default that of the version.
          version: of the knowledge; default the current one.

        Raises:
          CheckpointError, TextError: a part is missing or does not fit.
        """
        self.config, self.workdir = config, Path(workdir)
        self.checkpoint = Path(checkpoint or self.workdir / config.stage)
        self.tokenizer = Tokenizer.load(self.workdir / "tokenizer")
        self.model = make_model(config, prefix_tokens(config))
        self.params, self.meta = restore_params(
            self.checkpoint, self.model, tokenizer_fingerprint=self.tokenizer.fingerprint
        )
        self._bank_folder, self._number = bank, version
        self._opened: dict[str, Any] = {}

    def _once(self, name: str, make: Any) -> Any:
        if name not in self._opened:
            self._opened[name] = make()
        return self._opened[name]

    @property
    def version(self) -> Any:
        """The version of the knowledge."""
        return self._once("version", lambda: open_version(self.workdir, self._number))

    @property
    def references(self) -> Any:
        """The knowledge base of the version."""
        return self._once(
            "references", lambda: open_references(self.config, self.version, self.tokenizer)
        )

    @property
    def retriever(self) -> Any:
        """The search over it; its filter is that of evaluation."""
        limit = self.config.retrieval.overlap_evaluation
        bank = self.bank if self.config.retrieval.rerank else None
        return self._once(
            "retriever",
            lambda: open_retriever(self.config, self.version, self.references, limit, bank=bank),
        )

    @property
    def bank(self) -> Any:
        """The bank, which the checkpoint reads.

        Raises:
          BankError: there is none, or it was written by something else.
        """
        return self._once("bank", self._open_bank)

    def _open_bank(self) -> Any:
        return self.open_bank(self._bank_folder)

    def open_bank(self, folder: str | Path | None) -> Any:
        """A bank that the checkpoint reads, checked; None is that of the version.

        Raises:
          BankError: there is none, or it was written by something else.
        """
        cache = self.config.memory.cache_bytes
        if folder:
            bank: Any = Bank.open(folder, cache_bytes=cache)
        else:
            bank = open_bank(self.version, self.references, cache)
        check_bank(self.config, bank, self.references, self.tokenizer)
        check_reader(bank, self.meta, self.checkpoint)
        return bank

    def recaller(
        self, mode: str, *, cold_bytes: int = 2**30, batch: int = 16, length: int | None = None
    ) -> Recaller | None:
        """Finds and loads memories in a mode; None in modes without.

        Args:
          mode: of `MODES`.
          cold_bytes: of memories that a cold start keeps.
          batch: references that a cold start encodes by one call.
          length: most tokens of a reference cut from the text, in the mode `context`; default
            `memory.reference_length`.
        """
        if mode not in MODES:
            raise InferenceError(f"mode {mode!r}; known: {', '.join(MODES)}")
        if mode in ("none", "rag"):
            return None
        self.require_memories(mode)
        count = self.config.memory.per_prompt_chunk
        if mode == "context":
            references = ContextReferences(
                self.retriever.index.embedder, length or self.config.memory.reference_length
            )
            own = self._writing(references, cold_bytes, batch, grows=True)
            return ContextRecaller(references, own, self.tokenizer, count)
        memories: Any = self.bank
        if mode == "cold":
            memories = self._once("cold", lambda: self._writing(self.references, cold_bytes, batch))
        return Recaller(self.retriever, memories, self.tokenizer, count)

    def require_memories(self, mode: str) -> None:
        """Refuses a mode that reads memories in the warmup stage."""
        if self.config.stage == "warmup":
            raise InferenceError(
                f"mode {mode!r} with a config of the stage 'warmup', which has not learned to read"
                " memories; take the config of the continual stage, or the mode 'none' or 'rag'"
            )

    def _writing(
        self, references: Any, limit: int, batch: int, grows: bool = False
    ) -> ColdMemories:
        """Memories of references by the writer that the checkpoint reads."""
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.writer.batch_references = batch
        model = make_model(config, PREFIX_TOKENS)
        params, _, _ = restore_writer(self.checkpoint, model, self.tokenizer.fingerprint)
        return ColdMemories(config, model, params, references, limit, grows)

    def generator(
        self,
        mode: str,
        *,
        sampling: Sampling | None = None,
        observe: bool = False,
        longest: int | None = None,
        length: int | None = None,
    ) -> Generator:
        """Generates in a mode; see `Generator`, and `recaller` for `length`."""
        return Generator(
            self.model,
            self.params,
            self.tokenizer,
            self.recaller(mode, length=length),
            sampling=sampling,
            observe=observe,
            longest=self.config.data.sequence_length if longest is None else longest,
        )

    def rag_prompts(
        self, prompts: Sequence[str], count: int, filtered: bool = False
    ) -> tuple[list[str], np.ndarray]:
        """Prompts behind their references as text, and which these are, `(n, count)`.

        Args:
          prompts: questions.
          count: references of each.
          filtered: whether references that overlap with the question are dropped.
        """
        against = self.tokenizer.encode_batch(list(prompts)) if filtered else None
        ids = retrieve(prompts, self.retriever, count, against)
        return with_references(prompts, ids, self.references), ids


def total_logprob(generation: Generation) -> float:
    """Log-probability of all that was generated, in nats."""
    return float(np.sum(generation.logprobs, dtype=np.float64))
