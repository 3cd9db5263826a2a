"""Preparation of a workdir from documents: tokenizer, token corpus, references; resumable."""

from __future__ import annotations

import itertools
import os
from collections import Counter
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
from m3jax.text.corpus import Corpus, encode_documents, write_corpus
from m3jax.text.documents import (
    Document,
    check_documents,
    describe_unread,
    is_validation,
    read_documents,
)
from m3jax.text.listing import inputs_of
from m3jax.text.reference_filter.select import Selection
from m3jax.text.references import References, write_references
from m3jax.text.tokenizer import SMALLEST, Tokenizer
from m3jax.workdir import INPUTS, make_part, read_inputs

_PARTS = ("tokenizer", "corpus/train", "references")
_TAKEN = "taken_from"  # in inputs.json: the tokenizer is that of an imported model

_Item = TypeVar("_Item")
Say = Callable[[str], None]
Finish = Callable[[str], None]


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
    finish: Finish = lambda part: None,
) -> None:
    """Writes `tokenizer/`, `corpus/validation/`, `corpus/train/` and `references/` of a workdir.

    A finished part that was made from the same inputs is kept; an unfinished part is made again.
    The tokenizer is trained on the training documents and, if `knowledge` is another spec, on the
    knowledge base, alternating between their documents; the tokenizer of a model imported by
    launch/convert.py is kept.

    If there is a runner, `clean.enabled` or `text.shuffle`, the documents are first processed in
    blocks in `clean/` (`m3jax.text.cleaning.pipeline`), which several processes can share. The
    output does not depend on the runner and, without cleaning and shuffling, equals the output
    without blocks. A knowledge base with its own spec is not cleaned. With `knowledge.enabled` the
    runner also filters the references (`m3jax.text.reference_filter.select`).

    Args:
      config: a config; its sections `text`, `clean`, `knowledge`, `memory` and `model` are read.
      documents, knowledge: specs (`read_documents`) of the documents and of the knowledge base; the
        default of `knowledge` is `documents`.
      limit: most documents to use of each spec; None = all.
      say: called with one line per part: its content, and whether it was kept or made.
      runner: runs the work on blocks; None = in this process.
      quality: spec of a quality scorer (`load_scorer`), required if `clean.quality_min` > 0.
      questions: texts of evaluation questions; references that contain a question are dropped.
      finish: called with the name of each finished part, such as "corpus/train".

    Raises:
      TextError: as `read_documents`; a finished part was made from other inputs; the training or
        validation split has no documents; the tokenizer has fewer than 260 entries or more than
        `model.vocabulary`; `quality` without its threshold or the reverse; `questions` without
        `knowledge.enabled`; `limit` < 1; no reference or document is left; a library is missing.
    """
    if questions and not config.knowledge.enabled:
        raise TextError(
            f"{len(questions)} questions are given that no reference may hold, but"
            " config.knowledge.enabled = False; set it, or leave out --questions"
        )
    if limit is not None and limit < 1:
        raise TextError(f"limit = {limit}; expected at least 1 document")
    knowledge = knowledge or documents
    parts = _Parts(config, Path(workdir), documents, knowledge, limit, say, finish)
    in_blocks = runner is not None or config.clean.enabled or bool(config.text.shuffle)
    for spec in dict.fromkeys((documents, knowledge)):
        if not (in_blocks and spec == documents):
            parts.check(spec)
    if in_blocks:
        parts.clean(runner or LocalRunner(), quality)
        if knowledge == documents:
            parts.check(documents)
    tokenizer = parts.tokenizer()
    parts.corpora(tokenizer)
    parts.references(tokenizer, runner or LocalRunner(), questions)


