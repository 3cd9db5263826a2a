"""Plans the runs of a sweep, and the commands that train them on a pod (docs/pod.md).

Nothing is written or trained here.
"""

from __future__ import annotations

import runpy
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3jax.config import IN_STEP, ConfigDict, default, flatten, validate
from m3jax.errors import ConfigError, SweepError
from m3jax.files import digest, json_text
from m3jax.sweep.spec import Entry, Sweep, SweepData, SweepRun, SweepStage

# Fields that a stage without memory does not read; entries that differ only in them share it.
# The memory layers determine segments, which `restore_params` regroups for a stage with others.
_WITH_MEMORY = ("memory.", "writer.", "retrieval.", "evaluation.shift", "train.refresh_every")
_ALWAYS = ("memory.reference_length", "memory.chunk_length")
_SEGMENTS = ("memory.first_layer", "memory.layers")

# Fields that determine the prepared data, which all entries share.
_OF_DATA = (
    *("text.", "clean.", "memory.reference_length", "retrieval.embedder", "retrieval.dimension"),
    *("retrieval.encoder", "retrieval.pooling", "retrieval.exact_below", "retrieval.index_parts"),
    "retrieval.recall",
)

# Fields that the memories of a bank depend on, besides writer and references.
_OF_BANK = (
    *("model.", "writer.", "memory.first_layer", "memory.layers", "memory.heads"),
    *("memory.reference_length", "memory.kept_tokens", "memory.selection", "memory.dtype"),
    *("memory.counts", "memory.each", "memory.key_scale"),
)


def plan_sweep(sweep: Sweep, workdir: str | Path, data: str | Path | None = None) -> list[SweepRun]:
    """Plans all runs of a sweep, in order, with the stages and banks that they share.

    The run of an entry with an invalid config holds the reason in `refused`.

    Args:
      sweep: the sweep.
      workdir: folder for everything that the sweep makes.
      data: prepared workdir, if the sweep has no `prepare`.

    Raises:
      SweepError: neither `prepare` nor `data` is there, or both; or the config file is missing.
    """
    if (sweep.prepare is None) == (data is None):
        raise SweepError(
            "this sweep prepares its data itself; leave out --data"
            if data is not None
            else "this sweep prepares no data; name a workdir of launch/prepare.py with --data"
        )
    if not Path(sweep.config).is_file():
        raise SweepError(f"there is no config {sweep.config}; start in the folder above configs/")
    planner = _Planner(sweep, Path(workdir).absolute(), data)
    return [planner.run(entry, seed) for seed in sweep.seeds for entry in sweep.entries]


class _Planner:
    """Plans the runs of one sweep."""

    def __init__(self, sweep: Sweep, workdir: Path, data: str | Path | None):
        self.sweep, self.workdir, self.given = sweep, workdir, data
        self.get_config = runpy.run_path(sweep.config)["get_config"]

    def run(self, entry: Entry, seed: int) -> SweepRun:
        result = self.workdir / "results" / f"{entry.name}-seed-{seed}.json"
        try:
            _check_entry(entry)
            stages: list[SweepStage] = []
            for name in entry.stages:
                stages.append(self.stage(entry, seed, name, stages[-1] if stages else None))
            read = self.reading(entry, stages[-1])
        except ConfigError as error:
            return SweepRun(entry, seed, result, refused=str(error), key=digest(str(error)))
        bank = self.bank_to_read(stages[-1], read)
        measured = [stages[-1].folder.name, _changed(read), bank.name if bank else None]
        questions = self.sweep.questions, self.sweep.in_context
        key = digest(json_text([*measured, *questions], sort_keys=True))
        return SweepRun(entry, seed, result, tuple(stages), read, bank, key, questions)

    def stage(self, entry: Entry, seed: int, name: str, before: SweepStage | None) -> SweepStage:
        """Plans a stage of an entry; raises `ConfigError` if its config is invalid."""
        base = self.get_config(_options(entry, name))
        chosen = {**_of(self.sweep.changes, name), **_of(entry.changes, name)}
        if base.memory.source == "none":
            resized = any(path.startswith("model.") for path in chosen)
            chosen = {p: v for p, v in chosen.items() if _matters_without_memory(p, resized)}
        config = _with(base, {**chosen, "seed": seed})
        if config.data.packing == "pairs":
            raise ConfigError(
                "config.data.packing = 'pairs': a sweep does not train on preferences"
            )
        reads = config.memory.source != "none"
        data = self.data(seed, entry.knowledge if reads else "")
        made_of = [_changed(config), data.key, before.folder.name if before else None]
        bank = None
        if config.memory.source == "precomputed":
            if before is None:
                raise ConfigError(
                    "config.memory.source = 'precomputed': the first stage of an entry has no"
                    " checkpoint that could write; use 'online', or begin with another stage"
                )
            bank = self.bank(config, before, data)
        folder = self.workdir / "stages" / f"{name}-{_short(made_of)}"
        return SweepStage(folder, config, data, before, bank)

    def data(self, seed: int, knowledge: str) -> SweepData:
        """Plans the data of a seed and knowledge base, prepared with the first stage's config."""
        if self.given is not None:
            if knowledge:
                raise ConfigError(
                    f"knowledge = {knowledge!r}: --data is one knowledge base; leave it out"
                )
            return SweepData(Path(self.given).absolute(), None, "")
        first = self.sweep.entries[0].stages[0]
        changes = {**_of(self.sweep.changes, first), "seed": seed}
        config = _with(self.get_config(f"stage={first}"), changes)
        named = "-".join(part for part in ("seed", str(seed), knowledge) if part)
        made = self.workdir / "data" / f"{named}-{_short([_changed(config), knowledge])}"
        return SweepData(made, config, knowledge)

    def reading(self, entry: Entry, last: SweepStage) -> ConfigDict:
        """Makes the config for evaluating the last stage, with all memories read from a bank."""
        changes = {**_of(self.sweep.read, last.config.stage), **_of(entry.read, last.config.stage)}
        if last.config.memory.source in IN_STEP:
            changes = {"memory.source": "precomputed", **changes}
        return _with(last.config, changes)

    def bank_to_read(self, last: SweepStage, read: ConfigDict) -> Path | None:
        """Returns the bank for evaluating the last stage; None for no bank, or its own."""
        if read.memory.source == "none":
            return None
        writer = last.before if last.bank else last
        assert writer is not None
        bank = self.bank(read, writer, last.data)
        return None if bank == last.bank else bank

    def bank(self, config: ConfigDict, writer: SweepStage, data: SweepData) -> Path:
        fields = {p: v for p, v in flatten(config).items() if p.startswith(_OF_BANK)}
        return self.workdir / "banks" / _short([fields, writer.folder.name, data.key])


