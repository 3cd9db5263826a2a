"""Command lines of launch scripts: flags, commands, help, and how a script starts and ends.

A script declares its commands (`Command`), each with the flags that it takes, and calls `run`.
Mistakes of the user end with one message and exit code 2, not a traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import math
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from m3jax import places
from m3jax.config.fields import FIELDS
from m3jax.config.reference import describe
from m3jax.config.renamed import RENAMED, RENAMED_COMMANDS, RENAMED_FLAGS
from m3jax.config_files import check_config, config_file_error, read_config_paths
from m3jax.errors import CommandError, UserError
from m3jax.failures import explain
from m3jax.hardware import quiet_libtpu, require_single_precision, use_compilation_cache
from m3jax.places import Place, check_path, encoding_remedy, is_text, read_path
from m3jax.printable import cleaned_output, complain, with_originals
from m3jax.random_key import LARGEST_SEED

USER_ERROR = 2  # exit code


# -- flags -----------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Flag:
    """Flag of launch scripts.

    Attributes:
      name: without dashes.
      help: its meaning, with unit.
      kind: type of a value: str, int, float, bool, ConfigDict (a config file), or the `Place` of a
        path, which is checked before the command begins.
      default: default value; None if there is none or the help describes it; False for a bool.
      choices: accepted values.
      low, high: bounds of a number, inclusive.
      many: "comma" for a list of values, "repeat" for a flag that may be given more than once.
      required: True if a command that takes the flag cannot run without a value.
    """

    name: str
    help: str
    kind: type | Place = str
    default: Any = None
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    many: str = ""
    required: bool = False

    def with_help(self, text: str) -> Flag:
        """Returns the flag with `text` appended to its help, such as its default in a script."""
        return dataclasses.replace(self, help=f"{self.help} {text}")

    def define(self, values: flags.FlagValues, argv: Sequence[str]) -> None:
        """Defines the flag in `values`; a config flag reads the overrides of fields from `argv`."""
        about: Any = {"name": self.name, "default": self.default, "flag_values": values}
        if self.kind is ConfigDict:
            config_flags.DEFINE_config_file(**about, help_string=self.help, sys_argv=list(argv))
        elif self.kind is bool:
            flags.DEFINE_boolean(**about | {"default": bool(self.default)}, help=self.help)
        elif self.many == "repeat":
            flags.DEFINE_multi(_Parser(self), flags.ArgumentSerializer(), **about, help=self.help)
        else:
            flags.DEFINE(_Parser(self), **about, help=self.help)

    def describe(self) -> str:
        """Returns the flag's entry in `--help`: name, accepted values, default and meaning."""
        if self.kind is bool:
            title = f"--[no]{self.name}" if self.default else f"--{self.name}"
        else:
            kinds: dict[Any, str] = {int: "N", float: "X", ConfigDict: "FILE[:OPTIONS]"}
            word = self.kind.word if isinstance(self.kind, Place) else kinds.get(self.kind, "TEXT")
            value = "|".join(self.choices) or word
            title = f"--{self.name}={value}" + (f",{value}" if self.many == "comma" else "")
            title += " …" if self.many else ""
            if self.default not in (None, "", []):
                default = self.default
                default = ",".join(map(str, default)) if isinstance(default, list) else default
                title += f"  (default {default})"
        title += "  (required)" if self.required else ""
        indent = " " * 6
        text = textwrap.fill(self.help, 100, initial_indent=indent, subsequent_indent=indent)
        return f"  {title}\n{text}"


class _Parser(flags.ArgumentParser):
    """Parses and checks the values of a flag: texts, numbers, paths, or lists of them."""

    def __init__(self, flag: Flag) -> None:
        self.flag = flag
        if flag.choices:
            self.value: Any = flags.EnumParser(list(flag.choices)).parse
        elif isinstance(flag.kind, Place):
            self.value = self._path
        elif flag.kind is str:
            self.value = self._text
        else:
            number: Any = flags.IntegerParser if flag.kind is int else flags.FloatParser
            self.number = number(flag.low, flag.high).parse
            self.value = self._number

    def parse(self, argument: Any) -> Any:
        """Parses a value; for a comma-separated flag, a text or a list into a list of values."""
        if self.flag.many != "comma":
            return self.value(argument)
        if isinstance(argument, str):
            argument = [word.strip() for word in argument.split(",") if word.strip()]
        return [self.value(word) for word in argument]

    def _number(self, argument: Any) -> Any:
        number = self.number(argument)
        if self.flag.kind is float and not math.isfinite(number):
            raise ValueError("not a finite number")
        if self.flag.kind is int and self.flag.high is None and abs(number) >= 2**63:
            raise ValueError("not an integer of 64 bits")
        return number

    def _text(self, argument: str) -> str:
        if not argument and self.flag.default is None and not self.flag.many:
            raise CommandError(f"--{self.flag.name} is empty; leave it out, or give a value")
        return argument

    def _path(self, argument: Any) -> Path | str:
        assert isinstance(self.flag.kind, Place)
        return read_path(f"--{self.flag.name}={argument}", argument, self.flag.kind)