@dataclass
class _Parts:
    """Makes or keeps the parts of a workdir; each part streams the documents again."""

    config: ConfigDict
    workdir: Path
    documents: str
    knowledge: str
    limit: int | None
    say: Say
    finish: Finish
    pipeline: CleaningPipeline | None = None

    def __post_init__(self) -> None:
        self.share: float = self.config.text.validation_share
        listed = inputs_of(self.documents)
        self.inputs: dict[str, Any] = {"documents": listed, "limit": self.limit}
        listed = listed if self.knowledge == self.documents else inputs_of(self.knowledge)
        self.knowledge_inputs: dict[str, Any] = {"knowledge": listed, "limit": self.limit}

    def check(self, spec: str) -> None:
        """Reads a spec once and says what is not read, unless all parts are finished.

        What is wrong with a line, and ids that repeat in the knowledge base, is known before
        anything is made.
        """
        if all((self.workdir / part / INPUTS).is_file() for part in _PARTS):
            return
        unread = Counter[str]()
        count = check_documents(self._read(spec, "documents", unread), spec == self.knowledge)
        told = "" if self.pipeline is not None else describe_unread(spec, unread)
        if told:
            self.say(f"documents: {count} read; not read: {told}")

    def clean(self, runner: Runner, quality: str | None) -> None:
        """Cleans the documents in blocks in `clean/`; later parts read the cleaned documents."""
        source = self.documents, self.limit, runner, quality
        self.pipeline = CleaningPipeline(self.config, self.workdir, *source)
        added = self.pipeline.inputs()
        self.inputs |= added
        self.knowledge_inputs |= added if self.knowledge == self.documents else {}
        self._tell("clean", *self.pipeline.clean(self.inputs))

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer: trained, finished before, or that of an imported model."""
        folder, text = self.workdir / "tokenizer", self.config.text
        fields = ("vocabulary", "min_frequency", "tokenizer_bytes", "validation_share")
        inputs = self.inputs | self.knowledge_inputs
        inputs |= {f"text.{field}": text[field] for field in fields}
        self._check_split()
        kept = _is_taken(folder) or make_part(folder, inputs, self._train_tokenizer)
        tokenizer = Tokenizer.load(folder)
        self._check_size(tokenizer)
        self._tell("tokenizer", kept, f"{tokenizer.size} entries")
        return tokenizer

    def _train_tokenizer(self, folder: Path) -> None:
        streams = [self._split(False, "tokenizer")]
        if self.knowledge != self.documents:
            streams.append(self._read(self.knowledge, "tokenizer"))
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*streams))
        texts = (document.text for document in in_turn if document is not None)
        text = self.config.text
        trained = Tokenizer.train(texts, text.vocabulary, text.min_frequency, text.tokenizer_bytes)
        self._check_size(trained)
        if (folder / "manifest.json").is_file():  # finished, but its inputs.json is lost
            there = Tokenizer.load(folder)
            if there.fingerprint != trained.fingerprint:
                raise TextError(
                    f"{folder} has no {INPUTS} and is another tokenizer than these documents give;"
                    f" restore {INPUTS} from a copy, or use another workdir"
                )
        trained.save(folder)

    def corpora(self, tokenizer: Tokenizer) -> None:
        """Writes the token corpora of the validation and training documents."""
        text = self.config.text
        inputs = {"tokenizer": tokenizer.fingerprint, "text.shards": text.shards}
        inputs |= self.inputs | {"text.validation_share": self.share}
        inputs |= {"text.shuffle": text.shuffle} if text.shuffle else {}
        for name in ["validation"] * (self.share > 0) + ["train"]:
            folder, held_out = self.workdir / "corpus" / name, name == "validation"
            if self.pipeline is None:
                documents = encode_documents(self._split(held_out, name), tokenizer)
                make = partial(write_corpus, documents, tokenizer, shards=text.shards)
            else:
                make = partial(self.pipeline.write_corpus, held_out, tokenizer)
            kept = make_part(folder, inputs, make)
            self._tell(f"corpus/{name}", kept, Corpus(folder).info())

    def references(self, tokenizer: Tokenizer, runner: Runner, questions: Sequence[str]) -> None:
        """Writes the references, filtered if `knowledge.enabled`; removes intermediate files."""
        folder, length = self.workdir / "references", self.config.memory.reference_length
        inputs = self.knowledge_inputs | {"tokenizer": tokenizer.fingerprint}
        inputs |= {"memory.reference_length": length}
        cut: Callable[[Path], Any]
        if self.pipeline is not None and self.knowledge == self.documents:
            cut = partial(self.pipeline.write_references, tokenizer)
        else:
            documents = self._read(self.knowledge, "references")
            cut = partial(write_references, documents, tokenizer, length=length)
        selection = None
        if self.config.knowledge.enabled:
            selection = Selection(self.config, self.workdir, runner, questions)
            inputs |= selection.inputs()
            cut = partial(selection.write, inputs, cut, self.say)
        kept = make_part(folder, inputs, cut)
        for used in (selection, self.pipeline):
            if used is not None:
                used.tidy()
        self._tell("references", kept, References(folder).info())

    def _read(self, spec: str, what: str, unread: Counter[str] | None = None) -> Iterator[Document]:
        """Yields the documents of a spec; opens files only when the first document is requested."""
        if self.pipeline is not None and spec == self.documents:
            yield from progress(self.pipeline.documents, what)
        else:
            documents = read_documents(spec, unread)
            yield from progress(itertools.islice(documents, self.limit), what)

    def _split(self, held_out: bool, what: str) -> Iterator[Document]:
        """Yields the validation documents if `held_out`, else the training documents."""
        documents = self._read(self.documents, what)
        return (d for d in documents if is_validation(d, self.share) == held_out)

    def _tell(self, name: str, kept: bool, content: str) -> None:
        self.finish(name)
        self.say(f"{name}: {content} ({'finished before, kept' if kept else 'made'})")

    def _check_split(self) -> None:
        missing, count = {False, self.share > 0}, 0
        for document in self._read(self.documents, "documents"):
            count += 1
            missing.discard(is_validation(document, self.share))
            if not missing:
                return
        raise TextError(
            f"text.validation_share = {self.share} puts all {count} documents into"
            f" {'training' if True in missing else 'validation'}; give more documents or change it"
        )

    def _check_size(self, tokenizer: Tokenizer) -> None:
        vocabulary = self.config.model.vocabulary
        if not SMALLEST <= tokenizer.size <= vocabulary:
            raise TextError(
                f"the tokenizer has {tokenizer.size} entries; expected {SMALLEST} …"
                f" model.vocabulary = {vocabulary}; change text.vocabulary or model.vocabulary"
            )


def _is_taken(folder: Path) -> bool:
    """Returns True for the tokenizer of an imported model, whose weights fit no other."""
    return _TAKEN in (read_inputs(folder) or {})


def progress(items: Iterable[_Item], what: str) -> Iterator[_Item]:
    """Yields the items, with a progress bar if the output is a terminal."""
    return iter(tqdm(items, desc=what, unit=" documents", disable=None, leave=False))