def _check_entry(entry: Entry) -> None:
    """Raises `ConfigError` for missing or repeated stages, and for fields it may not change."""
    if not entry.stages:
        raise ConfigError("stages = (): an entry trains at least one stage")
    for path in (*entry.changes, *entry.read):
        name = path.rpartition(":")[2]
        if name in ("seed", "stage"):
            raise ConfigError(f"config.{name} is not an entry's to change; it has {name}s")
        if name.startswith(_OF_DATA):
            raise ConfigError(
                f"config.{name} is decided when the data is prepared, which all entries share;"
                " change it for the whole sweep, or make another one"
            )
    if len(set(entry.stages)) < len(entry.stages):
        raise ConfigError(f"stages = {', '.join(entry.stages)}: each stage once")
    own = [path for path in entry.changes if ":" in path]
    stray = [path for path in own if path.partition(":")[0] not in entry.stages]
    if stray:
        raise ConfigError(
            f"{stray[0]} is of a stage that the entry has not; it has {', '.join(entry.stages)}"
        )


def _options(entry: Entry, stage: str) -> str:
    return ",".join(filter(None, (f"stage={stage}", entry.options)))


def _of(changes: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Returns the changes that apply to a stage; `stage:field` overrides `field`."""
    general = {path: value for path, value in changes.items() if ":" not in path}
    own = {p.partition(":")[2]: v for p, v in changes.items() if p.startswith(f"{stage}:")}
    return {**general, **own}


def _matters_without_memory(path: str, resized: bool) -> bool:
    if path in _SEGMENTS:
        return resized  # the memory layers of the base may not exist in a model of another depth
    return path in _ALWAYS or not path.startswith(_WITH_MEMORY)


def _with(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Returns a config with changed values; raises `ConfigError` if a field or value is invalid."""
    values = config.to_dict()
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        node = values.setdefault(section, {}) if section else values
        if not isinstance(node, dict):
            raise ConfigError(f"config.{path} is not a field")
        node[name] = value
    return validate(ConfigDict(values)).lock()


def _changed(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields, but `name`, that differ from the default: new fields change no hash."""
    defaults = {**flatten(default()), "name": config.name}
    return {path: value for path, value in flatten(config).items() if value != defaults[path]}


def _short(made_of: Any) -> str:
    return digest(json_text(made_of, sort_keys=True))[:12]


def launch_lines(sweep: Sweep, runs: Sequence[SweepRun], own: str) -> Iterator[str]:
    """Yields the shell commands that run a sweep on a pod; shared banks and stages occur once.

    The first command makes data and folders, the last command evaluates the trained stages; both
    run on a machine that sees the workdir. The commands between, of `launch/tpu_vm.sh`, write the
    banks and train the stages on all hosts of the slice.

    Args:
      sweep: the sweep.
      runs: result of `plan_sweep`; refused entries have no commands.
      own: the command line of `launch/sweep.py`, without `--dry_run`.
    """
    yield f"{own} --prepare_only"
    done: set[Path] = set()  # banks and stages
    for run in runs:
        for stage in run.stages:
            if stage.folder in done:
                continue
            flags = [*_flags(sweep, run, stage), f"--workdir={stage.folder}"]
            before = stage.before.checkpoints if stage.before else None
            if stage.bank is not None and stage.bank not in done:
                done.add(stage.bank)
                more = [f"--checkpoint={before}", f"--bank={stage.bank}"]
                yield _watched(f"bank-{stage.bank.name}", "write_bank", [*flags, *more])
            done.add(stage.folder)
            start = [f"--init_from={before}"] if before else []
            yield _watched(stage.folder.name, "train", [*flags, *start])
    yield own


def _watched(name: str, script: str, flags: list[str]) -> str:
    words = shlex.join(["python", f"launch/{script}.py", *flags, "--distributed"])
    return f"bash launch/tpu_vm.sh watch --run={name} -- {words}"


def _flags(sweep: Sweep, run: SweepRun, stage: SweepStage) -> list[str]:
    """Returns `--config=…` and a flag for every field whose value differs from that config."""
    options = _options(run.entry, stage.config.stage)
    base = flatten(runpy.run_path(sweep.config)["get_config"](options))
    values = flatten(stage.config).items()
    changed = [f"--config.{path}={value}" for path, value in values if value != base[path]]
    return [f"--config={sweep.config}:{options}", *changed]
