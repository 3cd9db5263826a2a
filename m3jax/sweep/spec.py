"""Variants of a config, as a file states them (`Sweep`) and worked out (`SweepRun`).

Stages, banks and results are named by a hash of all that they are made of. What is equal in two
entries has one name and is made once; what was changed has another name, and is made anew.
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
from m3jax.files import read_sealed

Prepare = Callable[[ConfigDict, Path, str], Any]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True)
class Entry:
    """Variant of a config.

    Attributes:
      name: of the row and of files: small letters, digits, dots, dashes, underscores.
      changes: field → value. `memory.kept_tokens` holds for every stage that reads it,
        `continual:train.steps` for one.
      group: heading under which the table and the picture put it.
      stages: what it trains, as the config's option `stage` calls them, each from the checkpoint of
        the one before. The last one is measured.
      options: more options of the config, as after the colon of `--config`: `shape=64x32x80`.
      read: changes that hold only when the trained model is measured: its bank is written anew.
      knowledge: which of the knowledge bases that `Sweep.prepare` makes its memories are of.
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
      entries: the variants; the first is what the others are compared with.
      changes, read: as those of an entry, for all of them.
      seeds: each entry is run with each, all of them with the first one first.
      prepare: `prepare(config, folder, knowledge)` makes tokenizer, corpus, references and index in
        a folder; None: they are prepared, and `--data` says where.
      questions: JSON lines (`m3jax.evaluation.scoring`) that are asked with the memories that a
        search finds, with none, and with wrong ones; a path, relative to the data.
      in_context: JSON lines whose prompts hold the facts, asked without memory.
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
    """Tokenizer, corpus, references and index: their folder, and the config that makes them.

    Attributes:
      folder: where.
      config: what they are made with; None: they were prepared before.
      knowledge: which variant of the knowledge base.
    """

    folder: Path
    config: ConfigDict | None
    knowledge: str

    @property
    def key(self) -> str:
        """Differs between different data, not between places of a sweep's workdir."""
        return str(self.folder) if self.config is None else self.folder.name


@dataclass(frozen=True)
class SweepStage:
    """Stage of training, planned.

    Attributes:
      folder: its workdir.
      config: of the stage, validated.
      data: what it reads.
      before: whose checkpoint it begins with.
      bank: folder of the memories that it reads, or None.
    """

    folder: Path
    config: ConfigDict
    data: SweepData
    before: SweepStage | None
    bank: Path | None

    @property
    def checkpoints(self) -> Path:
        """The stage folder."""
        return self.folder / self.config.stage


@dataclass(frozen=True)
class SweepRun:
    """An entry with a seed, worked out.

    Attributes:
      stages: in order; none where the entry cannot work.
      read: config with which the last checkpoint is measured.
      bank: folder of the memories that it is measured with; None: what the last stage has read.
      result: file of the figures.
      key: hash of all that the figures depend on.
      refused: why the entry cannot work, or "".
    """

    entry: Entry
    seed: int
    result: Path
    stages: tuple[SweepStage, ...] = ()
    read: ConfigDict | None = None
    bank: Path | None = None
    key: str = ""
    refused: str = ""

    @property
    def name(self) -> str:
        """ENTRY@SEED."""
        return f"{self.entry.name}@{self.seed}"

    def outcome(self) -> dict[str, Any] | None:
        """Returns a dict with `figures`, or with `error`; None: it has to be run.

        A result of another config, or a damaged one, does not count.
        """
        if self.refused:
            return {"key": self.key, "name": self.name, "error": self.refused}
        result = read_sealed(self.result) if self.result.is_file() else None
        return result if result is not None and result.get("key") == self.key else None


def load_sweep(path: str | Path) -> Sweep:
    """Returns the sweep of `get_sweep()` of a Python file.

    Raises:
      SweepError: there is no such file or function, or two entries have one name.
    """
    if not Path(path).is_file():
        raise SweepError(f"there is no sweep {path}; configs/sweeps/ has some")
    try:
        scope = runpy.run_path(str(path))
        sweep = scope["get_sweep"]() if callable(scope.get("get_sweep")) else None
    except UserError:
        raise
    except Exception as error:  # of a file of the user's
        raise SweepError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(sweep, Sweep):
        raise SweepError(f"{path} has no function get_sweep() that returns a Sweep")
    names = [entry.name for entry in sweep.entries]
    for name in names:
        if not _NAME.fullmatch(name) or names.count(name) > 1:
            raise SweepError(
                f"{path}: entry {name!r} needs a name of its own, of small letters, digits, dots,"
                " dashes and underscores"
            )
    if not names or not sweep.seeds:
        raise SweepError(f"{path} has no entries or no seeds; give at least one of each")
    return sweep


def chosen(
    runs: Sequence[SweepRun], entries: Sequence[str] | None, seeds: Sequence[str] | None
) -> list[SweepRun]:
    """Selects the runs of some entries and seeds; None: of all.

    Raises:
      SweepError: there is no such entry or seed.
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
