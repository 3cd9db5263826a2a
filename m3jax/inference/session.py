"""Opens a checkpoint with its tokenizer, knowledge and bank, to generate in every mode.

| mode | the model reads |
|---|---|
| `none` | the prompt |
| `memory` | memories of the bank (warm start) |
| `cold` | memories written when their reference is first retrieved |
| `rag` | references as text in front of the prompt |
| `long_context` | memories of its own older text, if the text is longer than the model's context |
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m3jax.checkpoint import restore_params
from m3jax.checkpoint_folder import named_checkpoint
from m3jax.config import PREFIX_TOKENS, prefix_tokens
from m3jax.errors import BankError, InferenceError
from m3jax.inference.cold_start import ColdMemories
from m3jax.inference.generate import Generator
from m3jax.inference.long_context import LongContextReferences, LongContextRetriever
from m3jax.inference.memory_retrieval import MemoryRetriever
from m3jax.knowledge.memory_writer import check_reader, restore_writer
from m3jax.knowledge.versions import (
    Version,
    check_bank,
    open_bank,
    open_references,
    open_retriever,
    open_version,
)
from m3jax.make_model import make_model
from m3jax.memory.bank import Bank
from m3jax.memory.encode import ReferenceTokens
from m3jax.mirror import Mirror
from m3jax.retrieval.retriever import Retriever
from m3jax.text.references import References
from m3jax.text.tokenizer import Tokenizer

MODES = ("none", "memory", "cold", "rag", "long_context")
_COLD_BATCH, _COLD_BYTES = 16, 2**30  # of a cold start: references per call; cache limit


class Session:
    """Holds the parts that generation needs; each is opened once, on first use.

    Attributes:
      config: of the checkpoint's stage.
      meta: metadata of the checkpoint.
      bank_folder, version_number: as given; None = the version's own bank, the current version.
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
        """Opens checkpoint and tokenizer; the knowledge is opened when a mode first needs it.

        Args:
          config: a validated config, of the stage that made the checkpoint.
          workdir: prepared folder, or the mirror of one in a bucket.
          checkpoint: stage folder or `checkpoints/<step>`; default `workdir/<stage>`.
          bank: folder or URL of the bank; default the version's own bank.
          version: version of the knowledge; default the current one.

        Raises:
          CheckpointError, TextError: a part is missing or does not fit.
        """
        self.config, self.workdir = config, Path(workdir)
        self.checkpoint = named_checkpoint(checkpoint, workdir, config.stage)
        Mirror.of(self.workdir).fetch("tokenizer")
        self.tokenizer = Tokenizer.load(self.workdir / "tokenizer")
        self.model = make_model(config, prefix_tokens(config))
        self.params, self.meta = restore_params(
            self.checkpoint, self.model, tokenizer_fingerprint=self.tokenizer.fingerprint
        )
        self.bank_folder, self.version_number = bank, version

    @cached_property
    def version(self) -> Version:
        """Version of the knowledge."""
        return open_version(self.workdir, self.version_number)

    @cached_property
    def references(self) -> References:
        """References of the version."""
        return open_references(self.config, self.version, self.tokenizer)

    @cached_property
    def retriever(self) -> Retriever:
        """Retriever of the version's references, with the overlap filter of evaluation."""
        limit = self.config.retrieval.overlap_evaluation
        bank = self.bank if self.config.retrieval.rerank else None
        return open_retriever(self.config, self.version, self.references, limit, bank=bank)

    @cached_property
    def bank(self) -> Bank:
        """Bank that the session reads; raises the errors of `open_bank`."""
        return self.open_bank(self.bank_folder)

    def open_bank(self, folder: str | Path | None) -> Bank:
        """Opens the bank in `folder`, or the version's own bank if `folder` is None, and checks it.

        Raises:
          BankError: no bank is there, it was written with another tokenizer, config or set of
            references, or by a writer whose memories the checkpoint does not read.
        """
        cache_bytes = self.config.memory.cache_bytes
        if folder:
            bank = Bank.open(folder, cache_bytes=cache_bytes)
        else:
            bank = open_bank(self.version, self.references, cache_bytes)
        check_bank(self.config, bank, self.references, self.tokenizer)
        check_reader(bank, self.meta, self.checkpoint)
        return bank

    def generator(self, mode: str, *, length: int | None = None, **options: Any) -> Generator:
        """Returns a generator for a mode.

        Args:
          mode: one of `MODES`.
          length: most tokens of a reference cut from the text in the mode `long_context`; default
            `memory.reference_length`.
          options: keyword arguments of `Generator`; `longest` defaults to `data.sequence_length`.

        Raises:
          InferenceError: an unknown mode, or a mode that reads memories with a config of the warmup
            stage.
          BankError, RetrievalError, TextError, VersionError: a part that the mode needs is missing
            or does not fit.
        """
        memory_retriever = self._memory_retriever(mode, length)
        options = {"longest": self.config.data.sequence_length, **options}
        return Generator(self.model, self.params, self.tokenizer, memory_retriever, **options)

    def _memory_retriever(self, mode: str, length: int | None) -> MemoryRetriever | None:
        """Returns the retriever of memories for `mode`; None for the modes `none` and `rag`."""
        if mode not in MODES:
            raise InferenceError(f"mode {mode!r}; known: {', '.join(MODES)}")
        if mode in ("none", "rag"):
            return None
        self.require_memories(mode)
        count = self.config.memory.per_prompt_chunk
        if mode == "long_context":
            references = LongContextReferences(
                self.retriever.index.embedder, length or self.config.memory.reference_length
            )
            memories = self._write_cold(references)
            return LongContextRetriever(references, memories, self.tokenizer, count)
        source = self.cold_memories if mode == "cold" else self.bank
        return MemoryRetriever(self.retriever, source, self.tokenizer, count)

    def require_memories(self, mode: str) -> None:
        """Checks that the stage reads memories; raises `InferenceError` for the warmup stage."""
        if self.config.stage == "warmup":
            raise InferenceError(
                f"mode {mode!r} with a config of the stage 'warmup', which has not learned to read"
                " memories; take the config of the continual stage, or the mode 'none' or 'rag'"
            )

    @cached_property
    def cold_memories(self) -> ColdMemories:
        """Memories that the checkpoint's writer writes when they are first read."""
        return self._write_cold(self.references)

    def _write_cold(self, references: ReferenceTokens) -> ColdMemories:
        """Returns memories of references, written on first read by the checkpoint's writer.

        Raises `BankError` if the writer is missing or encodes references with document context.
        """
        config = self.config.copy_and_resolve_references()
        if config.writer.document_context:
            raise BankError(
                "config.writer.document_context = True: a cold start encodes references alone;"
                " write a bank (launch/write_bank.py)"
            )
        with config.unlocked():
            config.writer.batch_references = _COLD_BATCH
        model = make_model(config, PREFIX_TOKENS)
        params = restore_writer(self.checkpoint, model, self.tokenizer.fingerprint).params
        return ColdMemories(config, model, params, references, _COLD_BYTES)
