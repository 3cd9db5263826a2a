"""Types of a sweep: variants of a config, as a file declares them and as they are planned.

Stages, banks and results are named by a hash of everything they are made from. A stage or bank that
is equal in two entries has one name and is made once; a changed one has another name.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3jax.config import ConfigDict
from m3jax.errors import SweepError, UserError
from m3jax.files import checksum, digest, read_sealed
from m3jax.workdir import content_id

Prepare = Callable[[ConfigDict, Path, str], Any]

# Folders of the data that stages read.
DATA_PARTS = (
    *("tokenizer", "corpus/train", "corpus/validation", "references", "index"),
    *("chats/train", "chats/validation"),
)
_ENTRY_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True)
class Entry:
    """Variant of a config.

    Attributes:
      name: name in tables and files: small letters, digits, dots, dashes, underscores.
      changes: field → value. `memory.kept_tokens` applies to every stage that reads the field,
        `continual:train.steps` to the stage `continual` alone.
      group: heading of the entry in the table and the plot.
      stages: values of the config's option `stage`, trained in this order, each from the checkpoint
        of the previous stage. The last stage is evaluated.
      options: more options of the config, as after the colon of `--config`: `shape=64x32x80`.
      read: changes for the evaluation of the trained model alone, with a newly written bank.
      knowledge: name of the knowledge base that is read, passed to `Sweep.prepare`.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    stages: Sequence[str] = ("warmup", "continual")
    options: str = ""
    read: Mapping[str, Any] = field(default_factory=dict)
    knowledge: str = ""


@dataclass(frozen=True)
class Sweep:
    """Variants of one config.

    Attributes:
      config: its file, such as `configs/quickstart.py`; takes the option `stage`.
      entries: the variants; the first is the baseline of the comparison.
      changes, read: as in `Entry`, for all entries.
      seeds: every entry is run with every seed; all entries with the first seed come first.
      prepare: `prepare(config, folder, knowledge)` makes tokenizer, corpus, references and index in
        a folder; None if they are prepared already, in the folder of `--data`.
      questions: path, relative to the data, of JSON lines (`m3jax.evaluation.questions`), which are
        asked with retrieved memories, without memory, and with wrong memories.
      in_context: path of JSON lines whose prompts state the facts, asked without memory.
    """

    config: str
    entries: Sequence[Entry]
    changes: Mapping[str, Any] = field(default_factory=dict)
    read: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    prepare: Prepare | None = None
    questions: str = ""
    in_context: str = ""


@dataclass(frozen=True)
class SweepData:
    """Planned data of runs: tokenizer, corpus, references and index in one folder.

    Attributes:
      folder: folder of the data.
      config: config that the data is prepared with; None if it is prepared already.
      knowledge: name of the knowledge base.
    """

    folder: Path
    config: ConfigDict | None
    knowledge: str

    @property
    def key(self) -> str:
        """Identifier of the data: its content, or, for data that the sweep prepares, its name."""
        return self.content() if self.config is None else self.folder.name

    def content(self, files: Sequence[str] = ()) -> str:
        """Returns what identifies the finished parts of the data, and these files in its folder."""
        paths = [self.folder / name for name in files if name]
        sums = [checksum(path) if path.is_file() else "" for path in paths]
        return digest(*(content_id(self.folder / part) or "" for part in DATA_PARTS), *sums)


@dataclass(frozen=True)
class SweepStage:
    """Planned stage of training.

    Attributes:
      folder: workdir of the stage.
      config: validated config of the stage.
      data: data that it reads.
      before: stage whose checkpoint it starts from, or None.
      bank: folder of the bank that it reads, or None.
    """

    folder: Path
    config: ConfigDict
    data: SweepData
    before: SweepStage | None
    bank: Path | None

    @property
    def checkpoints(self) -> Path:
        """Stage folder, which holds the checkpoints."""
        return self.folder / self.config.stage


@dataclass(frozen=True)
class SweepRun:
    """Planned run of an entry with one seed.

    Attributes:
      stages: stages in order; () if the entry is refused.
      read: config with which the last checkpoint is evaluated.
      bank: folder of the bank for the evaluation; None for the bank that the last stage has read.
      result: file of the figures.
      key: hash of everything that the figures depend on.
      questions: files of the data with the questions of the evaluation.
      refused: reason why the entry's config is invalid, or "".
    """

    entry: Entry
    seed: int
    result: Path
    stages: tuple[SweepStage, ...] = ()
    read: ConfigDict | None = None
    bank: Path | None = None
    key: str = ""
    questions: tuple[str, ...] = ()
    refused: str = ""

    @property
    def name(self) -> str:
        """Name of the run, ENTRY@SEED."""
        return f"{self.entry.name}@{self.seed}"

    def outcome(self) -> dict[str, Any] | None:
        """Returns the result, a dict with `figures` or `error`; None if the run has none yet.

        A result of another config or of other data and a damaged result do not count.
        """
        if self.refused:
            return {"key": self.key, "name": self.name, "error": self.refused}
        result = read_sealed(self.result) if self.result.is_file() else None
        if result is None or result.get("key") != self.key:
            return None
        return None if result.get("data", self.content) != self.content else result

    @property
    def content(self) -> str:
        """Returns what identifies the data of the last stage and of the evaluation."""
        return self.stages[-1].data.content(self.questions)


def load_sweep(path: str | Path) -> Sweep:
    """Runs a Python file and returns the `Sweep` that its `get_sweep()` makes.

    Raises:
      SweepError: the file is missing, raises an error, or has no `get_sweep()` that returns a
        `Sweep`; the sweep has no entries or seeds; or an entry's name is invalid or not unique.
      UserError: the file raises it.
    """
    if not Path(path).is_file():
        raise SweepError(f"there is no sweep file {path}; configs/sweeps/ has examples")
    try:
        scope = runpy.run_path(str(path))
        sweep = scope["get_sweep"]() if callable(scope.get("get_sweep")) else None
    except UserError:
        raise
    except Exception as error:  # a user's file may raise anything
        raise SweepError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(sweep, Sweep):
        raise SweepError(f"{path} has no function get_sweep() that returns a Sweep")
    names = [entry.name for entry in sweep.entries]
    for name in names:
        if names.count(name) > 1:
            raise SweepError(f"{path}: {names.count(name)} entries have the name {name!r}")
        if not _ENTRY_NAME.fullmatch(name):
            raise SweepError(
                f"{path}: the name of entry {name!r} may only have lowercase letters, digits, dots,"
                " dashes and underscores"
            )
    if not names or not sweep.seeds:
        raise SweepError(f"{path} has no entries or no seeds; give at least one of each")
    return sweep


def chosen(
    runs: Sequence[SweepRun], entries: Sequence[str] | None, seeds: Sequence[str] | None
) -> list[SweepRun]:
    """Selects the runs of the named entries and seeds; None selects all.

    Raises:
      SweepError: the sweep has no such entry or seed.
    """
    for names, known in (
        (entries, [run.entry.name for run in runs]),
        (seeds, [str(run.seed) for run in runs]),
    ):
        for name in names or ():
            if name not in known:
                listed = ", ".join(dict.fromkeys(known))
                raise SweepError(f"the sweep has no entry or seed {name!r}; it has {listed}")
    return [
        run
        for run in runs
        if (not entries or run.entry.name in entries) and (not seeds or str(run.seed) in seeds)
    ]
