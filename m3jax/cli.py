"""Command lines of launch scripts: shared flags, commands, help, and how a script starts and ends.

A script declares its commands (`Command`), each with the flags that it takes, and calls `run`.
Mistakes of the user end with one message and exit code 2, not a traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import json
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from m3jax.config import validate
from m3jax.config.fields import FIELDS, RENAMED
from m3jax.config.reference import describe
from m3jax.errors import CommandError, ConfigError, UserError
from m3jax.flag import Flag
from m3jax.hardware import quiet_libtpu

USER_ERROR = 2  # exit code
# Names and values of flags before the first release, and what to give now.
RENAMED_FLAGS = {
    "at": "--k",
    "mode=context": "--mode=long_context",
    "png": "--picture",
    "shift": "--config.evaluation.shift",
}


def switch(name: str, help: str) -> Flag:
    """Returns a flag without a value, off by default."""
    return Flag(name, help, bool)


def count(name: str, help: str, default: int | None = None) -> Flag:
    """Returns a flag with a whole number from 1."""
    return Flag(name, help, int, default, low=1)


def counts(name: str, help: str, default: list[int]) -> Flag:
    """Returns a flag with whole numbers from 1, separated by commas."""
    return Flag(name, help, int, default, low=1, many="comma")


def share(name: str, help: str, default: float) -> Flag:
    """Returns a flag with a number from 0 to 1."""
    return Flag(name, help, float, default, low=0, high=1)


def words(name: str, help: str, default: list[str] | None = None) -> Flag:
    """Returns a flag with texts, separated by commas."""
    return Flag(name, help, default=default, many="comma")


CONFIG = Flag(
    "config",
    "Config file and its options, for example configs/wiki_small.py:stage=continual."
    " --config.SECTION.FIELD=VALUE changes a field; --config_help[=SECTION] shows them.",
    ConfigDict,
)
WORKDIR = Flag("workdir", "Folder of the run, made by launch/prepare.py.", Path)
CHECKPOINT = Flag("checkpoint", "Stage folder, or checkpoints/STEP in it.")
STAGE_CHECKPOINT = CHECKPOINT.with_help("Default WORKDIR/<config.stage>.")
BANK = Flag("bank", "Folder or URL of a bank of explicit memories; default WORKDIR/bank.")
BANK_VERSION = Flag(
    "bank_version",
    "Version of the knowledge, of launch/edit_bank.py list; default the current one.",
    int,
)
JSON = Flag("json", "File to write the figures to.")
PICTURE = Flag("picture", "File (PNG) to write the picture to.")
BATCH = count("batch", "Rows that the device works on together.", 16)
SEED = Flag("seed", "Seed of the draws.", int, 0)
WINDOW = count(
    "window",
    "Tokens of a text longer than the context that stay as they are; default half of the context.",
)
CUT = count(
    "cut", "Most tokens of a memory of the older text; default config.memory.reference_length."
)
RAG_REFERENCES = count("references", "References in the prompt, with RAG.", 5)
CACHE = Flag(
    "compilation_cache",
    "Folder where compiled programs are kept for the next start; gs://… needs gcsfs.",
)
PROCESSES = (
    switch(
        "distributed",
        "Run as one of several processes, which the cluster knows: TPU pod, Slurm, Open MPI,"
        " Kubernetes. Start the same command on every host.",
    ),
    Flag("coordinator", "HOST:PORT of process 0; with --processes and --process_id."),
    Flag("processes", "Number of processes.", int),
    Flag("process_id", "Number of this process, from 0.", int),
    Flag("join_timeout", "Seconds to wait for the other processes at start.", int, 300),
    Flag(
        "heartbeat_timeout",
        "Seconds without a sign of life after which a process counts as dead and the others end.",
        int,
        100,
    ),
)


# -- commands --------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a launch script.

    Attributes:
      main: takes the values of the flags as attributes; configs are validated. Its docstring is the
        help of the command.
      flags: that it takes.
      required: names of flags that must be given.
      renamed: its names before the first release.
    """

    main: Callable[[flags.FlagValues], None]
    flags: tuple[Flag, ...]
    required: tuple[str, ...] = ("config", "workdir")
    renamed: tuple[str, ...] = ()