def switch(name: str, help: str) -> Flag:
    """Returns a boolean flag that is off by default."""
    return Flag(name, help, bool)


def count(name: str, help: str, default: int | None = None) -> Flag:
    """Returns a flag for an integer of at least 1."""
    return Flag(name, help, int, default, low=1)


def counts(name: str, help: str, default: list[int]) -> Flag:
    """Returns a flag for a comma-separated list of integers of at least 1."""
    return Flag(name, help, int, default, low=1, many="comma")


def share(name: str, help: str, default: float) -> Flag:
    """Returns a flag for a number from 0 to 1."""
    return Flag(name, help, float, default, low=0, high=1)


def words(name: str, help: str, default: list[str] | None = None, required: bool = False) -> Flag:
    """Returns a flag for a comma-separated list of strings."""
    return Flag(name, help, default=default, many="comma", required=required)


CONFIG = Flag(
    "config",
    "Config file and its options, for example configs/wiki_small.py:stage=continual."
    " --config.SECTION.FIELD=VALUE changes a field; --config_help[=SECTION] shows them.",
    ConfigDict,
    required=True,
)
WORKDIR = Flag(
    "workdir", "Folder of the run, made by launch/prepare.py.", places.WORKDIR, required=True
)
NEW_WORKDIR = dataclasses.replace(
    WORKDIR, help="Folder of the run; made where it is not there.", kind=places.NEW_FOLDER
)
BUCKET_WORKDIR = dataclasses.replace(WORKDIR, kind=places.ANY_WORKDIR)
NEW_BUCKET_WORKDIR = dataclasses.replace(NEW_WORKDIR, kind=places.NEW_ANY_WORKDIR)
CACHE_DIR = Flag(
    "cache_dir",
    "Folder where copies from buckets are kept; default ~/.cache/m3jax.",
    places.NEW_FOLDER,
)
RUN = (CONFIG, WORKDIR)
BUCKET_RUN = (CONFIG, BUCKET_WORKDIR, CACHE_DIR)
CHECKPOINT = Flag("checkpoint", "Stage folder, or checkpoints/STEP in it.", places.CHECKPOINT)
STAGE_CHECKPOINT = CHECKPOINT.with_help("Default WORKDIR/<config.stage>.")
BANK = Flag(
    "bank", "Folder or URL of a bank of explicit memories; default WORKDIR/bank.", places.BANK
)
BANK_VERSION = Flag(
    "bank_version",
    "Version of the knowledge, of launch/edit_bank.py list; default the current one.",
    int,
)
JSON = Flag("json", "File to write the figures to.", places.NEW_FILE)
PICTURE = Flag("picture", "File (PNG) to write the picture to.", places.NEW_FILE)
BATCH = count("batch", "Rows that the device works on together.", 16)
SEED = Flag("seed", "Seed of the draws.", int, 0, low=0, high=LARGEST_SEED)
WINDOW = count("window", "Last tokens of a long text that stay text; default half of the context.")
CUT = count("cut", "Most tokens of a memory of older text; default memory.reference_length.")
RAG_REFERENCES = count("references", "References in the prompt, with RAG.", 5)
CACHE = Flag(
    "compilation_cache",
    "Where compiled programs are kept for the next start; gs://… needs gcsfs.",
    places.CACHE,
)
PROCESSES = (
    switch(
        "distributed",
        "Run as one of several processes, which the cluster knows: TPU pod, Slurm, Open MPI,"
        " Kubernetes. Start the same command on every host.",
    ),
    Flag("coordinator", "HOST:PORT of process 0; with --processes and --process_id."),
    count("processes", "Number of processes."),
    Flag("process_id", "Number of this process, from 0.", int, low=0),
    count("join_timeout", "Seconds to wait for the other processes at start.", 300),
    count(
        "heartbeat_timeout",
        "Seconds without a sign of life after which a process counts as dead and the others end.",
        100,
    ),
)


# -- commands --------------------------------------------------------------------------------------
Main = Callable[[flags.FlagValues], None]


class Command(NamedTuple):
    """Command of a launch script: a function `main` that is called with the values of its flags.

    Configs are validated before the call. The docstring of `main` is the help of the command.
    """

    main: Main
    flags: tuple[Flag, ...]


