"""Selection of the references that are kept: rules, contamination, near-duplicates.

As in `m3jax.text.cleaning.clean`, every function here reads and writes files of one folder and may
run in any process; a range of references is looked at by whoever gets it, and its last file,
`<first>.json`, says that it is done.

    cut/                       the references as they were cut, a set of its own
    questions.json             texts of the evaluation questions
    ranges/<first>.left.npy    numbers of the references that pass
                  .bands.npy   MinHash bands of those, sorted; .signatures.npy what they come from
                  .json        counts and samples
    compared/<part>.npy        references with an earlier near-duplicate, among a range of bands
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from m3jax.config import ConfigDict
from m3jax.errors import TextError
from m3jax.files import digest, write_array, write_atomically
from m3jax.text.cleaning import minhash
from m3jax.text.cleaning.counters import Tally
from m3jax.text.cleaning.rules import broken_rule
from m3jax.text.cleaning.workers import Runner, WorkStage
from m3jax.text.documents import Document
from m3jax.text.records import MANIFEST
from m3jax.text.reference_filter.contamination import Contamination
from m3jax.text.reference_filter.rules import RULES, measure_reference
from m3jax.text.references import Reference, References, copy_references
from m3jax.workdir import begin_part

_RANGE = 4096  # references that are one task
_SHOWN = 200  # characters of a question in a sample


@dataclass(frozen=True)
class Selecting:
    """Names the folder, seen by all processes, and holds the settings of a selection.

    `knowledge` is the section of the config, `permutations` and `shingle_words` are MinHash's, from
    the section `clean`; `questions` says whether there are some to search for.
    """

    folder: Path
    knowledge: Any
    permutations: int
    shingle_words: int
    questions: bool

    @property
    def cut(self) -> Path:
        return self.folder / "cut"

    @property
    def ranges(self) -> Path:
        return self.folder / "ranges"


class Selection:
    """Selects a workdir's references, in its folder `selection/` while it is under way."""

    def __init__(
        self, config: ConfigDict, workdir: Path, runner: Runner, questions: Sequence[str]
    ) -> None:
        """Takes the config's sections `knowledge` and `clean`, and the questions' texts."""
        self._workdir, self._runner, self._questions = workdir, runner, list(questions)
        knowledge = SimpleNamespace(**config.knowledge.to_dict())
        self._selecting = Selecting(
            (workdir / "selection").absolute(),
            knowledge,
            int(config.clean.permutations),
            int(config.clean.shingle_words),
            bool(self._questions) and knowledge.contamination < 1,
        )

    def inputs(self) -> dict[str, Any]:
        """Returns what the selection adds to the inputs of the references."""
        selecting = self._selecting
        inputs = {f"knowledge.{name}": value for name, value in vars(selecting.knowledge).items()}
        if selecting.knowledge.similarity > 0:
            inputs["clean.permutations"] = selecting.permutations
            inputs["clean.shingle_words"] = selecting.shingle_words
            inputs["near-duplicates"] = minhash.algorithm()
        if self._questions:
            inputs["questions"] = digest(*self._questions)
        return inputs

    def write(
        self,
        inputs: dict[str, Any],
        cut: Callable[[Path], Any],
        say: Callable[[str], Any],
        folder: Path,
    ) -> None:
        """Cuts, selects and writes what is kept, and the report in `report/knowledge/`.

        What an unfinished run of other `inputs` left is deleted. `cut` writes the references of all
        documents to a folder; `say` gets one line of what came in and what is left.

        Raises:
          TextError: nothing is left; or bad documents.
        """
        selecting = self._selecting
        begin_part(selecting.folder, inputs)
        if not (selecting.cut / MANIFEST).is_file():
            cut(selecting.cut)
        write_atomically(selecting.folder / "questions.json", json.dumps(self._questions).encode())
        stages = [WorkStage("select", partial(_ranges, selecting), partial(look_at, selecting))]
        if selecting.knowledge.similarity > 0:
            parts = partial(_parts, selecting)
            stages.append(WorkStage("compare", parts, partial(compare_part, selecting)))
        self._runner.run(stages)
        references = _cut(selecting)
        kept, drops, tally = decide(selecting)
        if not len(kept):
            raise TextError(_nothing(references, drops, tally))
        from m3jax.text.reference_filter.report import write_selection_report  # draws: slow

        report = self._workdir / "report" / "knowledge"
        questions = _questions_of(selecting) if selecting.questions else None
        said = write_selection_report(references, kept, drops, tally, questions, report)
        copy_references(references, kept, folder)
        say(said)

    def tidy(self) -> None:
        """Removes what the references were selected from, when they are finished."""
        shutil.rmtree(self._selecting.folder, ignore_errors=True)


def _nothing(references: References, drops: np.ndarray, tally: Tally) -> str:
    steps = {name[: -len("/documents")]: n for name, n in tally.counts.items() if "/doc" in name}
    removed = ", ".join(f"{step} {n}" for step, n in sorted(steps.items()) if step != "read")
    return (
        f"the selection leaves none of {len(references)} references: {removed}, near-duplicates"
        f" {len(drops)}. Loosen the rules (config.knowledge.*), or give other --knowledge"
    )


