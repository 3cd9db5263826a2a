"""Cleaning pipeline of documents in blocks, shared by processes: clean, compare, tokenize, join."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from m3jax.config import ConfigDict
from m3jax.errors import TextError
from m3jax.files import TEMPORARY, digest, write_atomically
from m3jax.text.cleaning import minhash
from m3jax.text.cleaning.blocks import Block, BlockSource, blocks_of, sources_of
from m3jax.text.cleaning.clean import CleanFolder, clean_block, compare_part, decide
from m3jax.text.cleaning.quality import load_scorer
from m3jax.text.cleaning.tokenize import (
    BlockWork,
    cut_block,
    cut_documents,
    tokenize_block,
    tokenized,
)
from m3jax.text.cleaning.workers import Runner, WorkStage
from m3jax.text.corpus import write_corpus
from m3jax.text.documents import describe_unread
from m3jax.text.listing import list_files
from m3jax.text.references import write_pieces
from m3jax.text.tokenizer import Tokenizer
from m3jax.workdir import begin_part, make_part

_SUMMARY = "summary.txt"
_TOKENS, _PIECES = "tokens-", "pieces-"


@dataclass
class CleaningPipeline:
    """Runs the cleaning stages on blocks of documents, in the folder `clean/` of a workdir.

    After `clean()`, `documents` reads the documents that are left. Raises `TextError` if there is a
    `quality` scorer without a threshold `clean.quality_min` > 0, or the reverse.
    """

    config: ConfigDict
    workdir: Path
    spec: str
    limit: int | None
    runner: Runner
    quality: str | None

    def __post_init__(self) -> None:
        clean = self.config.clean
        if (self.quality is not None) != (clean.enabled and clean.quality_min > 0):
            raise TextError(
                f"clean.enabled = {clean.enabled} and clean.quality_min = {clean.quality_min:g}"
                f" with"
                f" --quality={self.quality}; a scorer and a threshold above 0 belong together"
            )
        settings = SimpleNamespace(**clean.to_dict())
        folder = (self.workdir / "clean").absolute()
        self.documents = CleanFolder(folder, settings, self.quality)

    def inputs(self) -> dict[str, Any]:
        """Returns the inputs that cleaning adds to parts made from its documents; {} if off."""
        clean = self.config.clean
        if not clean.enabled:
            return {}
        inputs: dict[str, Any] = {f"clean.{name}": value for name, value in clean.items()}
        if self.quality is not None:
            inputs["quality"] = load_scorer(self.quality).fingerprint
        if clean.similarity > 0:
            inputs["near-duplicates"] = minhash.algorithm()
        return inputs

    def clean(self, inputs: dict[str, Any]) -> tuple[bool, str]:
        """Cleans the documents and writes the data report.

        Returns True if it was finished before, and a line with the numbers of documents read and
        left. Raises `TextError` for unreadable documents (with `clean.enabled`, for too many), if
        no documents are left, or if the folder was made from other inputs.
        """
        kept = make_part(self.documents.folder, inputs, partial(self._clean, inputs))
        return kept, (self.documents.folder / _SUMMARY).read_text("utf-8")

    def _clean(self, inputs: dict[str, Any], folder: Path) -> None:
        begin_part(folder, inputs)
        cleaned = self.documents
        sources = partial(_sources, self.spec, self.limit)
        split = partial(_blocks_to_clean, cleaned, self.limit)
        stages = [WorkStage("clean", sources, partial(clean_block, cleaned), split)]
        if cleaned.clean.enabled:
            parts = partial(minhash.parts_of, cleaned.blocks)
            stages.append(WorkStage("compare", parts, partial(compare_part, cleaned)))
        self.runner.run(stages)
        for left in folder.rglob("*" + TEMPORARY):  # left by processes that were killed
            left.unlink(missing_ok=True)
        tally = decide(cleaned)
        if next(iter(cleaned), None) is None:
            steps = ", ".join(f"{step} {n}" for step, n in tally.documents().items())
            raise TextError(f"no documents are left of {self.spec!r}; {steps}")
        if cleaned.clean.enabled:
            from m3jax.text.cleaning.report import write_data_report  # imports matplotlib: slow

            report = self.workdir / "report" / "data"
            left_out = list_files(self.spec).left_out
            summary = write_data_report(cleaned, tally, left_out, report)
            summary += ", see report/data/report.md"
        else:
            empty = tally.counts["empty/documents"]
            summary = f"{tally.counts['read/documents'] - empty} documents read"
            blank = tally.counts["not read/blank lines"]
            unread = Counter({"blank lines": blank, "empty documents": empty})
            told = describe_unread(self.spec, unread)
            summary += f"; not read: {told}" if told else ""
        write_atomically(folder / _SUMMARY, summary.encode())

    def write_corpus(self, held_out: bool, tokenizer: Tokenizer, folder: Path) -> None:
        """Tokenizes the remaining blocks, and writes the validation or the training corpus."""
        text = self.config.text
        share, shuffle = text.validation_share, text.shuffle
        work = self._work(_TOKENS, tokenizer.fingerprint, repr(share), str(shuffle))
        self._run("tokenize", partial(tokenize_block, work, share, shuffle))
        documents = tokenized(work.folder, shuffle, held_out)
        write_corpus(documents, tokenizer, folder, text.shards)

    def write_references(self, tokenizer: Tokenizer, folder: Path) -> int:
        """Cuts the remaining blocks; writes all references, and returns their number."""
        length = self.config.memory.reference_length
        work = self._work(_PIECES, tokenizer.fingerprint, str(length))
        self._run("cut", partial(cut_block, work, length))
        return write_pieces(cut_documents(work.folder), tokenizer, folder, length)

    def _work(self, kind: str, *identity: str) -> BlockWork:
        folder = self.documents.folder / f"{kind}{digest(*identity)[:12]}"
        return BlockWork(folder, self.documents, (self.workdir / "tokenizer").absolute())

    def _run(self, name: str, work: Any) -> None:
        self.runner.run([WorkStage(name, self.documents.names, work)])

    def tidy(self) -> None:
        """Removes the tokenized and the cut blocks, which finished parts no longer need."""
        for name in (_TOKENS, _PIECES):
            for folder in self.documents.folder.glob(f"{name}*"):
                shutil.rmtree(folder, ignore_errors=True)


def _sources(spec: str, limit: int | None) -> list[tuple[BlockSource, ...]]:
    """Lists the units to read: one per source, or one of all sources to count up to `limit`."""
    sources = sources_of(spec)
    return [tuple(sources)] if limit is not None else [(source,) for source in sources]


def _blocks_to_clean(
    cleaned: CleanFolder, limit: int | None, sources: tuple[BlockSource, ...]
) -> Iterator[Block]:
    blocks = blocks_of(sources, limit)
    return (b for b in blocks if not (cleaned.blocks / f"{b.name}.json").is_file())