class Commands(dict[str, Command]):
    """Commands of a script by the word that follows its name; "" is the call without a word."""

    def add(self, *flags: Flag, name: str | None = None) -> Callable[[Main], Main]:
        """Makes the decorated function the command `name`; default its own name, "" for `main`."""

        def decorate(main: Main) -> Main:
            called = "" if main.__name__ == "main" else main.__name__
            self[called if name is None else name] = Command(main, flags)
            return main

        return decorate


def run(text: str | None, commands: Mapping[str, Command]) -> None:
    """Runs a launch script, whose docstring is `text`, on the command line of the process.

    Libraries log warnings only, which keeps the progress bar whole; `--verbosity=0` shows the rest.
    What is printed is cleaned (`m3jax.printable`).
    """
    # Python puts the script's folder first, where evaluate.py would hide a library of that name.
    folder = os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != folder]

    def parser(argv: Sequence[str]) -> Command:
        try:
            return parse(text, commands, argv, flags.FLAGS)
        except UserError as error:
            raise SystemExit(show_error(error)) from None

    def main(command: Command) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        call(command, flags.FLAGS)

    with cleaned_output():
        app.run(main, flags_parser=parser)


def call(command: Command, values: flags.FlagValues) -> None:
    """Checks machine and paths, then calls a command; an error ends it with its exit code."""
    quiet_libtpu()
    try:
        require_single_precision()
        check_places(command, values)
        if "compilation_cache" in values:
            use_compilation_cache(values.compilation_cache)
        command.main(values)
        sys.stdout.flush()
    except BrokenPipeError:  # by `| head`
        _drop_output()
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (Exception, KeyboardInterrupt) as error:
        raise SystemExit(show_error(error)) from None


def check_places(command: Command, values: flags.FlagValues) -> None:
    """Raises `CommandError` if the path of a flag cannot be read or written as its `Place` says."""
    for flag in command.flags:
        value = values[flag.name].value
        if isinstance(flag.kind, Place) and value is not None:
            for path in value if isinstance(value, list) else [value]:
                check_path(f"--{flag.name}={path}", path, flag.kind)


def parse(
    text: str | None,
    commands: Mapping[str, Command],
    argv: Sequence[str],
    values: flags.FlagValues,
) -> Command:
    """Parses a command line; returns its command.

    Args:
      text, commands: as in `run`.
      argv: the script's name, then its arguments.
      values: the flags of the command are defined in it and get their values.

    Raises:
      SystemExit: after `--help` or `--config_help`, with code 0.
      CommandError: a command or flag is unknown, missing or renamed, or a value is not accepted.
      ConfigError: the config file cannot be read, its config is invalid, or a folder is unusable.
    """
    script, *rest = argv
    for word in rest:
        if not is_text(word):
            raise CommandError(f"{ascii(word)}: {encoding_remedy(word)}")
    named = rest.pop(0) if rest and not rest[0].startswith("-") else ""
    for word in (word.lstrip("-") for word in rest if word.startswith("-")):
        if word in ("help", "h", "?", "helpshort"):
            _print_and_end(help_text(text, commands, os.path.basename(script), named))
        if word == "config_help" or word.startswith("config_help="):
            _print_and_end(describe(word.partition("=")[2]))
    if named not in commands:
        listed = ", ".join(filter(None, commands))
        if not listed:
            raise CommandError(f"unknown argument {named!r}; every option begins with --")
        if RENAMED_COMMANDS.get(named) in commands:
            raise CommandError(f"the command {named} is now {RENAMED_COMMANDS[named]}")
        begin = f"{named!r} is no command" if named else "no command given"
        raise CommandError(f"{begin}; give one of {listed} (--help explains)")
    command = commands[named]
    _refuse_renamed(command, rest)
    configs = [flag.name for flag in command.flags if flag.kind is ConfigDict]
    read_config_paths(configs, rest)
    try:
        for flag in command.flags:
            flag.define(values, [script, *rest])
        remaining = values([script, *rest])
    except flags.Error as error:
        raise _reason(error, commands, named, configs) from error
    except UserError:
        raise
    except Exception as error:  # raised by a config file
        raise config_file_error(error, configs) from error
    if remaining[1:]:
        raise CommandError(f"unknown argument {remaining[1]!r}; every option begins with --")
    needed = [flag.name for flag in command.flags if flag.required]
    missing = [f"--{name}" for name in needed if values[name].value in (None, [])]
    if missing:
        called = " ".join(filter(None, (os.path.basename(script), named)))
        raise CommandError(f"{called} needs {', '.join(missing)} (--help explains)")
    for name in configs:
        if values[name].value is not None:
            check_config(name, values[name].value)
    return command


