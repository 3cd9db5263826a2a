"""Config files on a command line: `--config=FILE[:OPTIONS]`, and what is wrong with such a file."""

from __future__ import annotations

import difflib
import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m3jax import places
from m3jax.config import validate
from m3jax.config.fields import FIELDS
from m3jax.config.renamed import RENAMED
from m3jax.errors import CommandError, ConfigError, UserError

# Fields that are paths; what is missing there is refused where it is read.
PATHS = {"retrieval.encoder": places.FOLDER, "retrieval.checkpoint": places.CHECKPOINT}


def read_config_paths(names: Sequence[str], arguments: list[str]) -> None:
    """Replaces the paths of config files, the part before the colon, by those to read.

    Args:
      names: names of the flags.
      arguments: words of the command line; changed in place.

    Raises:
      CommandError: a flag has no value.
      ConfigError: there is no such file, it is a folder or no Python, or may not be read.
    """
    for at, word in enumerate(arguments):
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or name not in names:
            continue
        if not equals and at + 1 == len(arguments):
            raise CommandError(f"--{name} needs a value, such as configs/wiki_small.py")
        value = value if equals else arguments[at + 1]
        path, colon, options = value.partition(":")
        path = value if options.startswith("/") else path  # a URL, which is refused
        given = f"--{name}={path}"
        read = places.read_path(given, path, places.FILE, ConfigError)
        places.check_path(given, read, places.FILE, ConfigError)
        try:
            compile(Path(read).read_bytes(), str(read), "exec")
        except (SyntaxError, ValueError) as error:
            raise ConfigError(f"{given} is no Python file: {error}") from error
        begin = f"{word[: -len(value)]}" if equals else ""
        arguments[at if equals else at + 1] = f"{begin}{read}{colon}{options}"


def check_config(name: str, config: Any) -> None:
    """Validates the config that the file of a flag has made; replaces `~` in its `PATHS`.

    Raises:
      ConfigError: the file has failed or returns no config, or the config is invalid.
    """
    if isinstance(config, ConfigDict):
        validate(config)
        for path, place in PATHS.items():
            section, field = path.split(".")
            if config[section][field]:
                given = f"config.{path} = {config[section][field]!r}"
                read = places.read_path(given, config[section][field], place, ConfigError)
                config[section][field] = str(read)
        return
    try:
        getattr(config, "to_dict", dict)()  # raises the error of a file that failed to load
    except UserError:
        raise
    except Exception as error:
        raise config_file_error(error, [name]) from error
    raise ConfigError(f"--{name}: get_config() of the file returns no ConfigDict")


def config_file_error(error: Exception, names: Sequence[str]) -> ConfigError:
    """Returns a `ConfigError` for an exception that the file of one of the flags has raised."""
    cause = error.__cause__ or error
    reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    unknown = re.match(r"'Key \"(\w+)\" does not exist", str(cause))
    if unknown:
        last = [path.rpartition(".")[2] for path in FIELDS]
        renamed = {old.rpartition(".")[2]: new.rpartition(".")[2] for old, new in RENAMED.items()}
        near = [renamed[unknown[1]]] if unknown[1] in renamed else []
        near = near or difflib.get_close_matches(unknown[1], last, 3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        reason = f"there is no field {unknown[1]}; {hint}--config_help lists all"
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if frame.name != "parse"]
    ours = os.path.dirname(__file__)
    lines = [
        f"{frame.filename}:{frame.lineno}: "
        for frame in frames
        if not frame.filename.startswith((ours, "<")) and "site-packages" not in frame.filename
    ]
    flag = f"--{names[0]}: " if len(names) == 1 else ""
    return ConfigError(f"{flag}{lines[-1] if lines else ''}{reason}")
