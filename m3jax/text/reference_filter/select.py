"""Selection of the references to keep: rules, contamination by questions, near-duplicates.

As in `m3jax.text.cleaning.clean`, the functions of a stage exchange data only through files of one
folder and may run in any process; the last file of a range of references, `<first>.json`, marks it
as finished.

    cut/                       all references before filtering, as `write_references` writes them
    questions.json             texts of the evaluation questions
    ranges/<first>.left.npy    ids of the references that pass
                  .bands.npy   band entries of the MinHash signatures in .signatures.npy, sorted
                  .json        counts and samples
    compared/<part>.npy        references with an earlier near-duplicate, by part of the band keys
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from m3jax.config import ConfigDict
from m3jax.errors import TextError
from m3jax.files import digest, json_text, write_array, write_atomically
from m3jax.text.cleaning import minhash
from m3jax.text.cleaning.counters import Tally
from m3jax.text.cleaning.rules import broken_rule
from m3jax.text.cleaning.workers import Runner, WorkStage
from m3jax.text.records import MANIFEST
from m3jax.text.reference_filter.contamination import Contamination
from m3jax.text.reference_filter.rules import RULES, measure_reference
from m3jax.text.references import Reference, References, copy_references
from m3jax.workdir import begin_part

_RANGE = 4096  # references per task
_SHOWN = 200  # characters of a question in a sample


@dataclass(frozen=True)
class Selecting:
    """Holds the folder (which all processes see) and the settings of a selection.

    `knowledge` is the config section `knowledge` with `permutations` and `shingle_words` of the
    section `clean`; `questions` is True if evaluation questions are searched for.
    """

    folder: Path
    knowledge: Any
    questions: bool

    @property
    def ranges(self) -> Path:
        return self.folder / "ranges"


@dataclass
class Selection:
    """Filters the references of a workdir, with intermediate files in its `selection/`."""

    config: ConfigDict  # with the sections `knowledge` and `clean`
    workdir: Path
    runner: Runner
    questions: Sequence[str]  # texts of evaluation questions

    def __post_init__(self) -> None:
        minhashed = {name: self.config.clean[name] for name in ("permutations", "shingle_words")}
        knowledge = SimpleNamespace(**self.config.knowledge.to_dict(), **minhashed)
        searched = bool(self.questions) and knowledge.contamination < 1
        self.selecting = Selecting((self.workdir / "selection").absolute(), knowledge, searched)

    def inputs(self) -> dict[str, Any]:
        """Returns the inputs that the selection adds to the part `references/`."""
        knowledge, clean = self.config.knowledge, self.config.clean
        inputs: dict[str, Any] = {f"knowledge.{name}": value for name, value in knowledge.items()}
        if knowledge.similarity > 0:
            inputs["clean.permutations"] = clean.permutations
            inputs["clean.shingle_words"] = clean.shingle_words
            inputs["near-duplicates"] = minhash.algorithm()
        if self.questions:
            inputs["questions"] = digest(*self.questions)
        return inputs

    def write(
        self,
        inputs: dict[str, Any],
        cut: Callable[[Path], Any],
        say: Callable[[str], Any],
        folder: Path,
    ) -> None:
        """Cuts and filters references, writes the kept ones to `folder`, and the report.

        The report is in `report/knowledge/`. Intermediate files of an unfinished run with other
        `inputs` are deleted. `cut` writes the references of all documents to a folder; `say` is
        called with a one-line summary. Raises `TextError` if no references are left.
        """
        selecting = self.selecting
        begin_part(selecting.folder, inputs)
        if not (selecting.folder / "cut" / MANIFEST).is_file():
            cut(selecting.folder / "cut")
        write_atomically(selecting.folder / "questions.json", json_text(self.questions).encode())
        stages = [WorkStage("select", partial(_ranges, selecting), partial(look_at, selecting))]
        if selecting.knowledge.similarity > 0:
            parts = partial(minhash.parts_of, selecting.ranges)
            stages.append(WorkStage("compare", parts, partial(compare_part, selecting)))
        self.runner.run(stages)
        references, questions = _inputs(selecting)
        kept, drops, tally = decide(selecting)
        if not len(kept):
            steps = tally.documents().items()
            removed = ", ".join(f"{step} {n}" for step, n in steps if step != "read")
            raise TextError(
                f"the selection leaves none of {len(references)} references: {removed},"
                f" near-duplicates {len(drops)}. Loosen the rules (config.knowledge.*), or give"
                " other --knowledge"
            )
        from m3jax.text.reference_filter.report import (
            write_selection_report,
        )  # imports matplotlib: slow

        report = self.workdir / "report" / "knowledge"
        summary = write_selection_report(references, kept, drops, tally, questions, report)
        copy_references(references, kept, folder)
        say(summary)

    def tidy(self) -> None:
        """Removes the intermediate files, which finished references no longer need."""
        shutil.rmtree(self.selecting.folder, ignore_errors=True)


def _inputs(selecting: Selecting) -> tuple[References, Contamination | None]:
    """Returns the references before filtering, and the questions to search for, if any."""
    limits = None
    if selecting.questions:
        limits = selecting.knowledge.contamination, selecting.knowledge.question_words
    written = (selecting.folder / "questions.json").stat().st_mtime_ns
    return _load(selecting.folder, written, limits)


@lru_cache(maxsize=1)  # `written` is in the key, as another run may use the path
def _load(
    folder: Path, written: int, limits: tuple[float, int] | None
) -> tuple[References, Contamination | None]:
    references = References(folder / "cut")
    if limits is None:
        return references, None
    return references, Contamination(json.loads((folder / "questions.json").read_bytes()), *limits)


def _name(first: int) -> str:
    return f"{first:012d}"


def _ranges(selecting: Selecting) -> Iterator[tuple[int, int]]:
    """Yields the unfinished ranges of references: first id, end of ids."""
    size = len(_inputs(selecting)[0])
    for low in range(0, size, _RANGE):
        if not (selecting.ranges / f"{_name(low)}.json").is_file():
            yield low, min(low + _RANGE, size)


def look_at(selecting: Selecting, part: tuple[int, int]) -> None:
    """Applies rules and contamination to a range of references, and writes the range's files.

    Does nothing if they are there.
    """
    at, tally = selecting.ranges / _name(part[0]), Tally()
    if at.with_suffix(".json").is_file():
        return
    references, questions = _inputs(selecting)
    items = references.read(range(*part))
    passed = [_passes(item, selecting.knowledge, questions, tally) for item in items]
    left = np.uint64(part[0]) + np.flatnonzero(passed).astype(np.uint64)
    write_array(at.with_suffix(".left.npy"), left, shared=True)
    if selecting.knowledge.similarity > 0:
        texts = [item.text if passes else None for item, passes in zip(items, passed, strict=True)]
        minhash.write_signatures(at, texts, part[0], selecting.knowledge)
    tally.write(at.with_suffix(".json"))


def _passes(item: Reference, knowledge: Any, questions: Contamination | None, tally: Tally) -> bool:
    tally.count("read", len(item.text))
    shown = item.as_document()
    measures = measure_reference(item.text)
    tally.lengths[str(measures.words.bit_length())] += 1
    broken = broken_rule(measures, knowledge, RULES)
    if broken is not None:
        tally.take_out(broken[0], shown, f"{broken[1]:.4g}")
        return False
    question = None if questions is None else questions.find(item.text)
    if question is not None:
        text = " ".join(question[0].split())[:_SHOWN]
        tally.take_out("contamination", shown, f"{question[1]:.2f}, {text}")
    return question is None


def _place_of(number: int) -> tuple[str, int]:
    """Returns the name of a reference's range, and its index in the range."""
    return _name(number - number % _RANGE), number % _RANGE


def compare_part(selecting: Selecting, part: minhash.Part) -> None:
    """Writes the near-duplicates of a part of the band keys (`minhash.parts_of`)."""
    target = selecting.folder / "compared" / f"{minhash.name_of(part)}.npy"
    if not target.is_file():
        similarity = selecting.knowledge.similarity
        drops = minhash.compare_files(selecting.ranges, part, _place_of, similarity)
        write_array(target, drops, shared=True)


def decide(selecting: Selecting) -> tuple[np.ndarray, np.ndarray, Tally]:
    """Returns the ids to keep, the near-duplicates (`minhash.DROP`), and the summed counts."""
    left = [np.load(path) for path in sorted(selecting.ranges.glob("*.left.npy"))]
    parts = minhash.parts_of(selecting.ranges) if selecting.knowledge.similarity > 0 else []
    drops = minhash.merged(minhash.results(selecting.folder / "compared", parts, ".npy"))
    kept = np.setdiff1d(np.concatenate(left), drops["number"], assume_unique=True)
    return kept.astype(np.int64), drops, Tally.read(selecting.ranges)