def _print_and_end(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # by `| head`
        _drop_output()
    raise SystemExit(0)


def _drop_output() -> None:
    """Drops what standard output still holds, which Python would flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse_renamed(command: Command, arguments: Sequence[str]) -> None:
    """Raises `CommandError` for unknown config fields and for renamed flags, with the new name."""
    own = {flag.name for flag in command.flags}
    for word in arguments:
        if not word.startswith("-"):
            continue
        name, _, value = word.lstrip("-").partition("=")
        for old in (name, f"{name}={value}"):
            if old in RENAMED_FLAGS and old not in own:
                raise CommandError(f"--{old} is now {RENAMED_FLAGS[old]}")
        config, _, path = name.partition(".")
        if not path or config not in own or path in FIELDS:
            continue
        if path in RENAMED:
            raise CommandError(f"--{name} is now --{config}.{RENAMED[path]}")
        near = difflib.get_close_matches(path, FIELDS, 3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise CommandError(f"--{name}: no such field; {hint}--config_help lists all")


def _reason(
    error: flags.Error, commands: Mapping[str, Command], named: str, configs: Sequence[str]
) -> UserError:
    """Returns the user error that caused an absl error, or a `CommandError` with its message."""
    first: BaseException = error
    inner: BaseException | None = error
    while inner is not None:  # absl and ml_collections wrap errors of a config file
        first, inner = inner, inner.__cause__ or inner.__context__
        if isinstance(first, UserError) and not isinstance(inner, UserError):
            return first
    for name in configs:
        if str(error).startswith(f"flag --{name}=") and isinstance(first, Exception):
            return config_file_error(first, [name])
    flag = getattr(error, "flagname", None)  # set if the flag is unknown
    owners = ", ".join(
        name or "the script without a command"
        for name, command in commands.items()
        if any(flag == own.name for own in command.flags)
    )
    if owners:
        called = named or "this call"
        return CommandError(f"--{flag} is a flag of {owners}, not of {called}; leave it out")
    return CommandError(str(error))


def help_text(text: str | None, commands: Mapping[str, Command], script: str, named: str) -> str:
    """Returns the `--help` text of the command `named`, or of the script with its commands."""
    parts = [textwrap.dedent(text or "").strip()]
    if named in commands:
        main, own = commands[named]
        if named:
            parts = [inspect.getdoc(main) or ""]
        ordered = sorted(own, key=lambda flag: not flag.required)
        parts.append("\n".join(["Flags:", *(flag.describe() for flag in ordered)]))
    others = {name: command for name, command in commands.items() if name}
    if others and (not named or named not in commands):
        width = max(map(len, others))
        lines = [
            f"  {name:{width}}  {(inspect.getdoc(command.main) or '').splitlines()[0]}"
            for name, command in others.items()
        ]
        parts.append("\n".join(["Commands:", *lines]))
        parts.append(f"python launch/{script} COMMAND --help shows the flags of a command.")
    return "\n\n".join(parts)


# -- shared by the commands ------------------------------------------------------------------------
def show_error(error: BaseException) -> int:
    """Prints a user error as one line, a defect with its traceback; returns the exit code.

    What the machine has refused is a user error (`failures.explain`); --verbosity=1 shows where.
    """
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        complain("interrupted; the same command goes on")
        return 128 + signal.SIGINT
    explained = error if isinstance(error, UserError) else explain(error)
    if explained:
        if explained is not error and logging.level_debug():
            traceback.print_exception(error)
        complain(with_originals(f"{type(explained).__name__}: {explained}"))
        return USER_ERROR
    traceback.print_exception(error)
    return 1


def values_of(given: flags.FlagValues, chosen: Sequence[Flag]) -> dict[str, Any]:
    """Returns the values of the flags `chosen`, by name."""
    return {flag.name: given[flag.name].value for flag in chosen}


def show(table: str, figures: Any, path: str | Path | None) -> None:
    """Prints a table, and writes its figures as JSON to the file `path`, if not None."""
    from m3jax.files import json_text, write_atomically

    print(table)
    if path:
        text = json_text(figures, indent=2, ensure_ascii=False) + "\n"
        write_atomically(path, text.encode())


def processes(values: flags.FlagValues) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which this process is one of a run, as the flags `PROCESSES` say.

    Raises:
      ProcessError: the flags contradict each other, or the processes do not meet in time.
    """
    from m3jax.distributed import joined
    from m3jax.watch import Processes

    described = Processes.of_flags(**values_of(values, PROCESSES))
    return joined(described, values.config, show_error)
