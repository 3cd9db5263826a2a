"""Cleaning pipeline of documents in blocks, shared by processes: clean, compare, tokenize, join."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from m3jax.config import ConfigDict
from m3jax.errors import TextError
from m3jax.files import TEMPORARY, digest, write_atomically
from m3jax.text.cleaning import minhash
from m3jax.text.cleaning.blocks import Block, BlockSource, blocks_of, sources_of
from m3jax.text.cleaning.clean import Cleaning, clean_block, is_clean, names_of
from m3jax.text.cleaning.dedup import Cleaned, compare_part, decide, parts_to_compare
from m3jax.text.cleaning.quality import load_scorer
from m3jax.text.cleaning.split import Cutting, cut_block, cut_documents
from m3jax.text.cleaning.tokenize import Tokenizing, tokenize_block, tokenized
from m3jax.text.cleaning.workers import Runner, WorkStage
from m3jax.text.corpus import CorpusInfo, write_encoded
from m3jax.text.references import write_pieces
from m3jax.text.tokenizer import Tokenizer
from m3jax.workdir import begin_part, make_part

_SUMMARY = "summary.txt"
_TOKENS, _PIECES = "tokens-", "pieces-"


class CleaningPipeline:
    """Runs the stages on blocks of a run's documents, in the folder `clean/` of a workdir."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        documents: str,
        limit: int | None,
        runner: Runner,
        quality: str | None,
    ) -> None:
        """Raises `TextError` for a quality threshold without a scorer or the other way round."""
        if (quality is not None) != (config.clean.enabled and config.clean.quality_min > 0):
            raise TextError(
                f"clean.enabled = {config.clean.enabled} and clean.quality_min ="
                f" {config.clean.quality_min:g} with --quality={quality}; a scorer and a threshold"
                " above 0 belong together"
            )
        self._config, self._workdir = config, workdir
        self._documents, self._limit, self._runner = documents, limit, runner
        self._folder = workdir / "clean"
        clean = SimpleNamespace(**config.clean.to_dict())
        self._cleaning = Cleaning(self._folder.absolute(), clean, quality)

    def inputs(self) -> dict[str, Any]:
        """Returns what cleaning adds to the inputs of its documents; {} without cleaning."""
        clean = self._config.clean
        if not clean.enabled:
            return {}
        inputs: dict[str, Any] = {f"clean.{name}": value for name, value in clean.items()}
        if self._cleaning.quality is not None:
            inputs["quality"] = load_scorer(self._cleaning.quality).fingerprint
        if clean.similarity > 0:
            inputs["near-duplicates"] = minhash.algorithm()
        return inputs

    @property
    def summary(self) -> str:
        """Returns one line: how many documents came in, and how many are left."""
        return (self._folder / _SUMMARY).read_text("utf-8")

    def clean(self, inputs: dict[str, Any]) -> bool:
        """Cleans the documents and writes the data report; returns True where it was finished.

        Raises:
          TextError: bad documents, or a folder that was made from other inputs.
        """
        return make_part(self._folder, inputs, partial(self._clean, inputs))

    def _clean(self, inputs: dict[str, Any], folder: Path) -> None:
        begin_part(folder, inputs)
        cleaning = self._cleaning
        stages = [
            WorkStage(
                "clean",
                partial(_sources, self._documents, self._limit),
                partial(clean_block, cleaning),
                partial(_blocks_to_clean, cleaning, self._limit),
            )
        ]
        if cleaning.clean.enabled:
            units = partial(parts_to_compare, cleaning)
            stages.append(WorkStage("compare", units, partial(compare_part, cleaning)))
        self._runner.run(stages)
        for left in folder.rglob("*" + TEMPORARY):  # by processes that were killed
            left.unlink(missing_ok=True)
        tally = decide(cleaning)
        cleaned = Cleaned(cleaning)
        if not any(True for _ in cleaned):
            raise TextError(f"no documents are left of {self._documents!r}; {self._removed(tally)}")
        if cleaning.clean.enabled:
            from m3jax.text.cleaning.report import write_data_report  # draws: a slow import

            report = self._workdir / "report" / "data"
            summary = write_data_report(cleaned, tally, report) + ", see report/data/report.md"
        else:
            summary = f"{tally.counts['read/documents']} documents read"
        write_atomically(folder / _SUMMARY, summary.encode())

    def _removed(self, tally: Any) -> str:
        steps = [name for name in sorted(tally.counts) if name.endswith("/documents")]
        return ", ".join(f"{name.split('/')[0]} {tally.counts[name]}" for name in steps)

    def documents(self) -> Cleaned:
        """Returns the documents that are left."""
        return Cleaned(self._cleaning)

    def write_corpus(self, held_out: bool, tokenizer: Tokenizer, folder: Path) -> CorpusInfo:
        """Tokenizes what is not tokenized yet, and joins one side of the split into a corpus."""
        text = self._config.text
        share, shuffle = text.validation_share, text.shuffle
        place = self._place(_TOKENS, tokenizer.fingerprint, repr(share), str(shuffle))
        tokenizing = Tokenizing(*place, share, shuffle)
        names = partial(names_of, self._cleaning)
        self._runner.run([WorkStage("tokenize", names, partial(tokenize_block, tokenizing))])
        documents = tokenized(tokenizing, held_out)
        return write_encoded(documents, tokenizer, folder, text.shards)

    def write_references(self, tokenizer: Tokenizer, folder: Path) -> int:
        """Cuts what is not cut yet into references, and joins them."""
        length = self._config.memory.reference_length
        cutting = Cutting(*self._place(_PIECES, tokenizer.fingerprint, str(length)), length)
        names = partial(names_of, self._cleaning)
        self._runner.run([WorkStage("cut", names, partial(cut_block, cutting))])
        return write_pieces(cut_documents(cutting), tokenizer, folder, length)

    def _place(self, kind: str, *identity: str) -> tuple[Path, Cleaning, Path]:
        folder = self._cleaning.folder / f"{kind}{digest(*identity)[:12]}"
        return folder, self._cleaning, (self._workdir / "tokenizer").absolute()

    def tidy(self) -> None:
        """Removes what corpora and references were joined from, when they are finished."""
        for name in (_TOKENS, _PIECES):
            for folder in self._folder.glob(f"{name}*"):
                shutil.rmtree(folder, ignore_errors=True)


def _sources(spec: str, limit: int | None) -> list[tuple[BlockSource, ...]]:
    """Lists units to read; one for all sources where their documents are counted."""
    sources = sources_of(spec)
    return [tuple(sources)] if limit is not None else [(source,) for source in sources]


def _blocks_to_clean(
    cleaning: Cleaning, limit: int | None, sources: tuple[BlockSource, ...]
) -> Iterator[Block]:
    return (block for block in blocks_of(sources, limit) if not is_clean(cleaning, block))