def run(text: str | None, commands: Mapping[str, Command]) -> None:
    """Runs a launch script on the command line of the process.

    Libraries log warnings only, which keeps the progress bar whole; `--verbosity=0` shows the rest.

    Args:
      text: the script's docstring, for `--help`.
      commands: by the word that follows the script's name; "" where none follows.
    """
    # Python puts the script's folder first, where evaluate.py would hide a library of that name.
    folder = os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != folder]

    def parser(argv: Sequence[str]) -> Command:
        try:
            return parse(text, commands, argv, flags.FLAGS)
        except UserError as error:
            raise SystemExit(show_error(error)) from None

    app.run(_call, flags_parser=parser)


def _call(command: Command) -> None:
    values = flags.FLAGS
    if not values["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    quiet_libtpu()
    try:
        if "compilation_cache" in values:
            use_compilation_cache(values.compilation_cache)
        command.main(values)
    except UserError as error:
        raise SystemExit(show_error(error)) from None


def parse(
    text: str | None,
    commands: Mapping[str, Command],
    argv: Sequence[str],
    values: flags.FlagValues,
) -> Command:
    """Parses a command line.

    Args:
      text, commands: as in `run`.
      argv: the script's name, then its arguments.
      values: where the command's flags are defined and get their values.

    Returns:
      The command.

    Raises:
      SystemExit: after `--help` or `--config_help`, with code 0.
      CommandError: a command or flag that is unknown, missing or renamed, or an unfit value.
      ConfigError: a config that cannot work.
    """
    script, *rest = argv
    named = rest[0] if rest and not rest[0].startswith("-") else ""
    helps = [word.lstrip("-") for word in rest if word.startswith("-")]
    if any(word in ("help", "h", "?", "helpshort") for word in helps):
        print(help_text(text, commands, os.path.basename(script), named))
        raise SystemExit(0)
    for word in helps:
        if word == "config_help" or word.startswith("config_help="):
            print(describe(word.partition("=")[2]))
            raise SystemExit(0)
    listed = ", ".join(filter(None, commands))
    if named and not listed:
        raise CommandError(f"unknown argument {named!r}; every option begins with --")
    for name, command in commands.items():
        if named in command.renamed:
            raise CommandError(f"the command {named} is now {name}")
    if named not in commands:
        begin = f"{named!r} is no command" if named else "no command given"
        raise CommandError(f"{begin}; give one of {listed} (--help explains)")
    command, rest = commands[named], rest[1:] if named else rest
    _refuse_renamed(command, rest)
    try:
        for flag in command.flags:
            flag.define(values, [script, *rest])
        remaining = values([script, *rest])
    except flags.Error as error:
        raise _reason(error, commands, named) from error
    except UserError:
        raise
    except Exception as error:  # of a config file
        raise _of_file(error) from error
    if remaining[1:]:
        raise CommandError(f"unknown argument {remaining[1]!r}; every option begins with --")
    missing = [f"--{name}" for name in command.required if values[name].value in (None, [])]
    if missing:
        called = " ".join(filter(None, (os.path.basename(script), named)))
        raise CommandError(f"{called} needs {', '.join(missing)} (--help explains)")
    for flag in command.flags:
        if flag.kind is ConfigDict and values[flag.name].value is not None:
            _check_config(flag.name, values[flag.name].value)
    return command


def _refuse_renamed(command: Command, arguments: Sequence[str]) -> None:
    """Refuses old names of flags and fields, and unknown fields, with the name of today."""
    own = {flag.name for flag in command.flags}
    for word in arguments:
        name, _, value = word.lstrip("-").partition("=")
        for old in (name, f"{name}={value}"):
            if word.startswith("-") and old in RENAMED_FLAGS and old not in own:
                raise CommandError(f"--{old} is now {RENAMED_FLAGS[old]}")
        config, _, path = name.partition(".")
        if not word.startswith("-") or not path or config not in own:
            continue
        prefix = f"--{config}."
        if path in RENAMED:
            raise CommandError(f"{prefix}{path} is now {prefix}{RENAMED[path]}")
        if path not in FIELDS:
            near = difflib.get_close_matches(path, FIELDS, 3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise CommandError(f"{prefix}{path}: no such field; {hint}--config_help lists all")


def _reason(error: flags.Error, commands: Mapping[str, Command], named: str) -> UserError:
    """Returns the error behind one of absl, or one with its message."""
    cause: BaseException | None = error
    while cause is not None:  # of a config file; libraries wrap its errors with their traceback
        inner = cause.__cause__ or cause.__context__
        if isinstance(cause, UserError) and not isinstance(inner, UserError):
            return cause
        cause = inner
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        owners = [
            other or "the script without a command"
            for other, command in commands.items()
            if name in {flag.name for flag in command.flags}
        ]
        if owners:
            return CommandError(
                f"--{name} is a flag of {', '.join(owners)}, not of {named or 'this call'};"
                " leave it out"
            )
    return CommandError(str(error))


def _check_config(name: str, config: Any) -> None:
    if isinstance(config, ConfigDict):
        validate(config)
        return
    try:
        if hasattr(config, "to_dict"):
            config.to_dict()  # the library keeps the error of a file until the config is read
    except UserError:
        raise
    except Exception as error:
        raise _of_file(error, name) from error
    raise ConfigError(f"--{name}: get_config() of the file returns no ConfigDict")


def _of_file(error: Exception, name: str = "config") -> ConfigError:
    """Returns the error of a config file as one of the user."""
    cause = error.__cause__ or error
    reason = " ".join(str(cause).split())
    return ConfigError(f"--{name}: the file cannot be read: {type(cause).__name__}: {reason}")


def help_text(text: str | None, commands: Mapping[str, Command], script: str, named: str) -> str:
    """Returns the text of `--help` of a command, or of the script with a list of its commands."""
    parts = [textwrap.dedent(text or "").strip()]
    if named in commands:
        command = commands[named]
        if named:
            parts = [inspect.getdoc(command.main) or ""]
        ordered = sorted(command.flags, key=lambda flag: flag.name not in command.required)
        described = [flag.describe(flag.name in command.required) for flag in ordered]
        parts.append("Flags:\n" + "\n".join(described))
    others = {name: command for name, command in commands.items() if name}
    if others and (not named or named not in commands):
        width = max(map(len, others))
        lines = [
            f"  {name:{width}}  {(inspect.getdoc(command.main) or '').splitlines()[0]}"
            for name, command in others.items()
        ]
        parts.append("Commands:\n" + "\n".join(lines))
        parts.append(f"python launch/{script} COMMAND --help shows the flags of a command.")
    return "\n\n".join(parts)


# -- what commands do alike ------------------------------------------------------------------------
def show_error(error: BaseException) -> int:
    """Prints the message, for a defect the traceback too; returns the exit code."""
    if isinstance(error, UserError):
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    traceback.print_exception(error)
    return 1


def values_of(given: flags.FlagValues, chosen: Sequence[Flag]) -> dict[str, Any]:
    """Returns the values of some flags, by name."""
    return {flag.name: given[flag.name].value for flag in chosen}


def show(table: str, figures: Any, path: str | None) -> None:
    """Prints a table and writes its figures to the file of --json, if there is one.

    Raises:
      CommandError: the file cannot be written.
    """
    from m3jax.files import write_atomically

    print(table)
    if not path:
        return
    text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise CommandError(f"--json={path} could not be written: {error}") from error


def processes(values: flags.FlagValues) -> contextlib.AbstractContextManager[None]:
    """Joins the other processes of the flags `PROCESSES` while the block runs.

    Nothing may have used a device before.

    Raises:
      ProcessError: the flags do not fit together, or the processes do not meet.
    """
    from m3jax.distributed import joined
    from m3jax.watch import Processes

    described = Processes.of_flags(
        values.distributed,
        values.coordinator,
        values.processes,
        values.process_id,
        join_timeout=values.join_timeout,
        heartbeat_timeout=values.heartbeat_timeout,
    )
    return joined(described, values.config, show_error)


def use_compilation_cache(folder: str | None) -> None:
    """Lets JAX keep compiled programs in a folder, and read them from it.

    Raises:
      ConfigError: the folder cannot be made or written to, or is a bucket and gcsfs is missing.
    """
    if folder is None:
        return
    import jax

    if folder.startswith("gs://"):
        if importlib.util.find_spec("gcsfs") is None:
            raise ConfigError(f"--compilation_cache={folder}: pip install gcsfs, which reads gs://")
    else:
        try:
            os.makedirs(folder, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError as error:
            raise ConfigError(f"--compilation_cache={folder}: {error.strerror}") from error
        if not writable:
            raise ConfigError(f"--compilation_cache={folder}: cannot be written to")
        folder = os.path.abspath(folder)
    jax.config.update("jax_compilation_cache_dir", folder)