def _ranges(selecting: Selecting) -> Iterable[tuple[int, int]]:
    size = len(_cut(selecting))
    parts = ((low, min(low + _RANGE, size)) for low in range(0, size, _RANGE))
    return (part for part in parts if not _done(selecting, part[0]))


def _name(first: int) -> str:
    return f"{first:012d}"


def _done(selecting: Selecting, first: int) -> bool:
    return (selecting.ranges / f"{_name(first)}.json").is_file()


@lru_cache(maxsize=1)  # by the time of change, too: another run may have had the path
def _references(folder: Path, modified: int) -> References:
    return References.open(folder)


def _cut(selecting: Selecting) -> References:
    return _references(selecting.cut, (selecting.cut / MANIFEST).stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _contamination(path: Path, modified: int, threshold: float, least: int) -> Contamination:
    return Contamination(json.loads(path.read_bytes()), threshold, least)


def _questions_of(selecting: Selecting) -> Contamination:
    path, knowledge = selecting.folder / "questions.json", selecting.knowledge
    limits = float(knowledge.contamination), int(knowledge.question_words)
    return _contamination(path, path.stat().st_mtime_ns, *limits)


def look_at(selecting: Selecting, part: tuple[int, int]) -> int:
    """Applies all rules but the one on near-duplicates to a range; returns its first number."""
    if _done(selecting, part[0]):
        return part[0]
    tally = Tally()
    items = _cut(selecting).read(range(*part))
    passed = [_passes(selecting, item, tally) for item in items]
    left = part[0] + np.flatnonzero(passed)
    at = selecting.ranges / _name(part[0])
    write_array(at.with_suffix(".left.npy"), left.astype(np.uint64))
    if selecting.knowledge.similarity > 0:
        signatures = np.empty((len(left), selecting.permutations), np.uint32)
        for row, i in zip(signatures, left.tolist(), strict=True):
            text = items[i - part[0]].text
            row[:] = minhash.signature(text, selecting.permutations, selecting.shingle_words)
        entries = minhash.band_entries(
            signatures, left.astype(np.uint64), selecting.knowledge.similarity
        )
        write_array(at.with_suffix(".signatures.npy"), signatures)
        write_array(at.with_suffix(".bands.npy"), entries)
    content = json.dumps(tally.to_json(), sort_keys=True).encode()
    write_atomically(at.with_suffix(".json"), content)
    return part[0]


def _passes(selecting: Selecting, item: Reference, tally: Tally) -> bool:
    tally.count("read", len(item.text))
    named = Document(item.key, item.text, item.title, item.title or item.source)
    measures = measure_reference(item.text)
    tally.lengths[str(measures.words.bit_length())] += 1
    broken = broken_rule(measures, selecting.knowledge, RULES)
    if broken is not None:
        tally.take_out(broken[0], named, f"{broken[1]:.4g}")
        return False
    if selecting.questions:
        question = _questions_of(selecting).find(item.text)
        if question is not None:
            shown = " ".join(question[0].split())[:_SHOWN]
            tally.take_out("contamination", named, f"{question[1]:.2f}, {shown}")
            return False
    return True


def _parts(selecting: Selecting) -> list[tuple[int, int]]:
    return minhash.parts_of(selecting.ranges.glob("*.bands.npy"))


def compare_part(selecting: Selecting, part: tuple[int, int]) -> int:
    """Finds the near-duplicates among a range of band keys; returns its number."""
    target = selecting.folder / "compared" / f"{part[0]:05d}-{part[1]:05d}.npy"
    if target.is_file():
        return part[0]

    @lru_cache(maxsize=256)
    def of_range(first: int) -> tuple[np.ndarray, np.ndarray]:
        at = selecting.ranges / _name(first)
        return np.load(at.with_suffix(".left.npy")), np.load(
            at.with_suffix(".signatures.npy"), mmap_mode="r"
        )

    def signature_of(number: int) -> np.ndarray:
        left, signatures = of_range(number - number % _RANGE)
        return np.array(signatures[np.searchsorted(left, np.uint64(number))])

    files = sorted(selecting.ranges.glob("*.bands.npy"))
    entries = minhash.in_part(files, part)
    similarity = float(selecting.knowledge.similarity)
    write_array(target, minhash.compare(entries, signature_of, similarity))
    return part[0]


def decide(selecting: Selecting) -> tuple[np.ndarray, np.ndarray, Tally]:
    """Returns the ids of the references that are kept, the near-duplicates, and all counts."""
    tally = Tally()
    for path in sorted(selecting.ranges.glob("*.json")):
        tally.add(Tally.from_json(json.loads(path.read_bytes())))
    left = [np.load(path) for path in sorted(selecting.ranges.glob("*.left.npy"))]
    drops = minhash.merged([])
    if selecting.knowledge.similarity > 0:
        names = (f"{part:05d}-{parts:05d}.npy" for part, parts in _parts(selecting))
        drops = minhash.merged([np.load(selecting.folder / "compared" / n) for n in names])
    kept = np.setdiff1d(np.concatenate(left), drops["number"], assume_unique=True)
    return kept.astype(np.int64), drops, tally
