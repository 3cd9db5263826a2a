"""Preparation of a workdir from documents: tokenizer, token corpus, references; resumable."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from m3jax.config import ConfigDict
from m3jax.errors import TextError
from m3jax.text.cleaning.pipeline import CleaningPipeline
from m3jax.text.cleaning.workers import LocalRunner, Runner
from m3jax.text.corpus import Corpus, write_corpus
from m3jax.text.documents import Document, inputs_of, is_validation, read_documents
from m3jax.text.reference_filter.select import Selection
from m3jax.text.references import References, write_references
from m3jax.text.tokenizer import SMALLEST, Tokenizer
from m3jax.workdir import INPUTS, make_part

_TAKEN = "taken_from"  # the only input of a tokenizer that launch/convert.py took from a folder

_Item = TypeVar("_Item")
Say = Callable[[str], None]


def prepare_text(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    documents: str,
    knowledge: str | None = None,
    limit: int | None = None,
    say: Say = print,
    runner: Runner | None = None,
    quality: str | None = None,
    questions: Sequence[str] = (),
) -> None:
    """Writes `tokenizer/`, `corpus/validation/`, `corpus/train/` and `references/` of a workdir.

    A part that is finished and was made from the same inputs is kept; an unfinished one is made
    again. The tokenizer learns from the training documents and, where it is another text, the
    knowledge base, a document of each in turn, up to `config.text.tokenizer_bytes`; one that
    launch/convert.py took from a folder stays. With `config.text.validation_share` = 0 there is no
    `corpus/validation/`. Documents are streamed, once for every part.

    With a runner, `clean.enabled` or `text.shuffle` the documents go through blocks in `clean/`
    first (`m3jax.text.cleaning.pipeline`), where other processes can take part; finished blocks are
    kept. The output is the same for every runner and, without cleaning and shuffling, the same as
    without one. A knowledge base of its own is not cleaned. With `knowledge.enabled` references are
    selected (`m3jax.text.reference_filter.select`), also by the runner.

    Args:
      config: its sections `text`, `clean` and `knowledge`, `model.vocabulary` and
        `memory.reference_length` are used.
      workdir: folder of the run.
      documents, knowledge: specs (`read_documents`) of the documents and of the knowledge base;
        default the same.
      limit: most documents to use of each spec; None = all.
      say: gets one line for every part: whether it was kept, and what is in it.
      runner: does the work on blocks; None = this process.
      quality: spec of a scorer (`load_scorer`), needed by `clean.quality_min`.
      questions: texts of evaluation questions, which no reference may hold.

    Raises:
      TextError: bad documents; a finished part that was made from other inputs; a tokenizer with
        fewer than 260 entries or more than `model.vocabulary`; a library is missing.
    """
    _check_arguments(config, limit, questions)
    workdir, text, knowledge = Path(workdir), config.text, knowledge or documents
    of_documents = {"documents": inputs_of(documents), "limit": limit}
    listed = of_documents["documents"] if knowledge == documents else inputs_of(knowledge)
    of_knowledge = {"knowledge": listed, "limit": limit}
    pipeline = None
    if runner is not None or config.clean.enabled or text.shuffle:
        pipeline = CleaningPipeline(
            config, workdir, documents, limit, runner or LocalRunner(), quality
        )
        added = pipeline.inputs()
        of_documents |= added
        of_knowledge |= added if knowledge == documents else {}
        kept = pipeline.clean(of_documents)
        say(_line("clean", kept, pipeline.summary))
    cleaned = None if pipeline is None else pipeline.documents()
    sources = _Sources(documents, knowledge, limit, text.validation_share, cleaned)
    selection = None
    if config.knowledge.enabled:
        selection = Selection(config, workdir, runner or LocalRunner(), questions)
    parts = _Parts(config, workdir, sources, of_documents, of_knowledge, pipeline, selection, say)
    tokenizer = parts.tokenizer()
    parts.corpora(tokenizer)
    parts.references(tokenizer)


@dataclass(frozen=True)
class _Sources:
    """Reads the documents of the specs of a run."""

    documents: str
    knowledge: str
    limit: int | None
    share: float
    cleaned: Iterable[Document] | None = None  # what is left of `documents`

    @property
    def same(self) -> bool:
        return self.knowledge == self.documents

    def read(self, spec: str, what: str) -> Iterator[Document]:
        """Yields the documents of a spec; nothing is opened before the first is needed."""
        if self.cleaned is not None and spec == self.documents:
            yield from progress(self.cleaned, what)
        else:
            yield from progress(itertools.islice(read_documents(spec), self.limit), what)

    def split(self, held_out: bool, what: str) -> Iterator[Document]:
        """Yields the documents for validation, or the others."""
        documents = self.read(self.documents, what)
        return (d for d in documents if is_validation(d, self.share) == held_out)


@dataclass(frozen=True)
class _Parts:
    config: ConfigDict
    workdir: Path
    sources: _Sources
    of_documents: dict[str, Any]  # what the documents are, compared with that of finished parts
    of_knowledge: dict[str, Any]
    pipeline: CleaningPipeline | None
    selection: Selection | None
    say: Say

    def tokenizer(self) -> Tokenizer:
        """Makes the tokenizer, or keeps that of a model."""
        folder, text = self.workdir / "tokenizer", self.config.text
        fields = ("vocabulary", "min_frequency", "tokenizer_bytes", "validation_share")
        inputs = self.of_documents | self.of_knowledge
        inputs |= {f"text.{field}": text[field] for field in fields}
        _check_split(self.sources)
        kept = _is_taken(folder) or make_part(
            folder, inputs, lambda folder: _train_tokenizer(self.config, self.sources).save(folder)
        )
        tokenizer = Tokenizer.load(folder)
        _check_size(tokenizer, self.config.model.vocabulary)
        self.say(_line("tokenizer", kept, f"{tokenizer.size} entries"))
        return tokenizer

    def corpora(self, tokenizer: Tokenizer) -> None:
        """Makes the token shards of validation and training."""
        text, share = self.config.text, self.sources.share
        inputs = {"tokenizer": tokenizer.fingerprint, "text.shards": text.shards}
        inputs |= self.of_documents | {"text.validation_share": share}
        inputs |= {"text.shuffle": text.shuffle} if text.shuffle else {}
        for name in ["validation"] * (share > 0) + ["train"]:
            folder, held_out = self.workdir / "corpus" / name, name == "validation"
            if self.pipeline is None:
                chosen = self.sources.split(held_out, name)
                make = partial(write_corpus, chosen, tokenizer, shards=text.shards)
            else:
                make = partial(self.pipeline.write_corpus, held_out, tokenizer)
            kept = make_part(folder, inputs, make)
            self.say(_line(f"corpus/{name}", kept, str(Corpus.open(folder).info())))

    def references(self, tokenizer: Tokenizer) -> None:
        """Makes the references, selected where the config says so; removes intermediate files."""
        folder, length = self.workdir / "references", self.config.memory.reference_length
        inputs = self.of_knowledge | {"tokenizer": tokenizer.fingerprint}
        inputs |= {"memory.reference_length": length}
        cut: Callable[[Path], Any]
        if self.pipeline is not None and self.sources.same:
            cut = partial(self.pipeline.write_references, tokenizer)
        else:
            pieces = self.sources.read(self.sources.knowledge, "references")
            cut = partial(write_references, pieces, tokenizer, length=length)
        if self.selection is not None:
            inputs |= self.selection.inputs()
            cut = partial(self.selection.write, inputs, cut, self.say)
        kept = make_part(folder, inputs, cut)
        for used in (self.selection, self.pipeline):
            if used is not None:
                used.tidy()
        self.say(_line("references", kept, References.open(folder).info()))


def _train_tokenizer(config: ConfigDict, sources: _Sources) -> Tokenizer:
    streams = [sources.split(False, "tokenizer")]
    if not sources.same:
        streams.append(sources.read(sources.knowledge, "tokenizer"))
    texts = (document.text for document in _in_turn(streams))
    text = config.text
    trained = Tokenizer.train(texts, text.vocabulary, text.min_frequency, text.tokenizer_bytes)
    _check_size(trained, config.model.vocabulary)
    return trained


def _is_taken(folder: Path) -> bool:
    """Tests whether the tokenizer came with the weights of a model, which no other one fits."""
    try:
        return _TAKEN in json.loads((folder / INPUTS).read_bytes())
    except (OSError, ValueError):
        return False


def progress(items: Iterable[_Item], what: str) -> Iterator[_Item]:
    """Yields the items with a progress bar on a terminal, without one elsewhere."""
    return iter(tqdm(items, desc=what, unit=" documents", disable=None, leave=False))


def _line(name: str, kept: bool, content: str) -> str:
    return f"{name}: {content} ({'finished before, kept' if kept else 'made'})"


def _in_turn(sources: list[Iterator[_Item]]) -> Iterator[_Item]:
    """Yields an item of each source in turn, until all have ended."""
    while sources:
        for source in list(sources):
            try:
                yield next(source)
            except StopIteration:
                sources.remove(source)


def _check_arguments(config: ConfigDict, limit: int | None, questions: Sequence[str]) -> None:
    if questions and not config.knowledge.enabled:
        raise TextError(
            f"{len(questions)} questions are given that no reference may hold, but"
            " config.knowledge.enabled = False; set it, or leave out --questions"
        )
    if limit is not None and limit < 1:
        raise TextError(f"limit = {limit}; expected at least 1 document")


def _check_split(sources: _Sources) -> None:
    share = sources.share
    missing, count = {False, share > 0}, 0
    for document in sources.read(sources.documents, "documents"):
        count += 1
        missing.discard(is_validation(document, share))
        if not missing:
            return
    raise TextError(
        f"text.validation_share = {share} puts all {count} documents into"
        f" {'training' if True in missing else 'validation'}; give more documents or change it"
    )


def _check_size(tokenizer: Tokenizer, vocabulary: int) -> None:
    if not SMALLEST <= tokenizer.size <= vocabulary:
        raise TextError(
            f"the tokenizer has {tokenizer.size} entries; expected {SMALLEST} …"
            f" model.vocabulary = {vocabulary}; change text.vocabulary or model.vocabulary"
        )
